"""Those that wait to run: preempted sequences in front, then new ones as the formation offers them."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from jaxserve.scheduler.admission_order import AdmissionOrder
from jaxserve.scheduler.keyed_queue import KeyedQueue
from jaxserve.scheduler.policies.policy import Policy
from jaxserve.scheduler.sequence import Sequence


class _Times:
    """New requests by a moment of each. Who waits no more, or has been demoted, drops out when it comes to the top."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, moment: float, sequence: Sequence, waiting: int) -> None:
        """waiting: how many wait, so that entries of others do not gather."""
        heapq.heappush(self._heap, (moment, sequence.order, sequence))
        if len(self._heap) > 2 * waiting + 64:
            self._heap = [entry for entry in self._heap if entry[2].waits_new]
            heapq.heapify(self._heap)

    def first(self) -> tuple[float, Sequence] | None:
        while self._heap:
            moment, _, sequence = self._heap[0]
            if sequence.waits_new and not sequence.lateness:
                return moment, sequence
            heapq.heappop(self._heap)
        return None


class Waiting:
    """Members are pushed and removed; no operation looks at all of them.

    new: by arrival, those that never ran. returning: those whose pages were taken, to be computed again, in the order
    of the policy. by_urgency: queues of new requests, in each of which the best takes a running one's place first.
    """

    def __init__(self, policy: Policy, formation: AdmissionOrder, by_urgency: tuple[KeyedQueue, ...]):
        self._policy = policy
        self._formation = formation
        self._deadlines = _Times()
        self._due = _Times()
        self.new = KeyedQueue(lambda sequence: (sequence.request.arrival_time,))
        self.returning = policy.queue()
        self._by_urgency = by_urgency

    def __len__(self) -> int:
        return len(self.new) + len(self.returning)

    def push(self, sequence: Sequence) -> None:
        """A request that never ran."""
        self._policy.queued(sequence)
        self._push(sequence)
        if sequence.request.options.deadline is not None:
            self._deadlines.push(sequence.request.options.deadline, sequence, len(self.new))
        if self._policy.clocked:
            self._due.push(self._policy.due(sequence), sequence, len(self.new))

    def push_back(self, sequence: Sequence) -> None:
        """A preempted sequence, to the front."""
        self.returning.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a member out: it runs from now on, or has ended."""
        if sequence.waits_new:
            self._remove(sequence)
            self._policy.dequeued(sequence)
        else:
            self.returning.remove(sequence)

    def candidates(self, now: float) -> Iterator[Sequence]:
        """Whom to take next, one at a time, each removed before the next is asked for."""
        while (sequence := self.returning.peek()) is not None:
            yield sequence
        yield from self._formation.candidates(now)

    def urgent(self, now: float) -> Iterator[tuple[Sequence, bool]]:
        """The new ones that may take a running one's place, and whether it is their turn: the best of each queue of
        urgency, then whom the formation would take next."""
        for queue in self._by_urgency:
            if (best := queue.peek()) is not None:
                yield best, False
        if (first := next(self._formation.candidates(now), None)) is not None:
            yield first, True

    def oldest(self) -> float | None:
        """When the first of the new requests arrived; None while there is none."""
        first = self.new.peek()
        return None if first is None else first.request.arrival_time

    def expired(self, now: float) -> Sequence | None:
        """A new request whose deadline has passed; None where there is none (any more)."""
        first = self._deadlines.first()
        return None if first is None or first[0] > now else first[1]

    def late(self, now: float) -> Sequence | None:
        """A new request that can no longer meet its targets, wherever the formation has it; None as above."""
        first = self._due.first()
        return None if first is None or first[0] >= now else first[1]

    @property
    def timed(self) -> bool:
        """Somebody may wait who has a deadline."""
        return bool(self._deadlines)

    def demote(self, sequence: Sequence) -> None:
        """Gives a late member the priority key that its policy has for late ones."""
        self._remove(sequence)
        self._policy.demote(sequence)
        self._push(sequence)

    def _push(self, sequence: Sequence) -> None:
        for queue in (self.new, self._formation, *self._by_urgency):
            queue.push(sequence)

    def _remove(self, sequence: Sequence) -> None:
        for queue in (self.new, self._formation, *self._by_urgency):
            queue.remove(sequence)
