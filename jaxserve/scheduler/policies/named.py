"""Implements the policies and maps their names in the settings.

Each class states the bound of a request's wait: which requests can start before it although they arrived later.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxserve.config.scheduling import PolicyConfig
from jaxserve.scheduler.keyed_queue import PriorityKey
from jaxserve.scheduler.policies.fair import Fair
from jaxserve.scheduler.policies.policy import Policy
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.step_time_estimator import StepTimeEstimator

LATE_FACTOR = 10
"""Multiple of ttft_target by which the due time of a late request is postponed."""


class FirstComeFirstServed(Policy):
    """Orders by arrival.

    Bound: no request that arrived later starts earlier.
    """

    def priority_key(self, sequence: Sequence) -> PriorityKey:
        return (sequence.order,)


class ShortestJobFirst(Policy):
    """Orders by expected output, less sjf_ageing tokens for each second of waiting.

    Bound: a request that arrived at least (own expectation - its expectation) / sjf_ageing seconds later starts after
    it.
    """

    def priority_key(self, sequence: Sequence) -> PriorityKey:
        return (sequence.expected_output + self.config.sjf_ageing * sequence.request.arrival_time, sequence.order)


class HighestPriorityFirst(Policy):
    """Orders by priority_weight * priority + priority_ageing * seconds waited - priority_length_weight * expected
    output.

    Bound: a request that arrived at least (difference of the other two terms) / priority_ageing seconds later starts
    after it.
    """

    def priority_key(self, sequence: Sequence) -> PriorityKey:
        config = self.config
        score = (
            config.priority_weight * sequence.priority
            - config.priority_ageing * sequence.request.arrival_time
            - config.priority_length_weight * sequence.expected_output
        )
        return (-score, sequence.order)


class EarliestDeadlineFirst(Policy):
    """Orders by the time at which a request must start to meet its deadline, or else the targets.

    The targets: the first token ttft_target after arrival, and one every tpot_target after it. Where steps take longer
    than tpot_target, a request must start sooner by what its expected output falls behind, and may be late from the
    start. A request that is late is due LATE_FACTOR * ttft_target later, among the others. Bound: a request that is due
    later starts after it; with equal targets, one that arrived later by at least LATE_FACTOR * ttft_target, the longest
    prefill and the most that an output falls behind.
    """

    timeless = False
    clocked = True

    def priority_key(self, sequence: Sequence) -> PriorityKey:
        return (self.due(sequence) + sequence.lateness, sequence.order)

    def demote(self, sequence: Sequence) -> None:
        sequence.lateness = LATE_FACTOR * self.config.ttft_target

    def due(self, sequence: Sequence) -> float:
        """Returns the latest start time, fixed at the first call: estimates change, but a position in a queue must
        not."""
        if sequence.start_by is None:
            request = sequence.request
            if request.options.deadline is None:
                prefill = sequence.num_to_compute * self.step_times.seconds_per_token
                gaps, step = sequence.expected_output - 1, self.step_times.seconds_per_step
                behind = gaps * max(0.0, step - self.config.tpot_target)
                sequence.start_by = request.arrival_time + self.config.ttft_target - prefill - behind
            else:
                seconds = self.step_times.expected_seconds(sequence.num_to_compute, sequence.expected_output)
                sequence.start_by = request.options.deadline - seconds
        return sequence.start_by


class LongestPrefixMatch(Fair):
    """Orders tenants as `Fair` does, and the requests of one tenant by arrival, less prefix_match_seconds times the
    share of the prompt that the prefix cache has.

    So requests of one prefix run while its pages are there. Bound: for tenants that of `Fair`; within one, a request
    that arrived at least prefix_match_seconds later starts after it. Source of the idea: the cache-aware schedule of
    SGLang (Zheng et al., 2024), which has no such bound.
    """

    matches_prefixes = True

    def within_tenant(self, sequence: Sequence) -> PriorityKey:
        advance = self.config.prefix_match_seconds * sequence.num_found / sequence.num_known
        return (sequence.request.arrival_time - advance, sequence.order)


POLICIES: dict[str, Callable[[PolicyConfig, StepTimeEstimator], Policy]] = {
    "fcfs": FirstComeFirstServed,
    "sjf": ShortestJobFirst,
    "priority": HighestPriorityFirst,
    "fair": Fair,
    "deadline": EarliestDeadlineFirst,
    "longest-prefix-match": LongestPrefixMatch,
}
