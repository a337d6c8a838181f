"""Formation of the batch: in which order those that wait are offered to a step.

`candidates` offers one sequence at a time; the step takes it (and `remove`s it) or is done. The order of the queue is
the policy's; a formation departs from it to put together what fits together. A formation other than greedy that may
pass over the first of the queue does so for max_passed_over_seconds at most: then the first goes first. So the wait of
a request has a bound whatever the formation: that of the policy, and max_passed_over_seconds for each one before it.

Nothing here costs time in the number of those that wait, beyond the logarithm of a heap.
"""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

from jaxserve.config.scheduling import SchedulerConfig
from jaxserve.scheduler.keyed_queue import KeyedQueue, Queue
from jaxserve.scheduler.policies.policy import Policy
from jaxserve.scheduler.sequence import Sequence

_CLASSES_PER_TOLERANCE = 4
"""Length classes are so many times finer than the tolerance."""


class AdmissionOrder(ABC):
    """An index of those that wait."""

    @abstractmethod
    def push(self, sequence: Sequence) -> None: ...

    @abstractmethod
    def remove(self, sequence: Sequence) -> None: ...

    @abstractmethod
    def candidates(self, now: float) -> Iterator[Sequence]:
        """The next one to take, again and again; each must be removed before the next is asked for."""


class Greedy(AdmissionOrder):
    """In the order of the queue."""

    def __init__(self, policy: Policy, config: SchedulerConfig):
        self._queue = policy.queue()

    def push(self, sequence: Sequence) -> None:
        self._queue.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        self._queue.remove(sequence)

    def candidates(self, now: float) -> Iterator[Sequence]:
        while (first := self._queue.peek()) is not None:
            yield first


class LengthBalanced(AdmissionOrder):
    """The first of the queue, those whose prompts are as long (within length_tolerance), then the next first.

    Each round begins with the first of the queue, so none can be passed over by more rounds than were before it.
    """

    def __init__(self, policy: Policy, config: SchedulerConfig):
        self._policy = policy
        self._tolerance = config.admission.length_tolerance
        self._ratio = math.log1p(max(self._tolerance, 0.01) / _CLASSES_PER_TOLERANCE)
        self._queue = policy.queue()
        self._classes: dict[int, Queue] = {}

    def push(self, sequence: Sequence) -> None:
        self._queue.push(sequence)
        number = self._class(sequence.num_prompt_tokens)
        if number not in self._classes:
            self._classes[number] = self._policy.queue()
        self._classes[number].push(sequence)

    def remove(self, sequence: Sequence) -> None:
        self._queue.remove(sequence)
        number = self._class(sequence.num_prompt_tokens)
        self._classes[number].remove(sequence)
        if not self._classes[number]:
            del self._classes[number]

    def candidates(self, now: float) -> Iterator[Sequence]:
        while (anchor := self._queue.peek()) is not None:
            length = anchor.num_prompt_tokens
            yield anchor
            while (near := self._near(length)) is not None:
                yield near

    def _near(self, length: int) -> Sequence | None:
        """The best of those within the tolerance. Of a class that the tolerance cuts, only the best member counts:
        the others are looked at when it has gone."""
        low, high = length * (1 - self._tolerance), length * (1 + self._tolerance)
        best: Queue | None = None
        for number in range(self._class(low), self._class(high) + 1):
            queue = self._classes.get(number)
            first = None if queue is None else queue.peek()
            if queue is None or first is None or not low <= first.num_prompt_tokens <= high:
                continue
            if best is None or queue.rank() < best.rank():
                best = queue
        return None if best is None else best.peek()

    def _class(self, length: float) -> int:
        return math.floor(math.log(max(length, 1.0)) / self._ratio)


class _Guarded(AdmissionOrder):
    """Departs from the queue's order, but not for long: see the module."""

    def __init__(self, policy: Policy, config: SchedulerConfig):
        self._queue = policy.queue()
        self._patience = config.admission.max_passed_over_seconds

    def push(self, sequence: Sequence) -> None:
        self._queue.push(sequence)
        self._push(sequence)

    def remove(self, sequence: Sequence) -> None:
        self._queue.remove(sequence)
        self._remove(sequence)

    def candidates(self, now: float) -> Iterator[Sequence]:
        preferred = self._candidates(now)
        while (first := self._queue.peek()) is not None:
            if now - first.request.arrival_time > self._patience:
                yield first
                preferred = self._candidates(now)
            else:
                yield next(preferred)

    @abstractmethod
    def _push(self, sequence: Sequence) -> None: ...

    @abstractmethod
    def _remove(self, sequence: Sequence) -> None: ...

    @abstractmethod
    def _candidates(self, now: float) -> Iterator[Sequence]:
        """All members, the preferred ones first."""


class _Levels(_Guarded):
    """The highest level first, and of each what a formation of its own offers."""

    def __init__(
        self,
        policy: Policy,
        config: SchedulerConfig,
        level: Callable[[Sequence], int],
        inner: Callable[[Policy, SchedulerConfig], AdmissionOrder],
    ):
        super().__init__(policy, config)
        self._level = level
        self._make = lambda: inner(policy, config)
        self._members: dict[int, AdmissionOrder] = {}
        self._sizes: dict[int, int] = {}
        self._rising: list[int] = []  # levels in use

    def _push(self, sequence: Sequence) -> None:
        level = self._level(sequence)
        if level not in self._members:
            self._members[level], self._sizes[level] = self._make(), 0
            bisect.insort(self._rising, level)
        self._members[level].push(sequence)
        self._sizes[level] += 1

    def _remove(self, sequence: Sequence) -> None:
        level = self._level(sequence)
        self._members[level].remove(sequence)
        self._sizes[level] -= 1
        if not self._sizes[level]:
            del self._members[level], self._sizes[level]
            self._rising.remove(level)

    def _candidates(self, now: float) -> Iterator[Sequence]:
        while self._rising:
            yield from self._members[self._rising[-1]].candidates(now)


class PriorityFirst(_Levels):
    """The highest priority first."""

    def __init__(self, policy: Policy, config: SchedulerConfig):
        super().__init__(policy, config, lambda sequence: sequence.priority, Greedy)


class Hybrid(_Levels):
    """Three tiers of priority (8 and above, 4 to 7, below 4), balanced by length inside a tier."""

    def __init__(self, policy: Policy, config: SchedulerConfig):
        super().__init__(policy, config, lambda sequence: tier(sequence.priority), LengthBalanced)


class ThroughputAware(_Guarded):
    """The smallest prompt and expected output first: more requests fit into the same memory."""

    def __init__(self, policy: Policy, config: SchedulerConfig):
        super().__init__(policy, config)
        self._small = KeyedQueue(lambda sequence: (sequence.num_prompt_tokens + sequence.expected_output,))

    def _push(self, sequence: Sequence) -> None:
        self._small.push(sequence)

    def _remove(self, sequence: Sequence) -> None:
        self._small.remove(sequence)

    def _candidates(self, now: float) -> Iterator[Sequence]:
        while (first := self._small.peek()) is not None:
            yield first


class LengthBuckets(AdmissionOrder):
    """Prompts of one multiple of length_bucket, once there are batch_size (or as many as can run) or the oldest has
    waited max_wait_seconds.

    Of several buckets that are ready, the one whose oldest member has waited longest.
    """

    def __init__(self, policy: Policy, config: SchedulerConfig):
        self._policy = policy
        self._batching = config.batching
        self._size = min(config.batching.batch_size, config.max_num_seqs)
        self._buckets: dict[int, tuple[Queue, KeyedQueue]] = {}  # in the policy's order, and by arrival

    def push(self, sequence: Sequence) -> None:
        number = self._bucket(sequence)
        if number not in self._buckets:
            self._buckets[number] = self._policy.queue(), KeyedQueue(_arrival)
        for queue in self._buckets[number]:
            queue.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        number = self._bucket(sequence)
        for queue in self._buckets[number]:
            queue.remove(sequence)
        if not self._buckets[number][0]:
            del self._buckets[number]

    def ready_at(self) -> float | None:
        """When the next bucket is ready, by the clock of arrival times; None while none waits."""
        return min((self._ready_at(number) for number in self._buckets), default=None)

    def ready_size(self, now: float) -> int:
        """How many wait in the bucket that runs next, and run in one batch at most; 0 where none is ready."""
        queue = self._ready(now)
        return 0 if queue is None else min(len(queue), self._size)

    def candidates(self, now: float) -> Iterator[Sequence]:
        queue = self._ready(now)
        while queue is not None and (first := queue.peek()) is not None:
            yield first

    def _ready(self, now: float) -> Queue | None:
        """Of the buckets that are ready, the one whose oldest member waits longest."""
        ready = [pair for number, pair in self._buckets.items() if self._ready_at(number) <= now]
        return min(ready, key=lambda pair: pair[1].rank())[0] if ready else None

    def _ready_at(self, number: int) -> float:
        queue, by_arrival = self._buckets[number]
        if len(queue) >= self._size:
            return -math.inf
        oldest = by_arrival.peek()
        assert oldest is not None
        return oldest.request.arrival_time + self._batching.max_wait_seconds

    def _bucket(self, sequence: Sequence) -> int:
        return -(-sequence.num_prompt_tokens // self._batching.length_bucket)


def tier(priority: int) -> int:
    """The tier of a priority: 2 from 8 on, 1 from 4 to 7, 0 below."""
    return 2 if priority >= 8 else 1 if priority >= 4 else 0


def _arrival(sequence: Sequence) -> tuple[float, ...]:
    return (sequence.request.arrival_time, sequence.order)


FORMATIONS: dict[str, Callable[[Policy, SchedulerConfig], AdmissionOrder]] = {
    "greedy": Greedy,
    "length_balanced": LengthBalanced,
    "priority": PriorityFirst,
    "hybrid": Hybrid,
    "throughput": ThroughputAware,
}
