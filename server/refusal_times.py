"""Counts how long refusals take, from the receipt of a request to its answer, for all ports alike."""

from __future__ import annotations

import itertools

from jaxserve.telemetry.histograms import Histogram

_BOUNDS = tuple(1e-4 * 1.25**power for power in range(60))


class RefusalTimes:
    """Keeps a histogram since start, whose bounds are a quarter apart: a quantile is at most that much too large."""

    def __init__(self) -> None:
        self._histogram = Histogram(_BOUNDS)
        self._longest = 0.0

    @property
    def count(self) -> int:
        """Number of refusals."""
        return self._histogram.read().num_values

    @property
    def total_seconds(self) -> float:
        """Sum of all times."""
        return self._histogram.read().total

    def observe(self, seconds: float) -> None:
        """Counts one refusal."""
        self._histogram.observe(seconds)
        self._longest = max(self._longest, seconds)

    def quantile(self, share: float) -> float:
        """Returns a time in seconds that this share of the refusals did not exceed; 0 while there was none."""
        counts = self._histogram.read()
        wanted = share * counts.num_values
        for bound, up_to in zip(_BOUNDS, itertools.accumulate(counts.counts), strict=False):
            if up_to >= wanted:
                return min(bound, self._longest)
        return self._longest
