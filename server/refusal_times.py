"""Counts how long refusals take, from the receipt of a request to its answer, for all ports alike."""

from __future__ import annotations

import bisect
import itertools

_FIRST_SECONDS = 1e-4
_GROWTH = 1.25
_NUM_BOUNDS = 60


class RefusalTimes:
    """Keeps a histogram since start, whose bounds are a quarter apart: a quantile is at most that much too large.

    bounds: upper bounds of the buckets in seconds; the last bucket, beyond them, has none. counts: of each bucket, one
    more than bounds. total_seconds: sum of all times.
    """

    def __init__(self) -> None:
        self.bounds = tuple(_FIRST_SECONDS * _GROWTH**power for power in range(_NUM_BOUNDS))
        self.counts = [0] * (_NUM_BOUNDS + 1)
        self.total_seconds = 0.0
        self._longest = 0.0

    @property
    def count(self) -> int:
        """Number of refusals."""
        return sum(self.counts)

    def observe(self, seconds: float) -> None:
        """Counts one refusal."""
        self.counts[bisect.bisect_left(self.bounds, seconds)] += 1
        self.total_seconds += seconds
        self._longest = max(self._longest, seconds)

    def quantile(self, share: float) -> float:
        """Returns a time in seconds that this share of the refusals did not exceed; 0 while there was none."""
        wanted = share * self.count
        for bound, up_to in zip(self.bounds, itertools.accumulate(self.counts), strict=False):
            if up_to >= wanted:
                return min(bound, self._longest)
        return self._longest
