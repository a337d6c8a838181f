"""The spread of a figure over the rounds of a run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Every round's value, the least, the median and the greatest."""
    return {"rounds": list(values), "min": min(values), "median": statistics.median(values), "max": max(values)}


def spread_text(found: Mapping[str, Any]) -> str:
    """What `spread` found, in words."""
    rounds = len(found["rounds"])
    return f"median {found['median']:.3f}, from {found['min']:.3f} to {found['max']:.3f} in {rounds} rounds"
