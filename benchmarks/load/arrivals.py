"""When requests arrive in an open loop: they do not wait for the answers to those before."""

from __future__ import annotations

import math

import numpy as np


def gamma_arrivals(rate: float, burstiness: float, count: int, seed: int) -> list[float]:
    """`count` arrival times in seconds, the first at 0; gaps follow a gamma distribution of mean 1 / rate.

    rate: requests a second; infinite: all at once. burstiness: the gamma's shape, as in vLLM's benchmark: 1 is a
    Poisson process, below 1 arrivals come in bursts, above 1 they are more regular; the gaps' coefficient of variation
    is 1 / sqrt(burstiness). Raises ValueError where either is not above 0.
    """
    for name, value in (("request rate", rate), ("burstiness", burstiness)):
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
    if math.isinf(rate):
        return [0.0] * count
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), max(count - 1, 0))
    return [0.0, *np.cumsum(gaps).tolist()][:count]


def scaled(times: list[float], scale: float) -> list[float]:
    """A trace's arrival times, `scale` times as fast, the first at 0."""
    if not scale > 0:
        raise ValueError(f"trace scale is {scale}; it must be above 0")
    first = min(times, default=0.0)
    return [(time - first) / scale for time in times]
