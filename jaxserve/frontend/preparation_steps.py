"""Runs long work in steps: a generator that yields before each step, so that its driver decides where and when.

It yields the number of characters that the next step processes in one uninterruptible call; 0 is a negligible step. Its
return value is the result.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

T = TypeVar("T")

Steps = Generator[int, None, T]


def finish(steps: Steps[T]) -> T:
    """Runs all steps in this thread and returns the result."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value
