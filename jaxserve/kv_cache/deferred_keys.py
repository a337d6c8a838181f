"""Keeps full pages whose content keys nobody has needed yet, and derives them when a look-up comes that far.

Most requests end without any other having asked for their pages. Hashing these would be the larger part of what the
prefix cache costs. So only the first page that a sequence computes gets its key at once. The pages behind it form a
run, which is known by that key: no look-up can reach them without finding the page in front of them first.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from jaxserve.kv_cache.content_keys import ContentKeys


def known_tokens(prompt: tuple[int, ...], outputs: list[int] | array[int], start: int, stop: int) -> tuple[int, ...]:
    """Returns the ids at positions start to stop - 1 of a prompt and the tokens sampled behind it."""
    split = len(prompt)
    if start >= split:
        return tuple(outputs[start - split : stop - split])
    if stop <= split:
        return prompt[start:stop]
    return prompt[start:] + tuple(outputs[: stop - split])


class DeferredRun:
    """Holds what the keys of consecutive full pages of one sequence are derived from.

    chain: derives them. keys: those of the sequence's first pages, up to the one in front of the run at least; the
    sequence has the same list. prompt, outputs: its token ids, of which more may follow. first: index in its table of
    the first page of the run. pages: of the run, in order. A page that has been reclaimed since is still listed, and
    so are those behind it, which were reclaimed before. begun: the page in front of the run is committed.
    """

    __slots__ = ("begun", "chain", "first", "keys", "outputs", "pages", "prompt")

    def __init__(self, chain: ContentKeys, keys: list[bytes], prompt: tuple[int, ...], outputs: list[int], first: int):
        """Creates a run that begins with page `first`, whose key is known, and which will be in front of it."""
        self.chain = chain
        self.keys = keys
        self.prompt = prompt
        self.outputs: list[int] | array[int] = outputs
        self.first = first
        self.pages: list[int] = []
        self.begun = False

    def close(self, num_tokens: int) -> None:
        """Keeps copies of what is needed of the sequence, which ends. num_tokens: of all its committed pages."""
        self.outputs = array("i", self.outputs[: max(0, num_tokens - len(self.prompt))])

    def take(self, count: int, page_size: int) -> list[tuple[int, bytes]]:
        """Removes up to `count` pages from the beginning of the run; returns them with their content keys."""
        begin, end = self.first, self.first + min(count, len(self.pages))
        known = len(self.keys)
        if known < end:
            tokens = known_tokens(self.prompt, self.outputs, known * page_size, end * page_size)
            self.keys += self.chain.links(self.keys[-1], tokens, page_size)
        self.first = end
        taken, self.pages = self.pages[: end - begin], self.pages[end - begin :]
        return list(zip(taken, self.keys[begin:end], strict=True))


def marked(run: DeferredRun, contents: Sequence[bytes | DeferredRun | None]) -> int:
    """Returns how many pages of a run have not been reclaimed. contents: of each page its key or its run."""
    return sum(contents[page] is run for page in run.pages)
