"""Keeps the running sequences, decoding ones and those whose prompts are in progress, with their slots and penalty
rows."""

from __future__ import annotations

from collections import Counter

from jaxserve.request import RequestStatus
from jaxserve.scheduler.decoding import DecodingSet
from jaxserve.scheduler.sequence import Sequence


class Running:
    """Holds the running sequences.

    decoding: those in which only the newest token remains to be computed. prefilling: the others, by request id.
    """

    def __init__(self, num_slots: int, page_size: int, tokens_per_step: int = 1, num_penalty_rows: int = 0):
        self.decoding = DecodingSet(num_slots, page_size, tokens_per_step)
        self.prefilling: dict[str, Sequence] = {}
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._num_penalty_rows = num_penalty_rows
        self._free_penalty_rows = list(range(num_penalty_rows - 1, -1, -1))
        self._priorities: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    @property
    def sequences(self) -> list[Sequence]:
        return [*self.decoding.sequences, *self.prefilling.values()]

    @property
    def full(self) -> bool:
        return not self._free_slots

    @property
    def lowest_priority(self) -> int:
        """Returns the lowest priority among the running sequences; there must be one."""
        return min(self._priorities)

    @property
    def num_free_penalty_rows(self) -> int:
        return len(self._free_penalty_rows)

    def lacks_row(self, sequence: Sequence) -> bool:
        """Tells whether a sequence that does not run could not, because no penalty row is free for it."""
        return sequence.penalized and not self._free_penalty_rows

    def start(self, sequence: Sequence) -> None:
        """Assigns a slot, and a penalty row where it needs one, to a sequence, whose known tokens are then to be
        computed."""
        sequence.status = RequestStatus.RUNNING
        sequence.slot = self._free_slots.pop()
        if sequence.penalized:
            sequence.penalty_row = self._free_penalty_rows.pop()
        self.prefilling[sequence.request_id] = sequence
        self._priorities[sequence.priority] += 1

    def decode(self, sequence: Sequence) -> None:
        """Moves a sequence whose known tokens are all computed to the decoding ones."""
        del self.prefilling[sequence.request_id]
        self.decoding.join(sequence)

    def position(self, sequence: Sequence) -> int:
        """Returns the position of the token that a sequence computes next."""
        return self.decoding.position(sequence) if sequence.decoding else sequence.num_computed

    def leave(self, sequence: Sequence) -> None:
        """Frees the slot and the penalty row of a sequence; its pages are not touched.

        A step in flight may still count ids in the row. That is safe: whatever its next owner writes there is
        dispatched after it.
        """
        if sequence.decoding:
            self.decoding.leave(sequence)
        else:
            del self.prefilling[sequence.request_id]
        assert sequence.slot is not None
        self._free_slots.append(sequence.slot)
        sequence.slot = None
        if sequence.penalty_row is not None:
            self._free_penalty_rows.append(sequence.penalty_row)
            sequence.penalty_row = None
        self._priorities[sequence.priority] -= 1
        if not self._priorities[sequence.priority]:
            del self._priorities[sequence.priority]

    def check_integrity(self) -> None:
        """Asserts that each slot has one owner and that the columns agree with the sequences."""
        running = self.sequences
        slots = [sequence.slot for sequence in running if sequence.slot is not None]
        assert sorted([*self._free_slots, *slots]) == list(range(self._num_slots)), "slots are not owned once"
        rows = [sequence.penalty_row for sequence in running if sequence.penalty_row is not None]
        assert sorted([*self._free_penalty_rows, *rows]) == list(range(self._num_penalty_rows)), (
            "penalty rows are not owned once"
        )
        for sequence in running:
            assert sequence.penalized == (sequence.penalty_row is not None), (
                f"{sequence.request_id} has a penalty row that it does not need, or none"
            )
        assert self._priorities == Counter(sequence.priority for sequence in running), "priorities are counted wrong"
        self.decoding.check_integrity()
