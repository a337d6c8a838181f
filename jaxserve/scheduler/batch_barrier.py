"""Final answers that wait until the whole batch has ended."""

from __future__ import annotations

from collections import Counter

from jaxserve.request import FinishReason
from jaxserve.scheduler.sequence import Sequence


class HeldAnswers:
    """Of batches whose requests have their final answers together. A batch is what joined in one step, by its number;
    the next one may begin before the last ids of the one before are read."""

    def __init__(self) -> None:
        self._batches: dict[str, int] = {}
        self._going_on: Counter[int] = Counter()  # members of each batch that have not ended
        self._reasons: dict[str, tuple[Sequence, FinishReason]] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._reasons

    def __bool__(self) -> bool:
        return bool(self._reasons)

    def joined(self, sequence: Sequence, step: int) -> None:
        """A sequence runs; only the first time counts."""
        if sequence.request_id not in self._batches:
            self._batches[sequence.request_id] = step
            self._going_on[step] += 1

    def hold(self, sequence: Sequence, reason: FinishReason) -> None:
        """A member has ended; its answer waits for the others."""
        self._reasons[sequence.request_id] = sequence, reason
        self._ended(self._batches[sequence.request_id])

    def forget(self, sequence: Sequence) -> None:
        """A request has its final answer, whether it joined or not."""
        batch = self._batches.pop(sequence.request_id, None)
        held = self._reasons.pop(sequence.request_id, None)
        if batch is not None and held is None:
            self._ended(batch)

    def released(self) -> list[tuple[Sequence, FinishReason]]:
        """The answers of batches in which nobody goes on."""
        return [
            (sequence, reason)
            for sequence, reason in self._reasons.values()
            if self._batches[sequence.request_id] not in self._going_on
        ]

    def check_integrity(self, request_ids: set[str]) -> None:
        """Asserts that members are unfinished requests, and counted."""
        assert set(self._reasons) <= set(self._batches) <= request_ids, "an answer is held back for nobody"
        going_on = Counter(batch for name, batch in self._batches.items() if name not in self._reasons)
        assert going_on == self._going_on, "members of a batch are counted wrong"

    def _ended(self, batch: int) -> None:
        self._going_on[batch] -= 1
        if not self._going_on[batch]:
            del self._going_on[batch]
