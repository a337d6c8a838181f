"""Validates numbers of a checkpoint or a configuration, and formats values for messages. Imports no jax."""

from __future__ import annotations

import math
from typing import Any

INT32_MAX: int = 2**31 - 1


def brief(value: Any) -> str:
    """Returns the value as messages write it: as Python does, but short."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def check_count(name: str, value: Any, most: int = INT32_MAX) -> None:
    """Raises ValueError where a value is no whole number from 1 to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {brief(value)}; it must be a whole number of at least 1")
    if value > most:
        raise ValueError(f"{name} is {brief(value)}; it must be at most {most}")


def check_number(name: str, value: Any) -> None:
    """Raises ValueError where a value is no finite number above 0."""
    # The comparison comes last: no float holds a whole number of more than 308 digits.
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf or value > 1e308:
        raise ValueError(f"{name} is {brief(value)}; it must be a finite number above 0")
