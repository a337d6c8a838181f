"""Implements queues of waiting sequences as heaps with removal by marking. Every operation is O(log n) amortized,
length O(1)."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable

from jaxserve.scheduler.sequence import Sequence

PriorityKey = tuple[float, ...]
"""Orders sequences: the smallest key is scheduled first and preempted last."""


class Queue(ABC):
    """Orders sequences, best first.

    A member is pushed once; its key does not change while it waits.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def push(self, sequence: Sequence) -> None: ...

    @abstractmethod
    def remove(self, sequence: Sequence) -> None:
        """Removes a member."""

    @abstractmethod
    def peek(self) -> Sequence | None:
        """Returns the best member, or None."""

    @abstractmethod
    def rank(self) -> PriorityKey:
        """Returns the key that compares the best member of this nonempty queue with those of similar queues."""


class KeyedQueue(Queue):
    """Orders sequences by a key computed when each is pushed."""

    def __init__(self, key: Callable[[Sequence], PriorityKey]):
        self._key = key
        self._heap: list[tuple[PriorityKey, int, Sequence]] = []  # the second is the number of the push
        self._pushes = 0
        self._members: dict[int, int] = {}  # order of arrival -> number of the push that counts

    def __len__(self) -> int:
        return len(self._members)

    def push(self, sequence: Sequence) -> None:
        self._pushes += 1
        self._members[sequence.order] = self._pushes
        heapq.heappush(self._heap, (self._key(sequence), self._pushes, sequence))

    def remove(self, sequence: Sequence) -> None:
        """Removes a member. Its heap entry goes when it comes to the top, or when too many such have gathered."""
        del self._members[sequence.order]
        if self._heap and self._heap[0][2] is sequence:
            heapq.heappop(self._heap)
        elif len(self._heap) > 2 * len(self._members) + 64:
            self._heap = [entry for entry in self._heap if self._members.get(entry[2].order) == entry[1]]
            heapq.heapify(self._heap)

    def peek(self) -> Sequence | None:
        while self._heap:
            _, push, sequence = self._heap[0]
            if self._members.get(sequence.order) == push:
                return sequence
            heapq.heappop(self._heap)
        return None

    def rank(self) -> PriorityKey:
        best = self.peek()
        assert best is not None, "an empty queue has no rank"
        return (*self._heap[0][0], best.order)
