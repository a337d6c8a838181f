"""Those that wait to run: preempted sequences in front, then new ones as the formation offers them."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from jaxserve.scheduler.formation import Formation
from jaxserve.scheduler.policy import Policy
from jaxserve.scheduler.queues import KeyedQueue
from jaxserve.scheduler.sequence import Sequence


class Waiting:
    """Members are pushed and removed; no operation looks at all of them.

    new: by arrival, those that never ran. returning: those whose pages were taken, to be computed again, in the order
    of the policy.
    """

    def __init__(self, policy: Policy, formation: Formation):
        self._policy = policy
        self._formation = formation
        self._deadlines: list[tuple[float, int, Sequence]] = []
        self.new = KeyedQueue(lambda sequence: (sequence.request.arrival_time,))
        self.returning = policy.queue()

    def __len__(self) -> int:
        return len(self.new) + len(self.returning)

    def push(self, sequence: Sequence) -> None:
        """A request that never ran."""
        self._policy.queued(sequence)
        self._push(sequence)
        if sequence.request.deadline is not None:
            heapq.heappush(self._deadlines, (sequence.request.deadline, sequence.order, sequence))
            if len(self._deadlines) > 2 * len(self.new) + 64:  # most of them wait no more
                self._deadlines = [entry for entry in self._deadlines if entry[2].waits_new]
                heapq.heapify(self._deadlines)

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

    def first_new(self, now: float) -> Sequence | None:
        """Whom the formation would take next; None where it offers nobody."""
        return next(self._formation.candidates(now), None)

    def oldest(self) -> float | None:
        """When the first of the new requests arrived; None while there is none."""
        first = self.new.peek()
        return None if first is None else first.request.arrival_time

    def expired(self, now: float) -> Sequence | None:
        """A new request whose deadline has passed; None where there is none (any more)."""
        while self._deadlines:
            deadline, _, sequence = self._deadlines[0]
            if sequence.waits_new and deadline > now:
                return None
            heapq.heappop(self._deadlines)
            if sequence.waits_new:
                return sequence
        return None

    @property
    def timed(self) -> bool:
        """Somebody may wait who has a deadline."""
        return bool(self._deadlines)

    def demote(self, sequence: Sequence) -> None:
        """Gives a late member the standing that its policy has for such."""
        self._remove(sequence)
        self._policy.demote(sequence)
        self._push(sequence)

    def _push(self, sequence: Sequence) -> None:
        self.new.push(sequence)
        self._formation.push(sequence)

    def _remove(self, sequence: Sequence) -> None:
        self.new.remove(sequence)
        self._formation.remove(sequence)
