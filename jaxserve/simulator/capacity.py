"""Finds the highest rate at which enough requests meet their targets, by bisection."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from jaxserve.config.checks import at_least, between
from jaxserve.simulator.traces import Trace

_MOST_DOUBLINGS = 20


@dataclasses.dataclass(frozen=True)
class Capacity:
    """Result of a capacity search.

    Attributes:
        rates: requests a second, the highest found in each round that met the target.
        points: (rate, share of requests within the targets) of all simulations.
        tolerance: relative precision of each rate.
    """

    rates: tuple[float, ...]
    points: tuple[tuple[float, float], ...]
    target: float
    tolerance: float

    @property
    def rate(self) -> float:
        """Median of the rounds' rates."""
        ordered = sorted(self.rates)
        middle = len(ordered) // 2
        return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

    def __str__(self) -> str:
        return (
            f"{self.rate:.3g} requests/s, from {min(self.rates):.3g} to {max(self.rates):.3g} in {len(self.rates)} "
            f"rounds, each within {100 * self.tolerance:g} %"
        )


def search_capacity(
    rounds: Sequence[Trace],
    good_share: Callable[[Trace], float],
    *,
    target: float = 0.9,
    tolerance: float = 0.02,
) -> Capacity:
    """Bisects the arrival rate of each round's trace, whose requests stay the same.

    Args:
        good_share: returns the share of a trace's requests within their targets.
        target: the share to reach.

    Raises:
        ValueError: a trace has no rate to change, or the target is missed at any rate.
    """
    between("capacity target", target, 0.01, 1.0)
    between("capacity tolerance", tolerance, 1e-4, 1.0)
    at_least("capacity rounds", len(rounds), 1)
    points: list[tuple[float, float]] = []
    rates = [_search(trace, good_share, target, tolerance, points) for trace in rounds]
    return Capacity(tuple(rates), tuple(sorted(points)), target, tolerance)


def parts_of(trace: Trace, rounds: int) -> list[Trace]:
    """Splits a trace into rounds of equal numbers of requests, so that a capacity has a spread."""
    at_least("capacity rounds", rounds, 1)
    size = len(trace) // rounds
    if size < 2:
        raise ValueError(f"trace {trace.name} has {len(trace)} requests; {rounds} rounds need at least 2 each")
    return [trace.part(start * size, (start + 1) * size) for start in range(rounds)]


def _search(
    trace: Trace,
    good_share: Callable[[Trace], float],
    target: float,
    tolerance: float,
    points: list[tuple[float, float]],
) -> float:
    if not trace.seconds:
        raise ValueError(f"trace {trace.name} has all its requests at once; a capacity needs arrivals over time")

    def kept(factor: float) -> bool:
        share = good_share(trace.faster(factor))
        points.append((trace.rate * factor, share))
        return share >= target

    low = high = 1.0
    if kept(1.0):
        while kept(high := 2 * high):
            low = high
            if high > 2**_MOST_DOUBLINGS:
                raise ValueError(f"trace {trace.name} keeps its targets at any rate: they are too loose to tell")
    else:
        while not kept(low := low / 2):
            high = low
            if low < 2**-_MOST_DOUBLINGS:
                raise ValueError(f"trace {trace.name} misses its targets even when requests come one by one")
    while high / low > 1 + tolerance:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if kept(middle) else (low, middle)
    return trace.rate * low
