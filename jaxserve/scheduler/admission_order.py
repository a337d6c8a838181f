"""Implements admission orders: the order in which waiting sequences are offered to a step.

`candidates` offers one sequence at a time; the step takes it (and `remove`s it) or is done. The queue is in the
policy's order; an admission order departs from it to batch requests that fit together. One that may pass over the head
of the queue does so for at most max_passed_over_seconds. The wait of a request is therefore bounded by the policy's
bound plus max_passed_over_seconds for each request ahead of it.

Every operation takes at most logarithmic time in the number of waiting requests.
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
"""Number of length classes per tolerance: classes are this much finer."""


class AdmissionOrder(ABC):
    """Indexes waiting sequences and offers them to a step one by one."""

    @abstractmethod
    def push(self, sequence: Sequence) -> None: ...

    @abstractmethod
    def remove(self, sequence: Sequence) -> None: ...

    @abstractmethod
    def candidates(self, now: float) -> Iterator[Sequence]:
        """Yields the next sequence to admit, repeatedly; each must be removed before the next is requested."""


class Greedy(AdmissionOrder):
    """Offers sequences in queue order."""

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
    """Offers the head of the queue, then sequences of similar prompt length (within length_tolerance), then the next
    head.

    Each round begins with the head of the queue, so a sequence is passed over by at most as many rounds as there were
    sequences ahead of it.
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
        """Returns the first by policy of the sequences within the tolerance. Of a class that the tolerance cuts, only
        the best member is considered; the others follow when it has left."""
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
    """Departs from the queue's order for a bounded time, as the module's docstring says."""

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
        """Yields all members, the preferred ones first."""


class _Levels(_Guarded):
    """Offers the highest level first, and within a level the candidates of an inner admission order."""

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
    """Offers the highest priority first."""

    def __init__(self, policy: Policy, config: SchedulerConfig):
        super().__init__(policy, config, lambda sequence: sequence.priority, Greedy)


class Hybrid(_Levels):
    """Offers three tiers of priority (8 and above, 4 to 7, below 4), balanced by length within a tier."""

    def __init__(self, policy: Policy, config: SchedulerConfig):
        super().__init__(policy, config, lambda sequence: tier(sequence.priority), LengthBalanced)


class ThroughputAware(_Guarded):
    """Offers the smallest sum of prompt and expected output first, so that more requests fit into the same memory."""

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
    """Offers prompts of one length bucket (a multiple of length_bucket) once the bucket is ready.

    A bucket is ready when it has batch_size requests (or as many as can run), or when its oldest has waited
    max_wait_seconds. Among ready buckets, the one whose oldest member has waited longest goes first.
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
        """Returns the time at which the next bucket is ready, on the clock of arrival times; None while no request
        waits."""
        return min((self._ready_at(number) for number in self._buckets), default=None)

    def ready_size(self, now: float) -> int:
        """Returns the batch size of the bucket that runs next; 0 when none is ready."""
        queue = self._ready(now)
        return 0 if queue is None else min(len(queue), self._size)

    def candidates(self, now: float) -> Iterator[Sequence]:
        queue = self._ready(now)
        while queue is not None and (first := queue.peek()) is not None:
            yield first

    def _ready(self, now: float) -> Queue | None:
        """Returns the ready bucket whose oldest member has waited longest, or None."""
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
    """Returns the tier of a priority: 2 from 8 on, 1 from 4 to 7, 0 below."""
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
