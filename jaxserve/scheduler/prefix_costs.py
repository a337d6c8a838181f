"""Compares by step cost what can be done with a prefix: wait for it, compute it, or keep its pages.

Pure functions of a predictor of step times: `seconds(shape)` for the shape of a step.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

from jaxserve.scheduler.buckets import Buckets
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.step_shape import StepShape, shape_of

StepSeconds = Callable[[StepShape], float]


@dataclasses.dataclass(frozen=True)
class PrefixPredictor:
    """Predicts what waiting for a prefix brings under a scheduler's limits.

    seconds: of a step. pace: most tokens of one prompt in a step. budget: most prompt tokens of a step.
    """

    seconds: StepSeconds
    buckets: Buckets
    pace: int
    budget: int

    def wait_and_compute(self, start: int, leader: int, shared: int, own: int) -> tuple[float, float]:
        """Returns what `wait_and_compute_seconds` does."""
        return wait_and_compute_seconds(
            self.seconds,
            self.buckets,
            start=start,
            leader=leader,
            shared=shared,
            own=own,
            pace=self.pace,
            budget=self.budget,
        )

    def step(self, plan: StepPlan) -> float:
        """Returns the predicted seconds of a step."""
        return self.seconds(shape_of(plan))


def by_tokens(shape: StepShape) -> float:
    """Predicts a step's time where nothing is known of the device: one unit a token, and 16 a step."""
    return 16.0 + shape.token_bucket


def chunk_shape(start: int, count: int, buckets: Buckets) -> StepShape:
    """Returns the shape of a step of one chunk: `count` tokens of a prompt behind `start` others."""
    return StepShape(
        token_bucket=buckets.token_bucket(min(count, buckets.tokens[-1])),
        row_bucket=0,
        decode_rows=0,
        decode_context=0.0,
        prefill_tokens=count,
        prefill_pairs=count * start + count * (count + 1) / 2,
        prefill_context=start + count,
        longest=start + count,
    )


def prefill_seconds(seconds: StepSeconds, start: int, count: int, pace: int, buckets: Buckets) -> float:
    """Returns the seconds that `count` tokens behind `start` others take in steps of `pace` tokens each, which have no
    other work."""
    total = 0.0
    for done in range(0, count, pace):
        total += seconds(chunk_shape(start + done, min(pace, count - done), buckets))
    return total


def page_seconds(seconds: StepSeconds, page_size: int, buckets: Buckets) -> Callable[[int], float]:
    """Returns the function from a page's depth, the number of pages before it, to the seconds of computing it again,
    as a part of the largest step."""
    count = buckets.tokens[-1]

    @functools.lru_cache(maxsize=4096)
    def of_depth(depth: int) -> float:
        return seconds(chunk_shape(depth * page_size, count, buckets)) * page_size / count

    return lambda depth: of_depth(depth - depth % 8 if depth > 64 else depth)  # deep pages differ little


def wait_and_compute_seconds(
    seconds: StepSeconds, buckets: Buckets, *, start: int, leader: int, shared: int, own: int, pace: int, budget: int
) -> tuple[float, float]:
    """Predicts when a request has computed its prompt whose next tokens another one, its leader, is computing.

    Args:
        seconds: predicts a step's time.
        buckets: that steps are padded to.
        start: tokens of the prompt that are computed already.
        leader: tokens that the leader computes until it has all of the shared ones.
        shared: tokens behind `start` that the leader computes too.
        own: tokens behind these.
        pace: most tokens of one prompt in a step.
        budget: most prompt tokens of a step.

    Returns:
        Seconds if it waits for the leader and then computes its own tokens, and if it computes all of its tokens
        beside the leader, in what the leader leaves of the budget, and then alone.
    """
    waits = prefill_seconds(seconds, start + shared - leader, leader, pace, buckets)
    waits += prefill_seconds(seconds, start + shared, own, pace, buckets)
    beside, left, done, position = 0.0, leader, 0, start
    while done < shared + own:
        lead = min(pace, left)
        count = min(pace, budget - lead, shared + own - done)
        beside += seconds(chunk_shape(position, lead + count, buckets))
        left, done, position = left - lead, done + count, position + count
    return waits, beside
