"""Predicts what computing a page of a prompt again would take, from the costs of steps."""

from __future__ import annotations

import functools
from collections.abc import Callable

from jaxserve.scheduler.step_shape import StepShape

_ROWS = 8
"""Row bucket of the step; what a sample costs hardly counts beside its tokens."""


def page_seconds(seconds: Callable[[StepShape], float], page_size: int, step_tokens: int) -> Callable[[int], float]:
    """Returns a function from the number of pages before a page in its sequence to the seconds that it takes.

    A page is charged its share of a step full of prompt tokens that begins with it, attention to all before included.

    Args:
        seconds: Predicts the time of a step.
        page_size: Tokens of a page.
        step_tokens: Tokens of the step, which must be one of the engine's token buckets.
    """

    @functools.cache
    def of_depth(depth: int) -> float:
        start = depth * page_size
        pairs, end = step_tokens * start + step_tokens * (step_tokens + 1) / 2, start + step_tokens
        shape = StepShape(step_tokens, _ROWS, 0, 0.0, step_tokens, pairs, end, end)
        return seconds(shape) * page_size / step_tokens

    return of_depth
