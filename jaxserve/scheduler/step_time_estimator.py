"""Estimates the time of a step from previous ones."""

from __future__ import annotations

from collections.abc import Iterable

from jaxserve.scheduler.plan import StepPlan

_WEIGHT = 0.05

_BLOCK = 8
"""Number of consecutive steps whose mean counts as the time of a step: a single interval may be that of a step that was
only queued behind another."""


class StepTimeEstimator:
    """Keeps moving averages: seconds a step of decodes alone, seconds a token of a step with a prefill; 0 until seen.

    last_prefill_seconds: of the last step that had a prefill. fastest_step: the lowest mean time of `_BLOCK` steps that
    followed one another, which hardly depends on the load; 0 until so many have. The time of a step is that from its
    scheduling to the next one's, which in a busy engine is the time that the device takes.
    """

    def __init__(self) -> None:
        self.seconds_per_step = 0.0
        self.seconds_per_token = 0.0
        self.last_prefill_seconds = 0.0
        self.fastest_step = 0.0
        self._block: list[float] = []  # begins of steps that followed one another
        self._last: tuple[float, int, bool] | None = None

    def ends(self, now: float) -> None:
        """Records that the step before has taken until `now`, when the next one is decided."""
        if self._last is None:
            return
        begin, tokens, prefill = self._last
        seconds = now - begin
        self._follows(now)
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
        if plan is None:
            self._block.clear()

    def decodes(self, tokens: int, begins: Iterable[float]) -> None:
        """Records decode-only steps of `tokens` tokens, one beginning at each of `begins`."""
        for now in begins:
            self.ends(now)
            self._last = (now, tokens, False)

    def least_seconds(self, prefill_steps: int, decode_steps: int) -> float:
        """Returns what so many steps take if none is slower than the fastest so far; 0 while nothing is known."""
        return self.fastest_step * (prefill_steps + decode_steps)

    def expected_seconds(self, prompt_tokens: int, output_tokens: float) -> float:
        """Returns what a request takes from its start at the present time of a step; 0 while nothing is known."""
        return prompt_tokens * self.seconds_per_token + (output_tokens - 1) * self.seconds_per_step

    def _follows(self, now: float) -> None:
        self._block.append(now)
        if len(self._block) > _BLOCK:
            mean = (now - self._block[0]) / _BLOCK
            self.fastest_step = min(self.fastest_step or mean, mean)
            self._block = [now]


def _blend(average: float, value: float) -> float:
    return value if not average else average + _WEIGHT * (value - average)
