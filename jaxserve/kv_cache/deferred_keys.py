"""Keeps full pages whose content keys nobody has needed yet, and derives them when a look-up comes that far.

Most requests end without any other having asked for their pages. Hashing these would be the larger part of what the
prefix cache costs. So only the first page that a sequence computes gets its key at once. The pages behind it form a
run, which is known by that key: no look-up can reach them without finding the page in front of them first.
"""

from __future__ import annotations

from jaxserve.kv_cache.content_keys import ContentKeys


def known_tokens(prompt: tuple[int, ...], outputs: list[int], start: int, stop: int) -> tuple[int, ...]:
    """Returns the ids at positions start to stop - 1 of a prompt and the tokens sampled behind it."""
    split = len(prompt)
    if start >= split:
        return tuple(outputs[start - split : stop - split])
    if stop <= split:
        return prompt[start:stop]
    return prompt[start:] + tuple(outputs[: stop - split])


class DeferredRun:
    """Holds consecutive full pages of one sequence without content keys, and what these are derived from.

    chain: derives them. keys: those of the sequence's first pages, up to the one in front of the run at least; the
    sequence has the same list. prompt, outputs: its token ids, of which more may follow: tens of bytes a token, whose
    keys and values take tens of thousands. first: index in its table of the first page of the run. pages: of the run,
    in order, each of which has one owner: the sequence, or the run itself once the sequence has released them (cached).
    named: cached pages that were its first and have got their keys, in order, if there are any. begun: the page in
    front of the run is committed.
    """

    __slots__ = ("begun", "cached", "chain", "first", "keys", "named", "outputs", "pages", "prompt")

    def __init__(self, chain: ContentKeys, keys: list[bytes], prompt: tuple[int, ...], outputs: list[int], first: int):
        """Creates a run that begins behind page `first`, whose key is known."""
        self.chain = chain
        self.keys = keys
        self.prompt = prompt
        self.outputs = outputs
        self.first = first
        self.pages: list[int] = []
        self.named: list[int] | None = None
        self.begun = self.cached = False

    def take(self, count: int, page_size: int) -> list[tuple[int, bytes]]:
        """Removes up to `count` pages from the beginning of the run; returns them with their content keys."""
        begin, end = self.first, self.first + min(count, len(self.pages))
        known = len(self.keys)
        if known < end:
            tokens = known_tokens(self.prompt, self.outputs, known * page_size, end * page_size)
            self.keys += self.chain.links(self.keys[-1], tokens, page_size)
        self.first = end
        taken = self.pages[: end - begin]
        del self.pages[: end - begin]
        return list(zip(taken, self.keys[begin:end], strict=True))
