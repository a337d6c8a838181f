"""Keeps the bound on the time between a request's tokens: one limit for planning, one monitor of what came of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from jaxserve.config.scheduling import SchedulerConfig
from jaxserve.scheduler.buckets import Buckets
from jaxserve.scheduler.corrected_step_costs import CorrectedStepCosts
from jaxserve.scheduler.gap_limit import PROMISED_SHARE, GapLimit
from jaxserve.scheduler.gap_monitor import GapExceeded, GapMonitor
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.step_shape import StepShape


class DecodeGap:
    """Joins the limit, the monitor and the costs that they share. warnings: lines for the log, about the bound."""

    def __init__(self, bound: float, step_seconds: Callable[[StepShape], float], buckets: Buckets):
        """Checks the bound against the costs.

        Args:
            bound: seconds between two tokens of a request.
            step_seconds: predicts the time of a step.
            buckets: the sizes that steps are padded to.

        Raises:
            ValueError: no step is as short as the bound.
        """
        smallest = step_seconds(mixed_step(1, 1, buckets.tokens[0] - 1, 0, buckets))
        if smallest > bound:
            raise ValueError(
                f"max_decode_gap is {bound:g} s; the smallest step, of {buckets.tokens[0]} tokens, takes "
                f"{smallest:.2g} s: set it to at least {smallest / PROMISED_SHARE:.2g}"
            )
        costs = CorrectedStepCosts(step_seconds)
        self.limit = GapLimit(bound, costs, buckets)
        self.monitor = GapMonitor(bound, costs)
        self.warnings: tuple[str, ...] = ()
        rows = buckets.rows[-1]
        alone = step_seconds(mixed_step(rows, rows, 0, 0, buckets))
        if alone > PROMISED_SHARE * bound:
            self.warnings = (
                f"max_decode_gap is {bound:g} s, but decoding {rows} rows alone takes {alone:.2g} s with the shortest "
                f"contexts: above {PROMISED_SHARE:g} x the bound it cannot be kept with so many; lower max_num_seqs, "
                "or raise the bound",
            )

    @classmethod
    def configured(
        cls, config: SchedulerConfig, step_seconds: Callable[[StepShape], float] | None, buckets: Buckets
    ) -> DecodeGap | None:
        """Returns the configured bound; None where there is none. Raises ValueError where it cannot be kept."""
        if config.max_decode_gap is None:
            return None
        if step_seconds is None:
            raise ValueError(
                f"max_decode_gap is {config.max_decode_gap:g} s; this runner predicts no step times, from which chunks "
                "follow: leave it unset"
            )
        return cls(config.max_decode_gap, step_seconds, buckets)

    def planned(self, number: int, plan: StepPlan | None, now: float, preempted: Iterable[int]) -> None:
        """Records a step.

        Args:
            number: of the step.
            plan: the step; None when there is nothing to compute.
            now: the time at which it was planned.
            preempted: orders of the sequences preempted for it.
        """
        if plan is not None:
            self.monitor.planned(number, self.limit.planned(plan, now))
        self.monitor.preempted(number, preempted)

    def collected(self, plan: StepPlan, orders: Sequence[int], now: float) -> tuple[GapExceeded, ...]:
        """Does what `GapMonitor.collected` does."""
        return self.monitor.collected(plan, orders, now)


def mixed_step(rows: int, context: int, prefill_tokens: int, start: int, buckets: Buckets) -> StepShape:
    """Returns the shape of a step of decoding rows and one chunk of a prompt.

    Args:
        rows: number of decoding rows.
        context: positions that they attend to, in all.
        prefill_tokens: tokens of the chunk.
        start: tokens of that prompt computed before.
        buckets: the sizes that the step is padded to.
    """
    end = start + prefill_tokens if prefill_tokens else 0
    samples = max(1, rows) if not prefill_tokens else rows + 1
    return StepShape(
        token_bucket=buckets.token_bucket(min(rows + prefill_tokens, buckets.tokens[-1])),
        row_bucket=buckets.row_bucket(min(samples, buckets.rows[-1])),
        decode_rows=rows,
        decode_context=float(context),
        prefill_tokens=prefill_tokens,
        prefill_pairs=prefill_tokens * start + prefill_tokens * (prefill_tokens + 1) / 2,
        prefill_context=float(end),
        longest=float(max(end, -(-context // max(1, rows)))),
    )
