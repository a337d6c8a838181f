"""How long the largest step may take: predicted from the device's rates, corrected by the steps that were measured."""

from __future__ import annotations

from jaxserve.runner.protocol import StepCosts
from jaxserve.scheduler.plan import StepPlan

_DECAY = 0.95
"""Weight of what was measured so far when another step is."""


class StepTimePrediction:
    """costs: of the runner's steps; None where nothing is known of them, and nothing is predicted then.

    The correction is seconds measured over seconds predicted, both summed with old steps fading: long steps, which say
    most about the largest one, count most.
    """

    def __init__(self, costs: StepCosts | None):
        self._costs = costs
        self._measured = self._predicted = 0.0
        self.largest_seconds = 0.0 if costs is None else costs.largest_seconds

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """A step was measured."""
        if self._costs is None:
            return
        self._measured = _DECAY * self._measured + seconds
        self._predicted = _DECAY * self._predicted + self._costs.seconds(plan)
        self.largest_seconds = self._costs.largest_seconds * self._measured / self._predicted
