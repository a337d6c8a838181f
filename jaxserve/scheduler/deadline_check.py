"""Decides until when a waiting request must start, so that nothing is computed for one whose deadline is out of reach.

The time that a request waits behind others is not predicted: it ends when its own computation no longer fits.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxserve.config.scheduling import SchedulerConfig
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.step_time_estimator import StepTimeEstimator


class DeadlineCheck:
    """Predicts by `AdmissionConfig.deadline_check`. tokens_per_step: maximum tokens of a decoding row."""

    def __init__(self, config: SchedulerConfig, step_times: StepTimeEstimator, tokens_per_step: int = 1):
        self._rule = "expected" if config.policy == "deadline" else config.admission.deadline_check
        self._ordering = config.ordering
        self._step_tokens = config.max_num_batched_tokens
        self._step_times = step_times
        self._tokens_per_step = tokens_per_step

    def start_by(self, sequence: Sequence) -> float | None:
        """Returns the time after which the request can no longer meet its deadline; None where it has none, or nothing
        is predicted."""
        deadline = sequence.request.options.deadline
        if deadline is None or self._rule == "past":
            return None
        return deadline - self._seconds(sequence)

    def error(self, sequence: Sequence, now: float, due: Callable[[Sequence], float]) -> str:
        """Returns the error line for a request that is dropped at `now`, because its deadline is out of reach or, where
        it has none, because it would miss the targets. due: the time at which these want its next token."""
        deadline = sequence.request.options.deadline
        if deadline is None:
            waited, late, ordering = now - sequence.request.arrival_time, now - due(sequence), self._ordering
            return (
                f"dropped after {waited:.3f} s in the queue: served now it would be {late:.3f} s late for ttft_target "
                f"{ordering.ttft_target:g} s and tpot_target {ordering.tpot_target:g} s; raise the targets, set "
                "drop_late to False (it is then served after those that can be in time), or send fewer requests"
            )
        seconds = self._seconds(sequence)
        if self._rule == "expected":
            needs = f"{sequence.expected_output:.0f} output tokens, as expected, take {seconds:.3f} s now"
        else:
            needs = f"{sequence.request.needed_tokens} output tokens take at least {seconds:.3f} s"
        return (
            f"deadline is in {deadline - now:.3f} s and cannot be met: a prompt of {sequence.num_prompt_tokens} and "
            f"{needs}; allow more time, shorten the prompt or lower max_tokens"
        )

    def _seconds(self, sequence: Sequence) -> float:
        """Returns the seconds that the request takes from its start to the last token that it needs or is expected to
        have."""
        if self._rule == "expected":
            return self._step_times.expected_seconds(sequence.num_to_compute, sequence.expected_output)
        prefill_steps = -(-sequence.num_to_compute // self._step_tokens)
        decode_steps = -(-(sequence.request.needed_tokens - 1) // self._tokens_per_step)
        return self._step_times.least_seconds(prefill_steps, decode_steps)
