"""A step while the scheduler decides it: the chunks of prompts, and the tokens that are left to give."""

from __future__ import annotations

import dataclasses

from jaxserve.scheduler.plan import RowPlan
from jaxserve.scheduler.sequence import Sequence


@dataclasses.dataclass
class Chunk:
    """The share of one prompt in the step under construction. held: pages held before it."""

    sequence: Sequence
    count: int
    held: int
    admitted: bool = False

    def row(self) -> RowPlan:
        """Its row in the plan."""
        sequence, count = self.sequence, self.count
        start = sequence.num_computed
        assert sequence.slot is not None
        return RowPlan(
            request_id=sequence.request_id,
            order=sequence.order,
            slot=sequence.slot,
            start=start,
            token_ids=sequence.known_token_ids(start, start + count),
            sample=start + count == sequence.num_known,
            suppress_stop=start + count < sequence.stop_position,
            first_new_page=self.held,
            new_pages=tuple(sequence.pages[self.held :]),
            admit=sequence.request if self.admitted else None,
        )


class StepInProgress:
    """The chunks of the step under construction, by request id, and the tokens left to give. Every sequence that
    decodes has its token already."""

    def __init__(self, budget: int):
        self.budget = budget
        self.chunks: dict[str, Chunk] = {}

    def add(self, chunk: Chunk) -> None:
        self.budget -= chunk.count
        self.chunks[chunk.sequence.request_id] = chunk

    def drop(self, sequence: Sequence) -> None:
        """Takes back what a sequence that is about to be preempted was given, if anything."""
        chunk = self.chunks.pop(sequence.request_id, None)
        self.budget += chunk.count if chunk is not None else sequence.decoding
