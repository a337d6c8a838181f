"""Long work in steps: a generator that yields before each step, so that whoever drives it decides where and when.

What it yields is the number of characters that the next step takes in one call that cannot be interrupted; 0 is a step
that takes next to nothing. Its return value is the result.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")

Steps = Generator[int, None, T]


def finish(steps: Steps[T]) -> T:
    """Takes all steps in this thread and returns the result."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value
