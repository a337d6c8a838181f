"""Limits the prompt tokens of a step so that decoding requests keep their bound (`SchedulerConfig.max_decode_gap`).

A request that decodes gets a token from every step that decodes, so the time between two of its tokens is that of one
step, or, where prompts and decodes have steps of their own, of the steps from one that decodes to the next. A chunk may
be as large as the predicted time of these steps allows; the prediction's margin is that of its measured errors.

    seconds of the steps since the last that decoded + this step + (the next that decodes) <= bound / margin

The number of prompts under way follows from it: a prompt is admitted when the step has time left for its tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxserve.scheduler.buckets import Buckets
from jaxserve.scheduler.corrected_step_costs import CorrectedStepCosts
from jaxserve.scheduler.decoding import DecodingSet
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.step_in_progress import StepInProgress
from jaxserve.scheduler.step_shape import StepShape, shape_of

PROMISED_SHARE = 0.7
"""While decodes alone take at most this share of the bound, the p99 gap is promised to be at most `TOLERANCE` x it."""

TOLERANCE = 1.1

FORCED_EVERY = 128
"""Steps, one of which may break the promise so that prompts make progress: fewer than one in a hundred."""


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """Records what was predicted of a step when it was planned.

    scheduled_at: on the scheduler's clock. seconds: of the step. decode_seconds: of all decodes alone; 0 when no
    sequence decoded. total_seconds: from the last step that decoded to the end of this one, or of the next that
    decodes.
    """

    shape: StepShape
    scheduled_at: float
    seconds: float
    decode_seconds: float
    total_seconds: float


class GapLimit:
    """Limits the prompt tokens of the steps of one scheduler. bound: in seconds."""

    def __init__(self, bound: float, costs: CorrectedStepCosts, buckets: Buckets):
        self.bound = bound
        self._costs = costs
        self._buckets = buckets
        self._decoding: DecodingSet | None = None
        self._rows = 0
        self._context = 0
        self._longest = 0
        self._alone = 0.0  # seconds of the decodes alone
        self._before = 0.0  # seconds of the steps planned since the last one that decoded
        self._since_forced = FORCED_EVERY

    def start_step(self, decoding: DecodingSet) -> None:
        """Starts to build a step beside the sequences that decode now."""
        self._decoding = decoding
        self._rows = len(decoding)
        if not self._rows:
            self._alone = self._before = 0.0
            return
        self._context, self._longest = decoding.context()
        tokens = max(1, decoding.num_tokens)
        buckets = self._buckets
        alone = StepShape(
            token_bucket=buckets.token_bucket(tokens),
            row_bucket=buckets.row_bucket(tokens),
            decode_rows=self._rows,
            decode_context=float(self._context),
            prefill_tokens=0,
            prefill_pairs=0.0,
            prefill_context=0.0,
            longest=float(self._longest),
        )
        self._alone = self._costs.seconds(alone)

    @property
    def active(self) -> bool:
        """Tells whether a sequence decodes, so that the step's time is bounded."""
        return self._decoding is not None and len(self._decoding) > 0  # this step may have preempted the last one

    def tokens(self, step: StepInProgress, start: int, wanted: int, copies: int = 0) -> int:
        """Returns how many of the next `wanted` tokens of a prompt the step has time for; 0 is none.

        Prompts make progress whatever the bound: a step that has no other prompt tokens takes as many as fill the
        smallest bucket. Where that breaks the promise, only one step in `FORCED_EVERY` does so.

        Args:
            step: the step under construction.
            start: tokens of the sequence computed so far.
            wanted: tokens that the other limits allow.
            copies: pages that must be copied before.
        """
        if wanted <= 0 or not self.active:
            return wanted

        def seconds(count: int) -> float:
            return self._seconds(step, start, count, copies)

        others = self._before + (0.0 if step.decodes else self._alone)
        filled, buckets = step.num_tokens, self._buckets
        count = largest_chunk(seconds, wanted, self.bound / self._costs.margin - others, filled, buckets)
        floor = smallest_chunk(wanted, filled, buckets)
        if count >= floor or step.prefill_tokens:
            return count
        total = others + seconds(floor)
        if total <= self.bound:
            return floor  # without the margin
        if count or self._before:
            return count  # after this step, or instead of it, the others decode
        forced = self._alone > PROMISED_SHARE * self.bound or self._since_forced >= FORCED_EVERY
        return floor if forced or total <= TOLERANCE * self.bound else 0

    def planned(self, plan: StepPlan, now: float) -> PlannedStep:
        """Records that the step was planned; returns what is predicted of it."""
        shape = shape_of(plan)
        seconds = self._costs.seconds(shape)
        total = self._before + seconds + (0.0 if len(plan.decodes) else self._alone)
        if self._rows:
            forced = bool(plan.chunks) and total > TOLERANCE * self.bound
            self._since_forced = 0 if forced else self._since_forced + 1
        self._before = self._before + seconds if self._rows and not len(plan.decodes) else 0.0
        return PlannedStep(shape, now, seconds, self._alone, total)

    def _seconds(self, step: StepInProgress, start: int, count: int, copies: int) -> float:
        """Returns the predicted seconds of a step with `count` more tokens of a prompt, from position `start` on."""
        decodes, buckets = step.decodes > 0, self._buckets
        end = start + count
        rows = step.decodes + len(step.chunks) + 1
        return self._costs.seconds(
            StepShape(
                token_bucket=buckets.token_bucket(min(step.num_tokens + count, buckets.tokens[-1])),
                row_bucket=buckets.row_bucket(min(rows, buckets.rows[-1])),
                decode_rows=self._rows if decodes else 0,
                decode_context=float(self._context) if decodes else 0.0,
                prefill_tokens=step.prefill_tokens + count,
                prefill_pairs=step.prefill_pairs + count * start + count * (count + 1) / 2,
                prefill_context=float(step.prefill_context + end),
                longest=float(max(step.longest, end, self._longest if decodes else 0)),
                swapped_pages=len(step.copies) + copies,
            )
        )


def smallest_chunk(wanted: int, filled: int, buckets: Buckets) -> int:
    """Returns the size of the chunk with which a prompt makes progress whatever the bound: it has the smallest bucket's
    tokens, and the padding that they bring with them.

    Args:
        wanted: maximum number of tokens.
        filled: tokens that the step has already.
        buckets: the sizes that it is padded to.
    """
    return min(wanted, buckets.token_bucket(min(filled + buckets.tokens[0], buckets.tokens[-1])) - filled)


def largest_chunk(seconds: Callable[[int], float], wanted: int, allowed: float, filled: int, buckets: Buckets) -> int:
    """Returns the largest number of tokens, up to `wanted`, of a step within `allowed` seconds; 0 when none fits.

    Where fewer tokens that end with a bucket are computed at a higher rate, it is their number: a chunk that begins
    another bucket pays for all of it.

    Args:
        seconds: predicts the step with so many of the tokens, rising with their number.
        wanted: maximum number of tokens.
        allowed: seconds that the step may take.
        filled: tokens that the step has already.
        buckets: the sizes that it is padded to.
    """
    if wanted <= 0 or seconds(wanted) <= allowed:
        return wanted
    if wanted == 1 or seconds(1) > allowed:
        return 0
    low, high = 1, wanted
    while high - low > 1:
        middle = (low + high) // 2
        if seconds(middle) <= allowed:
            low = middle
        else:
            high = middle
    edge = buckets.largest_within(filled + low) - filled
    return edge if 0 < edge < low and edge * seconds(low) >= low * seconds(edge) else low
