"""Checks configured values; each error names the field, its value and the limit. Standard library only."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

_MAX_NAME = 64
"""Characters up to which an unknown name is compared with known ones."""


def at_least(name: str, value: int, low: int) -> None:
    """Raises ValueError unless `value` is a whole number of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}; it must be a whole number")
    if value < low:
        raise ValueError(f"{name} is {value}; it must be at least {low}")


def number(name: str, value: float) -> None:
    """Raises ValueError unless `value` is a number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} is {value!r}; it must be a number")


def between(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raises ValueError unless `value` is a finite number from `low` to `high`."""
    number(name, value)
    if not low <= value <= high or math.isinf(value):
        limit = f"at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
        raise ValueError(f"{name} is {value}; it must be finite and {limit}")


def one_of(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raises ValueError unless `value` is among `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(str(item) for item in allowed)}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error about an unknown name: the nearest known one, or else all of them.

    A long name is compared with none: that takes a time that grows with it.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1) if len(name) <= _MAX_NAME else []
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(names)}"
