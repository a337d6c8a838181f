"""Describes what prompts hold, compactly: runs of content ids, from which token ids are made when a request is sent.

A trace of long prompts has far more tokens than fit in memory as numbers. What matters to a cache is only which
prompts begin alike, so a prompt is a few runs, each a content id and a number of tokens: equal ids stand for equal
text, different ids for different text.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import numpy as np

UNKNOWN_ID = 0
"""Token id of prompts and answers whose content a trace does not tell."""

STOP_ID = 1
"""Token id that ends an answer."""

FIRST_CONTENT_ID = 2
"""Smallest id of a run besides the stop id."""


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """Holds the content of one prompt as runs in order.

    Attributes:
        ids: content id of each run, from STOP_ID to 2^31 - 1.
        counts: tokens of each run, at least 1 each.
    """

    ids: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()

    @classmethod
    def of(cls, runs: Iterable[tuple[int, int]]) -> Content:
        """Joins runs of (id, tokens); those without tokens are left out, and neighbors of one id become one run."""
        ids: list[int] = []
        counts: list[int] = []
        for content_id, count in runs:
            if not count:
                continue
            if ids and ids[-1] == content_id:
                counts[-1] += count
            else:
                ids.append(content_id)
                counts.append(count)
        return cls(tuple(ids), tuple(counts))

    def __len__(self) -> int:
        """Returns the number of tokens."""
        return sum(self.counts)

    def __add__(self, other: Content) -> Content:
        return Content.of((*self.runs(), *other.runs()))

    def runs(self) -> Iterator[tuple[int, int]]:
        """Iterates over (id, tokens)."""
        return zip(self.ids, self.counts, strict=True)

    def token_ids(self) -> tuple[int, ...]:
        """Returns a token id for each token, as a simulation has them: the id of the token's run."""
        found: list[int] = []
        for content_id, count in self.runs():
            found += [content_id] * count
        return tuple(found)

    def after(self, start: int) -> Content:
        """Returns the content from token `start` on."""
        found = []
        for content_id, count in self.runs():
            skipped = min(start, count)
            start -= skipped
            found.append((content_id, count - skipped))
        return Content.of(found)

    def shared(self, other: Content) -> int:
        """Returns the number of tokens with which both begin."""
        same = 0
        mine, theirs = list(self.runs()), list(other.runs())
        for (content_id, count), (other_id, other_count) in zip(mine, theirs, strict=False):
            if content_id != other_id:
                break
            same += min(count, other_count)
            if count != other_count:
                break
        return same

    def drawn_ids(self, vocab_size: int, seed: int, first_id: int = 0) -> tuple[int, ...]:
        """Returns token ids for an engine with a vocabulary: random from `first_id` on, the same for equal runs.

        Two runs of one id and different lengths begin alike.
        """
        parts = [
            np.random.default_rng([seed, content_id]).integers(first_id, vocab_size, count).tolist()
            for content_id, count in self.runs()
        ]
        return tuple(itertools.chain.from_iterable(parts))


def answer_content(answer_id: int, tokens: int) -> Content:
    """Returns the content of an answer of `tokens` tokens, the last of which is the stop id."""
    return Content.of(((answer_id, tokens - 1), (STOP_ID, 1)))


Piece = tuple[tuple[int, int], ...]
"""What a page holds: (id, tokens) of each part of it."""


def pages_of(content: Content, page_size: int) -> list[Piece]:
    """Returns what each full page of `page_size` tokens holds, equal where the tokens are."""
    pages: list[Piece] = []
    begun: list[tuple[int, int]] = []
    room = page_size
    for content_id, count in content.runs():
        if begun:
            taken = min(room, count)
            begun.append((content_id, taken))
            room, count = room - taken, count - taken
            if room:
                continue
            pages.append(tuple(begun))
        full, rest = divmod(count, page_size)
        pages += [((content_id, page_size),)] * full
        begun, room = ([(content_id, rest)], page_size - rest) if rest else ([], page_size)
    return pages
