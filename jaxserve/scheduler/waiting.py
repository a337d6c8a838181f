"""The waiting queue: a heap by standing, with removal by marking."""

from __future__ import annotations

import heapq

from jaxserve.scheduler.policy import Policy, Standing
from jaxserve.scheduler.sequence import Sequence


class WaitingQueue:
    """Sequences that wait, best standing first. Every operation is O(log n) amortised, length O(1)."""

    def __init__(self, policy: Policy):
        self._policy = policy
        self._heap: list[tuple[Standing, int, Sequence]] = []
        self._members: dict[str, Sequence] = {}

    def __len__(self) -> int:
        return len(self._members)

    def push(self, sequence: Sequence) -> None:
        self._members[sequence.request_id] = sequence
        heapq.heappush(self._heap, (self._policy(sequence), sequence.order, sequence))

    def peek(self) -> Sequence | None:
        """The sequence to be served next, or None."""
        while self._heap:
            sequence = self._heap[0][2]
            if self._members.get(sequence.request_id) is sequence:
                return sequence
            heapq.heappop(self._heap)
        return None

    def remove(self, sequence: Sequence) -> None:
        """Takes a member out. Its heap entry goes when it comes to the top, or when too many such have gathered."""
        del self._members[sequence.request_id]
        if self._heap and self._heap[0][2] is sequence:
            heapq.heappop(self._heap)
        elif len(self._heap) > 2 * len(self._members) + 64:
            self._heap = [entry for entry in self._heap if self._members.get(entry[2].request_id) is entry[2]]
            heapq.heapify(self._heap)
