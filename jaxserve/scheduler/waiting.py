"""Keeps the waiting sequences: preempted ones in front, then new ones in admission order. Those that lack a penalty row
are set aside (`park`)."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from jaxserve.scheduler.admission_order import AdmissionOrder
from jaxserve.scheduler.deadline_check import DeadlineCheck
from jaxserve.scheduler.keyed_queue import KeyedQueue
from jaxserve.scheduler.parking_queue import ParkingQueue
from jaxserve.scheduler.policies.policy import Policy
from jaxserve.scheduler.prefix_cache import PrefixCache
from jaxserve.scheduler.sequence import Sequence


class _Times:
    """Orders new requests by a time of each.

    Entries of requests that no longer wait, or were demoted, are dropped when they reach the top.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, moment: float, sequence: Sequence, waiting: int) -> None:
        """Adds an entry.

        Args:
            moment: the time to order by.
            sequence: the request.
            waiting: number of waiting requests, which bounds the stale entries kept.
        """
        heapq.heappush(self._heap, (moment, sequence.order, sequence))
        if len(self._heap) > 2 * waiting + 64:
            self._heap = [entry for entry in self._heap if entry[2].waits_new]
            heapq.heapify(self._heap)

    def replace_first(self, moment: float) -> None:
        """Gives the request that `first` returned another time."""
        _, order, sequence = self._heap[0]
        heapq.heapreplace(self._heap, (moment, order, sequence))

    def first(self) -> tuple[float, Sequence] | None:
        while self._heap:
            moment, _, sequence = self._heap[0]
            if sequence.waits_new and not sequence.lateness:
                return moment, sequence
            heapq.heappop(self._heap)
        return None


class Waiting:
    """Indexes the waiting sequences; no operation scans all of them.

    new: requests that never ran, by arrival. returning: preempted sequences to be recomputed, in the policy's order.
    num_withheld: requests that never ran and are in no queue, since another computes their prompt.
    by_urgency, parked_by_urgency: queues of new requests, and of those that are parked; the best of each is the first
    to preempt a running sequence.
    """

    def __init__(
        self,
        policy: Policy,
        formation: AdmissionOrder,
        by_urgency: tuple[KeyedQueue, ...],
        parked_by_urgency: tuple[KeyedQueue, ...],
        deadline_check: DeadlineCheck,
        prefix_cache: PrefixCache,
    ):
        self._policy = policy
        self._prefix_cache = prefix_cache
        self._deadline_check = deadline_check
        self._formation = formation
        self._deadlines = _Times()
        self._due = _Times()
        self.new = KeyedQueue(lambda sequence: (sequence.request.arrival_time,))
        self.returning = ParkingQueue(policy.queue)
        self._parked = policy.queue()
        self._by_urgency = by_urgency
        self._parked_by_urgency = parked_by_urgency
        self.num_withheld = 0

    def __len__(self) -> int:
        return len(self.new) + len(self.returning)

    def push(self, sequence: Sequence) -> None:
        """Adds a request that never ran."""
        self._policy.queued(sequence)
        self._enter(sequence)

    def push_withheld(self, sequence: Sequence) -> None:
        """Adds a request that never ran, and withholds it."""
        self._policy.queued(sequence)
        self._count_withheld(sequence)

    def withhold(self, sequence: Sequence) -> None:
        """Takes a request that never ran out of the queues; it goes on waiting."""
        self._remove(sequence)
        self._count_withheld(sequence)

    def offer(self, sequence: Sequence) -> None:
        """Puts a withheld request into the queues."""
        sequence.withheld = False
        self.num_withheld -= 1
        self._enter(sequence)

    def _count_withheld(self, sequence: Sequence) -> None:
        sequence.withheld = True
        self.num_withheld += 1

    def _enter(self, sequence: Sequence) -> None:
        self._push(sequence)
        if sequence.request.options.deadline is not None:
            self._deadlines.push(sequence.request.options.deadline, sequence, len(self.new))
        if self._policy.clocked:
            self._due.push(self._policy.due(sequence), sequence, len(self.new))
        elif (start_by := self._deadline_check.start_by(sequence)) is not None:
            self._due.push(start_by, sequence, len(self.new))

    def push_back(self, sequence: Sequence) -> None:
        """Adds a preempted sequence, in front of new ones."""
        self.returning.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Removes a member that now runs or has ended."""
        if sequence.withheld:
            sequence.withheld = False
            self.num_withheld -= 1
            self._policy.dequeued(sequence)
        elif sequence.waits_new:
            self._remove(sequence)
            self._policy.dequeued(sequence)
        else:
            self.returning.remove(sequence)

    def park(self, sequence: Sequence) -> None:
        """Sets a member aside until a penalty row is free."""
        if not sequence.waits_new:
            self.returning.park(sequence)
            return
        for queue in (self._formation, *self._by_urgency):
            queue.remove(sequence)
        for queue in (self._parked, *self._parked_by_urgency):
            queue.push(sequence)
        sequence.parked = True

    def unpark(self) -> bool:
        """Offers the best new request that is parked again; returns whether there was one."""
        sequence = self._parked.peek()
        if sequence is None:
            return False
        self._remove(sequence)
        self._push(sequence)
        return True

    def candidates(self, now: float) -> Iterator[Sequence]:
        """Yields the next sequence to admit, repeatedly; each must be removed before the next is requested."""
        while (sequence := self.returning.peek()) is not None:
            yield sequence
        yield from self._formation.candidates(now)

    def urgent(self, now: float) -> Iterator[tuple[Sequence, bool]]:
        """Yields the new requests that may preempt a running sequence, each with whether it is first in turn.

        The best of each urgency queue comes first, then the next in admission order.
        """
        for queue in (*self._by_urgency, *self._parked_by_urgency):
            if (best := queue.peek()) is not None:
                yield best, False
        if (first := next(self._formation.candidates(now), None)) is not None:
            yield first, True

    def oldest(self) -> float | None:
        """Returns the arrival time of the oldest new request; None when there is none."""
        first = self.new.peek()
        return None if first is None else first.request.arrival_time

    def expired(self, now: float) -> Sequence | None:
        """Returns a new request whose deadline has passed, or None."""
        first = self._deadlines.first()
        return None if first is None or first[0] > now else first[1]

    def late(self, now: float) -> Sequence | None:
        """Returns a new request that can no longer meet its deadline or its targets, or None."""
        while (first := self._due.first()) is not None and first[0] < now:
            start_by = None if self._policy.clocked else self._postponed(first[1])
            if start_by is None or start_by < now:
                return first[1]
            self._due.replace_first(start_by)
        return None

    def _postponed(self, sequence: Sequence) -> float | None:
        """Returns until when a request must start that finds more in the prefix cache than when it arrived."""
        if not self._policy.matches_prefixes:  # those that do keep it up to date, and order by it
            sequence.num_found = self._prefix_cache.num_tokens(self._prefix_cache.find(sequence))
        return self._deadline_check.start_by(sequence)

    @property
    def timed(self) -> bool:
        """Tells whether a waiting request may have a deadline."""
        return bool(self._deadlines)

    def demote(self, sequence: Sequence) -> None:
        """Gives a late member the priority key that its policy assigns to late ones."""
        if sequence.withheld:
            self._policy.demote(sequence)
            return
        self._remove(sequence)
        self._policy.demote(sequence)
        self._push(sequence)

    def reorder(self, sequence: Sequence, change: Callable[[Sequence], None]) -> None:
        """Changes what decides the priority key of a request that never ran."""
        if sequence.withheld:
            change(sequence)
            return
        parked = sequence.parked
        self._remove(sequence)
        change(sequence)
        self._push(sequence)
        if parked:
            self.park(sequence)

    def _push(self, sequence: Sequence) -> None:
        for queue in (self.new, self._formation, *self._by_urgency):
            queue.push(sequence)

    def _remove(self, sequence: Sequence) -> None:
        offering = (self._parked, *self._parked_by_urgency) if sequence.parked else (self._formation, *self._by_urgency)
        for queue in (self.new, *offering):
            queue.remove(sequence)
        sequence.parked = False
