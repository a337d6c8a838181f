"""The policies, and their names in the settings.

Each class states what bounds the wait of a request: who can start before it although it arrived later.
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
"""How many times ttft_target later the due time of a request is set that missed it."""


class FirstComeFirstServed(Policy):
    """By arrival. Bound: nobody that arrived later starts before."""

    def priority_key(self, sequence: Sequence) -> PriorityKey:
        return (sequence.order,)


class ShortestJobFirst(Policy):
    """By expected output, which waiting makes up for at sjf_ageing tokens a second.

    Bound: whoever arrived (own expectation - theirs) / sjf_ageing seconds later, or more, starts after it.
    """

    def priority_key(self, sequence: Sequence) -> PriorityKey:
        return (sequence.expected_output + self.config.sjf_ageing * sequence.request.arrival_time, sequence.order)


class HighestPriorityFirst(Policy):
    """By priority_weight * priority + priority_ageing * seconds waited - priority_length_weight * expected output.

    Bound: whoever arrived (difference of the other two terms) / priority_ageing seconds later, or more, starts after
    it.
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
    """By the time at which a request must start to meet its deadline, or else the targets.

    The targets: the first token ttft_target after arrival, and one every tpot_target after it. Where steps take longer
    than tpot_target, a request must start sooner by what its expected output falls behind, and may be late from the
    start. A request that is late is due LATE_FACTOR * ttft_target later, among the others. Bound: whoever is due later
    starts after it, so with equal targets whoever arrived LATE_FACTOR * ttft_target later, or more, and later by the
    longest prefill and the most that an output falls behind.
    """

    timeless = False
    clocked = True

    def priority_key(self, sequence: Sequence) -> PriorityKey:
        return (self.due(sequence) + sequence.lateness, sequence.order)

    def demote(self, sequence: Sequence) -> None:
        sequence.lateness = LATE_FACTOR * self.config.ttft_target

    def due(self, sequence: Sequence) -> float:
        """The latest start. Fixed when first asked: the estimates move, a place in a queue does not."""
        if sequence.start_by is None:
            request = sequence.request
            prefill = sequence.num_known * self.step_times.seconds_per_token
            gaps, step = sequence.expected_output - 1, self.step_times.seconds_per_step
            if request.options.deadline is None:
                behind = gaps * max(0.0, step - self.config.tpot_target)
                sequence.start_by = request.arrival_time + self.config.ttft_target - prefill - behind
            else:
                sequence.start_by = request.options.deadline - prefill - gaps * step
        return sequence.start_by


POLICIES: dict[str, Callable[[PolicyConfig, StepTimeEstimator], Policy]] = {
    "fcfs": FirstComeFirstServed,
    "sjf": ShortestJobFirst,
    "priority": HighestPriorityFirst,
    "fair": Fair,
    "deadline": EarliestDeadlineFirst,
}
