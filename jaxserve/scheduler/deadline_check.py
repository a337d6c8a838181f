"""Decides until when a waiting request must start, so that nothing is computed for one whose deadline is out of reach.

The time that a request waits behind others is not predicted: it ends when its own computation no longer fits.
"""

from __future__ import annotations

from jaxserve.config.scheduling import SchedulerConfig
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.step_time_estimator import StepTimeEstimator


class DeadlineCheck:
    """Predicts by `AdmissionConfig.deadline_check`. tokens_per_step: maximum tokens of a decoding row."""

    def __init__(self, config: SchedulerConfig, step_times: StepTimeEstimator, tokens_per_step: int = 1):
        self._rule = "expected" if config.policy == "deadline" else config.admission.deadline_check
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

    def error(self, sequence: Sequence, now: float) -> str:
        """Returns the error line for a request that is dropped at `now`, with a deadline that is out of reach."""
        deadline, seconds = sequence.request.options.deadline, self._seconds(sequence)
        assert deadline is not None
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
            return self._step_times.expected_seconds(sequence.num_known, sequence.expected_output)
        prefill_steps = -(-sequence.num_known // self._step_tokens)
        decode_steps = -(-(sequence.request.needed_tokens - 1) // self._tokens_per_step)
        return self._step_times.least_seconds(prefill_steps, decode_steps)
