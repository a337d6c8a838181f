"""Shares service among tenants fairly by virtual token counters.

Every tenant has a counter of the service it received, divided by its weight: prompt_token_weight a prompt token when a
request is admitted, output_token_weight an output token. The tenant of the smallest counter goes first, its own
requests in order of arrival. A tenant that comes back after a pause is lifted to the smallest counter of those that
wait, so a pause saves nothing.

Bound, without preemption: two tenants that both have requests waiting all the time differ in service by at most
    2 * max(prompt_token_weight * longest prompt, output_token_weight * tokens that the pool holds)
Source: Sheng et al., Fairness in Serving Large Language Models (OSDI 2024), algorithm 2 and theorem 4.4.
"""

from __future__ import annotations

import heapq
from collections.abc import Container

import numpy as np

from jaxserve.config.scheduling import PolicyConfig
from jaxserve.scheduler.keyed_queue import KeyedQueue, PriorityKey, Queue
from jaxserve.scheduler.policies.policy import Policy
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.step_time_estimator import StepTimeEstimator

_MAX_TENANTS = 65536
"""Number of tenants kept before those are dropped whose counters a return would lift anyway."""


class Fair(Policy):
    """Schedules the least served tenant first.

    Bound: that of the module, for tenants; within one tenant, no later request starts earlier.
    """

    counts_tokens = True
    timeless = False

    def __init__(self, config: PolicyConfig, step_times: StepTimeEstimator):
        super().__init__(config, step_times)
        self._numbers: dict[str, int] = {}
        self._unused: list[int] = []  # numbers of tenants that were forgotten
        self._unfinished: dict[str, int] = {}  # requests by tenant
        self._counters = np.zeros(64)
        self._costs = np.ones(64)  # of an output token, by tenant
        self._waiting: dict[int, int] = {}  # requests that wait, by tenant
        self._last_departed = 0.0  # counter of the tenant whose queue ran empty last
        self._heap = _TenantHeap(self)

    def priority_key(self, sequence: Sequence) -> PriorityKey:
        return (self.counter(sequence.tenant_number), *self.within_tenant(sequence))

    def within_tenant(self, sequence: Sequence) -> PriorityKey:
        """Returns the key that orders the requests of one tenant; it is fixed while the sequence waits."""
        return (sequence.order,)

    def queue(self) -> Queue:
        return _FairQueue(self)

    def counter(self, tenant: int) -> float:
        return float(self._counters[tenant])

    def service(self, tenant: str) -> float:
        """Returns the counter of a tenant; 0 if it was never seen."""
        number = self._numbers.get(tenant)
        return 0.0 if number is None else self.counter(number)

    def queued(self, sequence: Sequence) -> None:
        tenant, name = sequence.tenant_number, sequence.request.options.tenant
        self._unfinished[name] = self._unfinished.get(name, 0) + 1
        if tenant not in self._waiting:
            least = self._heap.least(self._waiting)
            floor = self._last_departed if least is None else self.counter(least)
            self._counters[tenant] = max(self._counters[tenant], floor)
            self._heap.push(tenant)
        self._waiting[tenant] = self._waiting.get(tenant, 0) + 1

    def dequeued(self, sequence: Sequence) -> None:
        tenant = sequence.tenant_number
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            del self._waiting[tenant]
            self._last_departed = self.counter(tenant)

    def admitted(self, sequence: Sequence) -> None:
        cost = self.config.prompt_token_weight / self._weight(sequence.request.options.tenant)
        computed = sequence.num_computed  # of its prompt, for another sample of it
        self._counters[sequence.tenant_number] += cost * (sequence.num_prompt_tokens - computed)

    def decoded(self, tenants: np.ndarray, times: int = 1) -> None:
        np.add.at(self._counters, tenants, self._costs[tenants] * times)

    def ended(self, sequence: Sequence) -> None:
        name = sequence.request.options.tenant
        self._unfinished[name] -= 1
        if not self._unfinished[name]:
            del self._unfinished[name]

    def tenant_number(self, tenant: str) -> int:
        number = self._numbers.get(tenant)
        if number is None:
            if len(self._numbers) >= _MAX_TENANTS and not self._unused:
                self._forget()
            number = self._unused.pop() if self._unused else len(self._numbers)
            self._numbers[tenant] = number
            if number >= len(self._counters):
                self._counters = np.concatenate([self._counters, np.zeros(len(self._counters))])
                self._costs = np.concatenate([self._costs, np.ones(len(self._costs))])
            self._costs[number] = self.config.output_token_weight / self._weight(tenant)
        return number

    def _forget(self) -> None:
        """Drops tenants without requests whose counters a return would lift.

        Their numbers may be reused: a counter that begins where theirs ended is no more than a new tenant's.
        """
        least = self._heap.least(self._waiting)
        floor = self._last_departed if least is None else self.counter(least)
        for tenant, number in list(self._numbers.items()):
            if tenant not in self._unfinished and self.counter(number) <= floor:
                del self._numbers[tenant]
                self._unused.append(number)

    def _weight(self, tenant: str) -> float:
        return self.config.tenant_weights.get(tenant, 1.0)


class _TenantHeap:
    """Orders tenants by counter. Counters only grow, so an entry with an outdated counter is moved when it reaches the
    top."""

    def __init__(self, policy: Fair):
        self._policy = policy
        self._heap: list[tuple[float, int]] = []
        self._members: set[int] = set()

    def push(self, tenant: int) -> None:
        if tenant not in self._members:
            self._members.add(tenant)
            heapq.heappush(self._heap, (self._policy.counter(tenant), tenant))

    def least(self, waiting: Container[int]) -> int | None:
        """Returns the tenant in `waiting` with the smallest counter; entries of others are dropped."""
        while self._heap:
            counter, tenant = self._heap[0]
            if tenant not in waiting:
                heapq.heappop(self._heap)
                self._members.remove(tenant)
            elif counter < self._policy.counter(tenant):
                heapq.heapreplace(self._heap, (self._policy.counter(tenant), tenant))
            else:
                return tenant
        return None


class _FairQueue(Queue):
    """Keeps a queue for each tenant, and serves the least served tenant's first."""

    def __init__(self, policy: Fair):
        self._policy = policy
        self._queues: dict[int, KeyedQueue] = {}
        self._tenants = _TenantHeap(policy)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, sequence: Sequence) -> None:
        tenant = sequence.tenant_number
        if tenant not in self._queues:
            self._queues[tenant] = KeyedQueue(self._policy.within_tenant)
        self._queues[tenant].push(sequence)
        self._tenants.push(tenant)
        self._length += 1

    def remove(self, sequence: Sequence) -> None:
        queue = self._queues[sequence.tenant_number]
        queue.remove(sequence)
        if not queue:
            del self._queues[sequence.tenant_number]
        self._length -= 1

    def peek(self) -> Sequence | None:
        tenant = self._tenants.least(self._queues)
        return None if tenant is None else self._queues[tenant].peek()

    def rank(self) -> PriorityKey:
        best = self.peek()
        assert best is not None, "an empty queue has no rank"
        return self._policy.priority_key(best)
