"""Predicts step times by a cost model that is corrected by the steps that ran.

`engine/step_time.py` corrects the prediction of the one largest step, for the watchdog. This correction is finer, since
chunk sizes follow from it, and it knows how far off its predictions are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from jaxserve.scheduler.step_shape import StepShape

QUANTILE = 0.99
"""Share of steps that take at most `margin` times their predicted time."""

_WEIGHT = 0.1
"""Minimum weight of the newest step in a correction; the first steps weigh more."""

_LARGEST_CHANGE = 2.0
"""Factor by which one step can disagree with a correction at most: a longer step was held up."""

_MARGIN_RATE = 0.1
_INITIAL_MARGIN = 1.2
_LARGEST_MARGIN = 4.0

_Key = tuple[int, bool] | bool | None


class CorrectedStepCosts:
    """Predicts the seconds of steps.

    A correction is the moving average of measured over predicted seconds, one for each token bucket with and without
    prefill tokens; a bucket that has not run yet takes that of its kind. margin: what `QUANTILE` of the measured times
    of steps near the bound stay below, as a factor of the prediction. It rises with a step that took longer and falls
    slowly with every other one, so that in the long run the share of longer ones is 1 - QUANTILE, whatever the
    distribution of the errors (adaptive conformal inference, Gibbs and Candes 2021).
    """

    def __init__(self, seconds: Callable[[StepShape], float]):
        self._model = seconds
        self._corrections: dict[_Key, tuple[float, int]] = {None: (1.0, 0)}  # the factor and the steps it averages
        self.margin = _INITIAL_MARGIN

    def seconds(self, shape: StepShape) -> float:
        """Returns the predicted seconds of a step."""
        return self._model(shape) * self._correction(shape)

    def observe(self, shapes: Sequence[StepShape], seconds: float, *, near_bound: bool) -> None:
        """Records measured steps.

        Args:
            shapes: of steps that ran back to back.
            seconds: that they took together.
            near_bound: their size was limited by what they were predicted to take, so that their error counts for the
                margin.
        """
        predicted = sum(map(self.seconds, shapes))
        if predicted <= 0 or seconds <= 0:
            return
        error = seconds / predicted
        if near_bound:
            longer = error > self.margin
            margin = self.margin * math.exp(_MARGIN_RATE * (longer - (1 - QUANTILE)))
            self.margin = min(max(margin, 1.0), _LARGEST_MARGIN)
        error = min(max(error, 1 / _LARGEST_CHANGE), _LARGEST_CHANGE)
        for shape in shapes:
            found = self._correction(shape) * error
            for key in _keys(shape):
                factor, count = self._corrections.get(key, (1.0, 0))
                weight = max(_WEIGHT, 1 / (count + 1))
                self._corrections[key] = factor + weight * (found - factor), count + 1

    def _correction(self, shape: StepShape) -> float:
        corrections = self._corrections
        for key in _keys(shape):
            if key in corrections:
                return corrections[key][0]
        raise AssertionError("the correction of all steps is missing")


def _keys(shape: StepShape) -> tuple[_Key, ...]:
    """Returns the keys of the corrections that a step takes part in, the finest first."""
    prefill = shape.prefill_tokens > 0
    return (shape.token_bucket, prefill), prefill, None
