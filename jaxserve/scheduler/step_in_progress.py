"""Represents a step while the scheduler builds it: its prompt chunks and the remaining token budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from jaxserve.kv_cache.page_pool import PageCopy
from jaxserve.scheduler.plan import PageTableWrite, PenaltyWrite, RowPlan, table_writes
from jaxserve.scheduler.pooled_sum import pooled_tokens
from jaxserve.scheduler.sequence import Sequence


@dataclasses.dataclass
class Chunk:
    """Represents the share of one prompt in the step under construction.

    held: number of entries of its page tables before it. admitted: the sequence gets its slot in this step; the slot's
    page tables know none of its pages yet.
    """

    sequence: Sequence
    count: int
    held: int
    admitted: bool = False

    def table_writes(self) -> list[PageTableWrite]:
        """Returns the writes that enter the pages filled before admission into the new slot's page tables."""
        assert self.admitted
        return slot_writes(self.sequence, self.held)

    def row(self) -> RowPlan:
        """Returns its row of the plan."""
        sequence, count = self.sequence, self.count
        start = sequence.num_computed
        assert sequence.slot is not None
        pooling, last = sequence.request.pooling, start + count == sequence.num_known
        return RowPlan(
            request_id=sequence.request_id,
            order=sequence.order,
            slot=sequence.slot,
            start=start,
            token_ids=sequence.known_token_ids(start, start + count),
            first_new_page=self.held,
            new_pages=tuple(sequence.pages[self.held :]),
            more_pages=tuple([tuple(table[self.held :]) for table in sequence.more_pages]),
            admit=sequence.request if self.admitted else None,
            penalty_row=sequence.penalty_row if self.admitted else None,
            pooled=None if pooling is None else pooled_tokens(pooling, start, count, last),
        )


def slot_writes(sequence: Sequence, count: int) -> list[PageTableWrite]:
    """Returns the writes that enter the first `count` entries of a sequence's page tables into those of its slot; what
    windows have left is not read there."""
    assert sequence.slot is not None
    writes = []
    for group, (table, left) in enumerate(zip(sequence.tables, sequence.left, strict=True)):
        writes += table_writes(group, sequence.slot, table[:count], left)
    return writes


def penalty_writes(admitted: Iterable[Sequence]) -> tuple[PenaltyWrite, ...]:
    """Returns the writes that make the penalty rows of sequences that get their slots theirs.

    The last id of a sequence may not be missing: it gets no slot before the host knows all of them.
    """
    writes = []
    for sequence in admitted:
        if sequence.penalty_row is None:
            continue
        assert not sequence.num_pending, f"{sequence.request_id} is admitted with ids that are not known"
        outputs = tuple(sequence.output_token_ids)
        writes.append(PenaltyWrite(sequence.penalty_row, sequence.request.prompt_token_ids, outputs))
    return tuple(writes)


class StepInProgress:
    """Accumulates the work of the step under construction.

    decodes: tokens of the decoding rows, one each unless the device drafts more. budget: prefill tokens that the
    settings leave; room: tokens that the largest step leaves, which a prompt that must not be split may use when it is
    alone. fill: prompts go on to the end of the bucket, past the budget. chunks: by request id, in order. copies: of
    pages, in order.
    prefill_tokens, prefill_pairs, prefill_context: of the chunks, as in `StepShape`. longest: context of the longest
    chunk that the step has had.
    """

    def __init__(self, decodes: int, budget: int, room: int):
        self.decodes = decodes
        self.budget = budget
        self.room = room
        self.fill = False
        self.chunks: dict[str, Chunk] = {}
        self.copies: list[PageCopy] = []
        self.prefill_tokens = 0
        self.prefill_pairs = 0.0
        self.prefill_context = 0
        self.longest = 0

    @property
    def num_tokens(self) -> int:
        return self.decodes + self.prefill_tokens

    @property
    def joined(self) -> set[str]:
        """Returns the ids of sequences admitted in this step, which cannot be preempted in it."""
        return {name for name, chunk in self.chunks.items() if chunk.admitted}

    def add(self, chunk: Chunk) -> None:
        self._spend(chunk.count)
        self._count(chunk, 1)
        self.chunks[chunk.sequence.request_id] = chunk

    def extend(self, chunk: Chunk, count: int) -> None:
        self._spend(count)
        self._count(chunk, -1)
        chunk.count += count
        self._count(chunk, 1)

    def drop(self, sequence: Sequence, decoding_tokens: int = 0) -> Chunk | None:
        """Removes a sequence's share from the step.

        Args:
            sequence: the sequence.
            decoding_tokens: its tokens if it decodes and the step has decodes.

        Returns:
            Its chunk, if it had one.
        """
        chunk = self.chunks.pop(sequence.request_id, None)
        given = chunk.count if chunk is not None else decoding_tokens if self.decodes > 0 else 0
        if chunk is None:
            self.decodes -= given
        else:
            self._count(chunk, -1)
        self._spend(-given)
        return chunk

    def _count(self, chunk: Chunk, sign: int) -> None:
        """Adds a chunk to the totals, or takes it from them."""
        start, count = chunk.sequence.num_computed, chunk.count
        self.prefill_tokens += sign * count
        self.prefill_pairs += sign * (count * start + count * (count + 1) / 2)
        self.prefill_context += sign * (start + count)
        self.longest = max(self.longest, start + count)

    def _spend(self, tokens: int) -> None:
        self.budget -= tokens
        self.room -= tokens
