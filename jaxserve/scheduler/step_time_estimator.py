"""Estimates the time of a step from previous ones."""

from __future__ import annotations

from collections.abc import Iterable

from jaxserve.scheduler.plan import StepPlan

_WEIGHT = 0.05


class StepTimeEstimator:
    """Keeps moving averages: seconds a step of decodes alone, seconds a token of a step with a prefill; 0 until seen.

    last_prefill_seconds: of the last step that had a prefill. The time of a step is that from its scheduling to the
    next one's, which in a busy engine is the time that the device takes.
    """

    def __init__(self) -> None:
        self.seconds_per_step = 0.0
        self.seconds_per_token = 0.0
        self.last_prefill_seconds = 0.0
        self._last: tuple[float, int, bool] | None = None

    def ends(self, now: float) -> None:
        """Records that the step before has taken until `now`, when the next one is decided."""
        if self._last is None:
            return
        begin, tokens, prefill = self._last
        seconds = now - begin
        if prefill:
            self.last_prefill_seconds = seconds
            self.seconds_per_token = _blend(self.seconds_per_token, seconds / tokens)
        else:
            self.seconds_per_step = _blend(self.seconds_per_step, seconds)

    def begins(self, plan: StepPlan | None, now: float) -> None:
        """Records that a step begins at `now`.

        Args:
            plan: the step; None when there is nothing to compute, so that the time until the next step is not counted.
            now: the current time.
        """
        self._last = None if plan is None else (now, plan.num_tokens, bool(plan.chunks))

    def decodes(self, tokens: int, begins: Iterable[float]) -> None:
        """Records decode-only steps of `tokens` tokens, one beginning at each of `begins`."""
        for now in begins:
            self.ends(now)
            self._last = (now, tokens, False)


def _blend(average: float, value: float) -> float:
    return value if not average else average + _WEIGHT * (value - average)
