"""How long the largest step may take: predicted from the device's rates, corrected by the steps that were measured."""

from __future__ import annotations

from jaxserve.runner.protocol import StepCosts
from jaxserve.scheduler.plan import StepPlan

_DECAY = 0.95
"""Weight of what was measured so far when another step is."""

_LONGEST = 4.0
"""A step that takes longer than this, times what the corrected prediction says, was held up: so much of it counts."""

_LARGEST_CORRECTION = 10.0
_SHARE = 0.01
"""Of the largest step's predicted time: shorter steps say more of the host than of the device."""


class StepTimePrediction:
    """costs: of the runner's steps; None where nothing is known of them, and nothing is predicted then.

    The correction is seconds measured over seconds predicted, both summed with old steps fading: long steps, which say
    most about the largest one, count most, and the shortest not at all. A step that was held up moves it little, so
    that one stall does not hide the next.
    """

    def __init__(self, costs: StepCosts | None):
        self._costs = costs
        self._measured = self._predicted = 0.0
        self.largest_seconds = 0.0 if costs is None else costs.largest_seconds

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """A step was measured."""
        if self._costs is None:
            return
        predicted = self._costs.seconds(plan)
        if predicted < _SHARE * self._costs.largest_seconds:
            return
        correction = self._measured / self._predicted if self._predicted else 1.0
        seconds = min(seconds, _LONGEST * max(correction, 1.0) * predicted)
        self._measured = _DECAY * self._measured + seconds
        self._predicted = _DECAY * self._predicted + predicted
        correction = min(self._measured / self._predicted, _LARGEST_CORRECTION)
        self.largest_seconds = self._costs.largest_seconds * correction
