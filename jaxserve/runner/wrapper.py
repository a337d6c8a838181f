"""A runner that hands everything on to another one: the base of those that change or observe a part of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxserve.kv_cache.page_copy import PageCopy
from jaxserve.runner.protocol import DiskTier, PageCopies, Pending, Runner
from jaxserve.scheduler.plan import StepPlan, StepResult


class RunnerWrapper:
    """Hands every call of the Runner protocol on to `runner`. A subclass overrides what it changes.

    info, step_costs: those of the wrapped runner, until a subclass replaces them.
    """

    def __init__(self, runner: Runner):
        self._runner = runner
        self.info = runner.info
        self.step_costs = runner.step_costs

    @property
    def num_compilations(self) -> int:
        return self._runner.num_compilations

    @property
    def compile_misses(self) -> int:
        return self._runner.compile_misses

    @property
    def num_executables(self) -> int:
        return self._runner.num_executables

    @property
    def pack_seconds(self) -> float:
        return self._runner.pack_seconds

    @property
    def disk(self) -> DiskTier | None:
        return self._runner.disk

    def close(self, copies: Sequence[PageCopy] = ()) -> None:
        self._runner.close(copies)

    def page_copies(self) -> dict[str, PageCopies]:
        return self._runner.page_copies()

    def shared_reads(self) -> dict[str, int]:
        return self._runner.shared_reads()

    def fitted(self, plan: StepPlan) -> StepPlan:
        return self._runner.fitted(plan)

    def dispatch_forward(self, plan: StepPlan) -> Pending:
        return self._runner.dispatch_forward(plan)

    def dispatch_sample(self, plan: StepPlan, masks: np.ndarray | None = None) -> None:
        self._runner.dispatch_sample(plan, masks)

    def done(self, pending: Pending) -> bool:
        return self._runner.done(pending)

    def collect(self, pending: Pending) -> StepResult:
        return self._runner.collect(pending)

    def reset(self) -> None:
        self._runner.reset()
