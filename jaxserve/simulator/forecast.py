"""Forecasts arrival rates by smoothing, without seasons."""

from __future__ import annotations

from typing import Protocol

from jaxserve.config.checks import between


class Forecast(Protocol):
    """Learns from the arrivals of intervals of equal length."""

    def observe(self, rate: float) -> None:
        """Records the arrival rate, in requests a second, of the interval that has ended."""
        ...

    def rate(self, intervals: float) -> float:
        """Returns the expected requests a second `intervals` intervals ahead."""
        ...


class Ewma:
    """Averages with exponential weights: no trend, so it lags behind one. weight: of a new interval."""

    def __init__(self, weight: float = 0.3):
        between("ewma weight", weight, 0.001, 1.0)
        self._weight = weight
        self._level: float | None = None

    def observe(self, rate: float) -> None:
        self._level = rate if self._level is None else self._level + self._weight * (rate - self._level)

    def rate(self, intervals: float) -> float:
        return self._level or 0.0


class Holt:
    """Applies Holt's linear method: a smoothed level and a smoothed trend, which is extrapolated.

    Source: Holt, 1957 (International Journal of Forecasting 20, 2004). level_weight, trend_weight: of a new interval.
    """

    def __init__(self, level_weight: float = 0.3, trend_weight: float = 0.1):
        between("holt level_weight", level_weight, 0.001, 1.0)
        between("holt trend_weight", trend_weight, 0.0, 1.0)
        self._weights = level_weight, trend_weight
        self._level: float | None = None
        self._trend = 0.0

    def observe(self, rate: float) -> None:
        if self._level is None:
            self._level = rate
            return
        level_weight, trend_weight = self._weights
        before = self._level
        self._level = level_weight * rate + (1 - level_weight) * (before + self._trend)
        self._trend = trend_weight * (self._level - before) + (1 - trend_weight) * self._trend

    def rate(self, intervals: float) -> float:
        return max(0.0, (self._level or 0.0) + self._trend * intervals)


FORECASTS = {"ewma": Ewma, "holt": Holt}
