"""Counts values in buckets: what a Prometheus histogram holds, cheap enough for the engine's loop."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class HistogramCounts(NamedTuple):
    """Holds the state of a histogram: counts of values in each bucket, the one above the last bound included, and the
    sum of the values.
    """

    counts: tuple[int, ...]
    total: float

    @property
    def num_values(self) -> int:
        return sum(self.counts)


class Histogram:
    """Counts values. bounds: upper bounds of the buckets, rising; a value equal to one is in its bucket."""

    __slots__ = ("_bounds", "_counts", "_total")

    def __init__(self, bounds: Sequence[float]):
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._total = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Counts a value, `count` times."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._total += value * count

    def observe_all(self, values: np.ndarray) -> None:
        """Counts each of the values, float64 [N]."""
        places = np.searchsorted(self._bounds, values)
        for place, count in enumerate(np.bincount(places, minlength=len(self._counts)).tolist()):
            self._counts[place] += count
        self._total += float(values.sum())

    def read(self) -> HistogramCounts:
        """Returns the counts so far."""
        return HistogramCounts(tuple(self._counts), self._total)


def no_counts(bounds: Sequence[float]) -> HistogramCounts:
    """Returns the counts of a histogram of these bounds that has seen no value."""
    return HistogramCounts((0,) * (len(bounds) + 1), 0.0)


def decades(low: int, high: int) -> tuple[float, ...]:
    """Returns bounds from 10**low to 10**high, six a decade."""
    steps = (1.0, 1.5, 2.0, 3.0, 5.0, 7.5)
    bounds = [float(f"{step}e{power}") for power, step in itertools.product(range(low, high), steps)]
    return (*bounds, float(f"1e{high}"))


def powers_of_two(high: int) -> tuple[float, ...]:
    """Returns 0 and the powers of two from 1 to 2**high, for counts of tokens."""
    return (0.0, *(float(2**power) for power in range(high + 1)))
