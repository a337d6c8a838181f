"""Predicts the time of the largest step from the device's rates, corrected by measured steps."""

from __future__ import annotations

from jaxserve.runner.protocol import StepCosts
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.step_shape import shape_of

_DECAY = 0.95
"""Weight that earlier measurements keep when another step is measured."""

_LONGEST = 4.0
"""Factor over the corrected prediction at which a measured step is clipped: a longer one was held up."""

_LARGEST_CORRECTION = 10.0
_SHARE = 0.01
"""Minimum share of the largest step's predicted time: shorter steps measure the host rather than the device."""


class StepTimePrediction:
    """Predicts step times, corrected by measurements.

    costs: of the runner's steps; None when they are unknown, and then nothing is predicted.

    The correction is seconds measured over seconds predicted, both summed with exponential decay: long steps, which are
    most like the largest one, weigh most, and the shortest are ignored. A step that was held up changes it little, so
    that one stall does not hide the next.
    """

    def __init__(self, costs: StepCosts | None):
        self._costs = costs
        self._measured = self._predicted = 0.0
        self.largest_seconds = 0.0 if costs is None else costs.largest_seconds

    def observe(self, plan: StepPlan, seconds: float) -> None:
        """Records the measured seconds of a step."""
        if self._costs is None:
            return
        predicted = self._costs.seconds(shape_of(plan))
        if predicted < _SHARE * self._costs.largest_seconds:
            return
        correction = self._measured / self._predicted if self._predicted else 1.0
        seconds = min(seconds, _LONGEST * max(correction, 1.0) * predicted)
        self._measured = _DECAY * self._measured + seconds
        self._predicted = _DECAY * self._predicted + predicted
        correction = min(self._measured / self._predicted, _LARGEST_CORRECTION)
        self.largest_seconds = self._costs.largest_seconds * correction
