"""Who may join a step before whom, by brute force over all that wait: policies, formations, and the bounds that they
state."""

from __future__ import annotations

import math

from jaxserve.config.scheduling import SchedulerConfig
from jaxserve.scheduler import StepPlan
from jaxserve.scheduler.policies.named import LATE_FACTOR
from jaxserve.scheduler.policies.policy import Policy
from jaxserve.scheduler.sequence import Sequence

FAIR = ("fair", "longest-prefix-match")


class OrderModel:
    """The new requests that wait, as a plain list, and the counters of tenants as a plain dict.

    Asserts for every request that joins that the policy and the formation let it go before all that wait on, and that
    the bounds that their classes state hold against each of them. passed: how often one joined past another that the
    policy would never have let wait for it.
    """

    def __init__(self, config: SchedulerConfig, policy: Policy):
        self._config = config
        self._policy = policy
        self._waiting: list[Sequence] = []
        self._counters: dict[str, float] = {}
        self._last_departed = 0.0
        self._tenant_of: dict[str, str] = {}
        self.passed = 0

    @property
    def _offered(self) -> list[Sequence]:
        """Those that wait for their turn, and not for a prefix that another computes."""
        return [one for one in self._waiting if not one.withheld]

    def add(self, sequence: Sequence) -> None:
        tenant = sequence.request.options.tenant
        self._tenant_of[sequence.request_id] = tenant
        if all(one.request.options.tenant != tenant for one in self._waiting):
            waiting = {one.request.options.tenant for one in self._waiting}
            floor = min((self._counters[one] for one in waiting), default=self._last_departed)
            self._counters[tenant] = max(self._counters.get(tenant, 0.0), floor)
        self._waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """It waits no more, if it did."""
        if sequence not in self._waiting:
            return
        self._waiting.remove(sequence)
        tenant = sequence.request.options.tenant
        if all(one.request.options.tenant != tenant for one in self._waiting):
            self._last_departed = self._counters[tenant]

    def step(
        self, admitted: list[Sequence], plan: StepPlan | None, now: float, ran: list[Sequence], away: list[Sequence]
    ) -> int:
        """Checks who joined, in order; returns how many of them were new. Counts the tokens of the step.

        ran: those that ran when the step was made. away: those that were swapped or preempted
        before it, if it did not bring all of them back.
        """
        joined: list[Sequence] = []
        displaced = False  # one may take the place of another in a step
        for sequence in admitted:
            if sequence not in self._waiting:
                continue  # it ran before
            if away:
                assert any(self._far_better(sequence, one) for one in away), "it passed all that have run before"
            try:
                self._check_formation(sequence, joined, now)
                if self._config.mode != "dynamic":
                    self._check_bounds(sequence, joined, now)
            except AssertionError:
                if displaced or not self._may_displace(sequence, ran):
                    raise
                displaced = True
            tenant = sequence.request.options.tenant
            computed = sequence.num_prompt_tokens - sequence.num_cached_tokens
            self._counters[tenant] += computed * self._cost(tenant, output=False)
            self.remove(sequence)
            joined.append(sequence)
        for row in plan.sampled if plan is not None else ():
            tenant = self._tenant_of[row.request_id]
            self._counters[tenant] += self._cost(tenant, output=True)
        if self._config.policy in FAIR:
            for tenant, counter in self._counters.items():
                assert self._policy.service(tenant) == counter, "service is counted wrong"  # pyright: ignore[reportAttributeAccessIssue]
        return len(joined)

    def _may_displace(self, sequence: Sequence, ran: list[Sequence]) -> bool:
        """Whether it may have taken the place of one that ran, before all others that wait."""
        config = self._config.preemption
        if not any(self._far_better(sequence, one) for one in ran):
            return False
        highest = all(one.priority <= sequence.priority for one in self._offered)
        shortest = all(one.expected_length >= sequence.expected_length for one in self._offered)
        by_priority = config.preempt_priority_gap is not None and highest
        return by_priority or (config.preempt_length_ratio is not None and shortest)

    def _far_better(self, sequence: Sequence, other: Sequence) -> bool:
        gap, ratio = self._config.preemption.preempt_priority_gap, self._config.preemption.preempt_length_ratio
        if gap is not None and sequence.priority - other.request.options.priority > gap:
            return True  # before what preemptions have added to the other's
        return ratio is not None and sequence.expected_length * ratio <= other.expected_length

    def _cost(self, tenant: str, output: bool) -> float:
        ordering = self._config.ordering
        cost = ordering.output_token_weight if output else ordering.prompt_token_weight
        return cost / ordering.tenant_weights.get(tenant, 1.0)

    def _key(self, sequence: Sequence) -> float:
        """What the policy orders by; the order of arrival decides between equals."""
        config, request = self._config.ordering, sequence.request
        match self._config.policy:
            case "fcfs":
                return 0.0
            case "sjf":
                return sequence.expected_output + config.sjf_ageing * request.arrival_time
            case "priority":
                waited = -request.arrival_time  # the clock is the same for all
                return -(10 * sequence.priority + 0.1 * waited - sequence.expected_output)
            case "fair" | "longest-prefix-match":
                return self._counters[request.options.tenant]
            case "deadline":
                assert sequence.start_by is not None
                return sequence.start_by + sequence.lateness
        raise AssertionError(self._config.policy)

    def _within_tenant(self, sequence: Sequence) -> tuple[float, int]:
        """What orders the requests of a tenant whose turn it is."""
        if self._config.policy == "fair":
            return 0.0, sequence.order
        share = sequence.num_found / sequence.num_prompt_tokens
        return sequence.request.arrival_time - self._config.ordering.prefix_match_seconds * share, sequence.order

    def _firsts(self, members: list[Sequence]) -> list[Sequence]:
        """The first of the queue; several where tenants are served alike."""
        if self._config.policy not in FAIR:
            return [min(members, key=lambda one: (self._key(one), one.order))]
        least = min(map(self._key, members))
        oldest: dict[str, Sequence] = {}
        for one in sorted(members, key=self._within_tenant):
            if self._key(one) == least:
                oldest.setdefault(one.request.options.tenant, one)
        return list(oldest.values())

    def _check_formation(self, sequence: Sequence, joined: list[Sequence], now: float) -> None:
        if self._config.mode == "dynamic":
            self._check_bucket(sequence, joined, now)
            return
        firsts = self._firsts(self._offered)
        formation = self._config.formation
        if formation == "greedy":
            assert sequence in firsts, "it is not the first of the queue"
            return
        if formation == "length_balanced":
            assert sequence in firsts or any(self._near(sequence, one) for one in joined), "its length does not fit"
            assert joined or sequence in firsts, "a step begins with the first of the queue"
            return
        patience = self._config.admission.max_passed_over_seconds
        overdue = [now - first.request.arrival_time > patience for first in firsts]
        if all(overdue):
            assert sequence in firsts, "the first of the queue was passed over for too long"
        if any(overdue) and sequence in firsts:
            return
        if formation == "priority":
            highest = max(one.priority for one in self._offered)
            level = [one for one in self._offered if one.priority == highest]
            assert sequence in self._firsts(level), "it is not the first of the highest priority"
        elif formation == "hybrid":
            highest = max(_tier(one.priority) for one in self._offered)
            level = [one for one in self._offered if _tier(one.priority) == highest]
            near = [one for one in joined if _tier(one.priority) == highest and self._near(sequence, one)]
            assert sequence in level, "it is not of the highest tier"
            assert near or sequence in self._firsts(level), "its length does not fit its tier"
        else:
            least = min(one.num_prompt_tokens + one.expected_output for one in self._offered)
            assert sequence.num_prompt_tokens + sequence.expected_output == least, "another is smaller"

    def _near(self, sequence: Sequence, anchor: Sequence) -> bool:
        allowed = self._config.admission.length_tolerance * anchor.num_prompt_tokens
        return abs(sequence.num_prompt_tokens - anchor.num_prompt_tokens) <= allowed + 1e-9

    def _check_bucket(self, sequence: Sequence, joined: list[Sequence], now: float) -> None:
        """One bucket a batch, in the policy's order; nobody who has waited max_wait_seconds sees a batch start whose
        members all came later."""
        bucket = [one for one in self._offered if self._bucket(one) == self._bucket(sequence)]
        assert sequence in self._firsts(bucket), "it is not the first of its bucket"
        if joined:
            assert self._bucket(joined[0]) == self._bucket(sequence), "a batch of two buckets"
            return
        oldest = min(one.request.arrival_time for one in bucket)
        wait = self._config.batching.max_wait_seconds
        limit = min(self._config.batching.batch_size, self._config.max_num_seqs)
        assert len(bucket) >= limit or now >= oldest + wait, "the bucket is neither full nor timed out"
        for other in self._offered:
            if now >= other.request.arrival_time + wait:
                assert oldest <= other.request.arrival_time, "a bucket that timed out was passed over"

    def _bucket(self, sequence: Sequence) -> int:
        size = self._config.batching.length_bucket
        return (sequence.num_prompt_tokens + size - 1) // size

    def _check_bounds(self, joins: Sequence, joined: list[Sequence], now: float) -> None:
        """What the classes of policy and formation state together, for all that wait on while one joins."""
        formation, others = self._config.formation, [one for one in self._offered if one is not joins]
        if formation == "greedy" or (formation == "length_balanced" and not joined):
            for waits in others:  # it is the first of the queue
                assert _later(joins, waits) <= self._may_be_later(joins, waits), "the policy's bound is broken"
        elif formation != "length_balanced":
            patience = self._config.admission.max_passed_over_seconds
            firsts = self._firsts(self._offered)
            for waits in others:
                if _later(joins, waits) <= self._may_be_later(joins, waits):
                    continue  # the policy lets it go first
                self.passed += 1
                # Who is first stands before `waits` by the policy, and holds it up for as long as it is patient.
                before = max(self._may_be_later(first, waits) for first in firsts)
                waited = now - waits.request.arrival_time
                assert waited <= before + patience + 1e-6, "it was passed over for too long"

    def _may_be_later(self, joins: Sequence, waits: Sequence) -> float:
        """The bound that the class of the policy states: seconds by which one may come later and yet join before one
        that waits on; inf is none."""
        config = self._config.ordering
        match self._config.policy:
            case "fcfs":
                return 0.0
            case "sjf":
                return (waits.expected_output - joins.expected_output) / config.sjf_ageing + 1e-6
            case "priority":
                gain = 10 * (joins.priority - waits.priority) + waits.expected_output - joins.expected_output
                return gain / 0.1 + 1e-6
            case "longest-prefix-match" if joins.request.options.tenant == waits.request.options.tenant:
                return config.prefix_match_seconds + 1e-6
            case "fair":
                return 0.0 if joins.request.options.tenant == waits.request.options.tenant else math.inf
            case "deadline" if joins.request.options.deadline is None and waits.request.options.deadline is None:
                assert joins.start_by is not None
                assert waits.start_by is not None
                prefill = waits.request.arrival_time + config.ttft_target - waits.start_by
                own = joins.request.arrival_time + config.ttft_target - joins.start_by
                return LATE_FACTOR * config.ttft_target + own - prefill + 1e-6
        return math.inf


def _later(joins: Sequence, waits: Sequence) -> float:
    return joins.request.arrival_time - waits.request.arrival_time


def _tier(priority: int) -> int:
    return 2 if priority >= 8 else 1 if priority >= 4 else 0
