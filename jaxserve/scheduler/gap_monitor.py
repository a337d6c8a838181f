"""Measures the time between a request's tokens, corrects the step costs by it and counts the gaps above the bound."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence, Set

from jaxserve.scheduler.corrected_step_costs import CorrectedStepCosts
from jaxserve.scheduler.gap_limit import PROMISED_SHARE, TOLERANCE, PlannedStep
from jaxserve.scheduler.plan import StepPlan

CAUSES: tuple[str, ...] = ("decodes", "preemption", "swap", "minimum_chunk", "missing_program", "stall", "estimate")
"""What makes a gap exceed the bound.

decodes: decodes alone take more than the promised share of it. preemption: the request was preempted in between. swap:
pages were copied, which was known to take longer. minimum_chunk: prompts had to make progress, which was known to take
longer. missing_program: the step was padded to a larger bucket, because the program of its own was not compiled yet.
stall: the step took more than twice its predicted time, since host or device were held up. estimate: it took longer
than predicted otherwise.
"""

_STALL = 2.0


@dataclasses.dataclass(frozen=True)
class GapExceeded:
    """Counts the gaps, one for each request, by which a step exceeded TOLERANCE x the bound for one cause.

    longest_seconds: the longest of them.
    """

    cause: str
    count: int
    longest_seconds: float


class GapMonitor:
    """Follows the steps of one scheduler from plan to result. exceeded: gaps by cause since the start."""

    def __init__(self, bound: float, costs: CorrectedStepCosts):
        self._bound = bound
        self._costs = costs
        self._planned: dict[int, PlannedStep] = {}  # by step
        self._token_times: dict[int, float] = {}  # of the last token of each sequence, by order
        # By order, the first steps without the sequence after its first and its last preemption since its last token.
        self._preempted: dict[int, tuple[int, int]] = {}
        self._unmeasured: list[PlannedStep] = []  # steps whose end is known only with that of the next that samples
        self._since_decodes: list[PlannedStep] = []  # steps after the last one that decoded
        self._padded_up = False  # one of them was padded to a larger bucket than planned
        self._measured_until = -math.inf
        self.exceeded = dict.fromkeys(CAUSES, 0)

    def planned(self, number: int, step: PlannedStep) -> None:
        """Records a step of this number."""
        self._planned[number] = step

    def preempted(self, number: int, orders: Iterable[int]) -> None:
        """Records that these sequences were preempted for the step of this number; earlier ones may be in flight."""
        for order in orders:
            self._preempted[order] = self._preempted.get(order, (number, number))[0], number

    def restarted(self, orders: Iterable[int]) -> None:
        """Records that all steps in flight are lost and these sequences are computed again."""
        self.preempted(0, orders)
        self._planned.clear()
        self._unmeasured.clear()
        self._since_decodes.clear()
        self._padded_up = False

    def ended(self, order: int) -> None:
        """Forgets a sequence."""
        self._token_times.pop(order, None)
        self._preempted.pop(order, None)

    def collected(self, plan: StepPlan, orders: Sequence[int], now: float) -> tuple[GapExceeded, ...]:
        """Takes the result of a step, before its sequences end.

        Args:
            plan: the step as it was executed.
            orders: of the sequences that got a token from it.
            now: the time at which its tokens were there.

        Returns:
            The gaps that exceeded the bound.
        """
        step = self._planned.pop(plan.step, None)
        if step is None:
            return ()
        if plan.token_bucket > step.shape.token_bucket:
            step = dataclasses.replace(step, shape=step.shape._replace(token_bucket=plan.token_bucket))
            self._padded_up = True
        self._unmeasured.append(step)
        self._since_decodes.append(step)
        if not plan.num_sampled:
            return ()
        self._measure(now)
        back: set[int] = set()
        if self._preempted:
            back = {order for order in orders if order in self._preempted and self._preempted[order][0] <= plan.step}
        found = self._gaps(orders, back, now)
        self._token_times.update(dict.fromkeys(orders, now))
        for order in back:
            last = self._preempted.pop(order)[1]
            if last > plan.step:
                self._preempted[order] = last, last
        if len(plan.decodes) or not step.decode_seconds:
            self._since_decodes.clear()
            self._padded_up = False
        return found

    def _measure(self, now: float) -> None:
        """Corrects the costs by the steps that have ended."""
        shapes = [step.shape for step in self._unmeasured]
        begin = max(self._measured_until, self._unmeasured[0].scheduled_at)
        near_bound = 2 * self._costs.margin * self._unmeasured[-1].total_seconds > self._bound
        near_bound = near_bound and any(shape.prefill_tokens for shape in shapes)
        self._costs.observe(shapes, now - begin, near_bound=near_bound)
        self._unmeasured.clear()
        self._measured_until = now

    def _gaps(self, orders: Sequence[int], back: Set[int], now: float) -> tuple[GapExceeded, ...]:
        """Counts the gaps above the limit. back: of the sequences, those that were preempted since their last token."""
        limit, times = TOLERANCE * self._bound, self._token_times
        last = [times.get(order, now) for order in orders]
        if not last or now - min(last) <= limit:
            return ()
        longest: dict[str, float] = {}
        counts: dict[str, int] = {}
        for order, time in zip(orders, last, strict=True):
            gap = now - time
            if gap > limit:
                cause = "preemption" if order in back else self._cause(gap)
                counts[cause] = counts.get(cause, 0) + 1
                longest[cause] = max(gap, longest.get(cause, 0.0))
                self.exceeded[cause] += 1
        return tuple(GapExceeded(cause, count, longest[cause]) for cause, count in counts.items())

    def _cause(self, gap: float) -> str:
        """Returns the cause of a gap over the steps since the last one that decoded."""
        steps = self._since_decodes
        if self._padded_up:
            return "missing_program"
        if gap > _STALL * sum(step.seconds for step in steps):
            return "stall"
        if max(step.decode_seconds for step in steps) > PROMISED_SHARE * self._bound:
            return "decodes"
        if max(step.total_seconds for step in steps) <= self._bound:
            return "estimate"
        return "swap" if any(step.shape.swapped_pages for step in steps) else "minimum_chunk"
