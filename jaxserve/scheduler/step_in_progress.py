"""A step while the scheduler decides it: the chunks of prompts, and the tokens that are left to give."""

from __future__ import annotations

import dataclasses

from jaxserve.kv_cache.page_pool import PageCopy
from jaxserve.scheduler.plan import PageTableWrite, RowPlan, table_writes
from jaxserve.scheduler.sequence import Sequence


@dataclasses.dataclass
class Chunk:
    """The share of one prompt in the step under construction.

    held: pages held before it. admitted: it gets its slot in this step, whose page table knows none of them.
    """

    sequence: Sequence
    count: int
    held: int
    admitted: bool = False

    def table_writes(self) -> list[PageTableWrite]:
        """Makes the page table of its new slot know the pages that were filled before the sequence got it."""
        assert self.admitted
        assert self.sequence.slot is not None
        return table_writes(0, self.sequence.slot, self.sequence.pages[: self.held])

    def row(self) -> RowPlan:
        """Makes its row in the plan."""
        sequence, count = self.sequence, self.count
        start = sequence.num_computed
        assert sequence.slot is not None
        return RowPlan(
            request_id=sequence.request_id,
            order=sequence.order,
            slot=sequence.slot,
            start=start,
            token_ids=sequence.known_token_ids(start, start + count),
            first_new_page=self.held,
            new_pages=tuple(sequence.pages[self.held :]),
            admit=sequence.request if self.admitted else None,
        )


class StepInProgress:
    """What the step under construction was given so far.

    decodes: tokens of the rows that decode, one each unless the device guesses some. budget: prefill tokens that the
    settings leave; room: tokens that the largest step leaves, which a prompt that must not be split may use when it is
    alone. fill: prompts go on to the end of the bucket, past the budget. chunks: by request id, in order. copies: of
    pages, in order.
    """

    def __init__(self, decodes: int, budget: int, room: int):
        self.decodes = decodes
        self.budget = budget
        self.room = room
        self.fill = False
        self.chunks: dict[str, Chunk] = {}
        self.copies: list[PageCopy] = []

    @property
    def num_tokens(self) -> int:
        return self.decodes + sum(chunk.count for chunk in self.chunks.values())

    @property
    def joined(self) -> set[str]:
        """Ids of those that came with this step; they keep their places in it."""
        return {name for name, chunk in self.chunks.items() if chunk.admitted}

    def add(self, chunk: Chunk) -> None:
        self._spend(chunk.count)
        self.chunks[chunk.sequence.request_id] = chunk

    def extend(self, chunk: Chunk, count: int) -> None:
        self._spend(count)
        chunk.count += count

    def drop(self, sequence: Sequence, decoding_tokens: int = 0) -> Chunk | None:
        """Takes back what a sequence was given, if anything; `decoding_tokens` where it decodes and decodes are given
        any."""
        chunk = self.chunks.pop(sequence.request_id, None)
        given = chunk.count if chunk is not None else decoding_tokens if self.decodes > 0 else 0
        if chunk is None:
            self.decodes -= given
        self._spend(-given)
        return chunk

    def _spend(self, tokens: int) -> None:
        self.budget -= tokens
        self.room -= tokens
