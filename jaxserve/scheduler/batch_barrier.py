"""Delays final outputs under static batching."""

from __future__ import annotations

from collections import Counter

from jaxserve.request import FinishReason
from jaxserve.scheduler.sequence import Sequence


class BatchBarrier:
    """Holds a request's final output until every request of its batch has finished.

    A batch consists of the requests that joined in one step, and has that step's number. The next batch may begin
    before the last ids of the one before are read.
    """

    def __init__(self) -> None:
        self._batches: dict[str, int] = {}
        self._unfinished: Counter[int] = Counter()  # members of each batch that have not ended
        self._reasons: dict[str, tuple[Sequence, FinishReason]] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._reasons

    def __bool__(self) -> bool:
        return bool(self._reasons)

    def joined(self, sequence: Sequence, step: int) -> None:
        """Adds a sequence that runs to the batch of `step`; only its first call counts."""
        if sequence.request_id not in self._batches:
            self._batches[sequence.request_id] = step
            self._unfinished[step] += 1

    def hold(self, sequence: Sequence, reason: FinishReason) -> None:
        """Holds the final output of a member that has ended."""
        self._reasons[sequence.request_id] = sequence, reason
        self._ended(self._batches[sequence.request_id])

    def forget(self, sequence: Sequence) -> None:
        """Removes a request whose final output is sent, whether it joined a batch or not."""
        batch = self._batches.pop(sequence.request_id, None)
        held = self._reasons.pop(sequence.request_id, None)
        if batch is not None and held is None:
            self._ended(batch)

    def released(self) -> list[tuple[Sequence, FinishReason]]:
        """Returns the held outputs of batches whose members have all ended."""
        return [
            (sequence, reason)
            for sequence, reason in self._reasons.values()
            if self._batches[sequence.request_id] not in self._unfinished
        ]

    def check_integrity(self, request_ids: set[str]) -> None:
        """Asserts that members are unfinished requests and correctly counted."""
        assert set(self._reasons) <= set(self._batches) <= request_ids, "an answer is held back for nobody"
        going_on = Counter(batch for name, batch in self._batches.items() if name not in self._reasons)
        assert going_on == self._unfinished, "members of a batch are counted wrong"

    def _ended(self, batch: int) -> None:
        self._unfinished[batch] -= 1
        if not self._unfinished[batch]:
            del self._unfinished[batch]
