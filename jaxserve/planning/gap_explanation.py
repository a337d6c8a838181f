"""Explains what max_decode_gap costs: the prompt tokens that steps have time for, with the bound and without."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from jaxserve.scheduler.buckets import Buckets
from jaxserve.scheduler.decode_gap import mixed_step
from jaxserve.scheduler.gap_limit import PROMISED_SHARE, largest_chunk, smallest_chunk
from jaxserve.scheduler.step_shape import StepShape


@dataclasses.dataclass(frozen=True)
class GapCost:
    """Compares steps that decode `rows` sequences beside a prompt, with the bound and without.

    Attributes:
        context: of every sequence: the decoding ones attend to it, and the prompt has it computed.
        decode_seconds: of the decodes alone.
        tokens: of the prompt, in a step within the bound, or in the smallest chunk where none fits.
        seconds: of that step.
        kept: the step is within the bound.
        free_tokens: of the prompt, in a step without the bound: those that max_num_batched_tokens leaves.
        free_seconds: of that step.
    """

    rows: int
    context: int
    decode_seconds: float
    tokens: int
    seconds: float
    free_tokens: int
    free_seconds: float
    kept: bool

    @property
    def rate(self) -> float:
        """Prompt tokens per second within the bound."""
        return self.tokens / self.seconds

    @property
    def free_rate(self) -> float:
        """Prompt tokens per second without it."""
        return self.free_tokens / self.free_seconds


@dataclasses.dataclass(frozen=True)
class GapExplanation:
    """Explains a bound. cost_name: the source of the step times. unknown: why there are none, or ""."""

    bound: float
    cost_name: str
    costs: tuple[GapCost, ...] = ()
    unknown: str = ""

    @property
    def promised_seconds(self) -> float:
        """Seconds up to which decodes alone may take for the bound to be kept."""
        return PROMISED_SHARE * self.bound


def gap_cost(
    seconds: Callable[[StepShape], float], bound: float, buckets: Buckets, most_tokens: int, rows: int, context: int
) -> GapCost:
    """Works out one case by exact step times; the engine keeps a margin for their error.

    Args:
        seconds: predicts a step.
        bound: max_decode_gap.
        buckets: sizes of the programs.
        most_tokens: max_num_batched_tokens.
        rows: number of decoding rows.
        context: of every sequence.
    """

    def step(count: int) -> float:
        return seconds(mixed_step(rows, rows * context, count, context, buckets))

    free = most_tokens - rows
    tokens = largest_chunk(step, free, bound, rows, buckets) or smallest_chunk(free, rows, buckets)
    return GapCost(rows, context, step(0), tokens, step(tokens), free, step(free), step(tokens) <= bound)


def explain_gap(
    seconds: Callable[[StepShape], float],
    name: str,
    bound: float,
    buckets: Buckets,
    most_tokens: int,
    cases: Iterable[tuple[int, int]],
) -> GapExplanation:
    """Explains a bound for several (rows, context); the other arguments are those of `gap_cost`."""
    found = tuple(gap_cost(seconds, bound, buckets, most_tokens, rows, context) for rows, context in cases)
    return GapExplanation(bound, name, found)
