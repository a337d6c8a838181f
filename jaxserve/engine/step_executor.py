"""Carries out plans on a runner, in parts where a whole one cannot be started.

A step that was not started (`StepNotStartedError`) changed nothing, so its rows are tried again in halves, and a half
that is not started either in halves of its own. A row that fails alone is tried once more, and then given up; the
others go on. It is not given up where even a step without rows fails: then the runner is at fault, and not the row.

That, and any other error of a runner, is a `DeviceFaultError`: the content of its arrays is lost, or of no use.
"""

from __future__ import annotations

import dataclasses
import logging

import numpy as np

from jaxserve.runner.protocol import Pending, Runner, StepNotStartedError
from jaxserve.scheduler.buckets import Buckets
from jaxserve.scheduler.plan import NO_DECODES, NOT_FINITE, StepPlan, StepResult

_log = logging.getLogger(__name__)


class EngineBrokenError(RuntimeError):
    """The engine cannot go on; the text is one line that says why."""


class DeviceFaultError(RuntimeError):
    """A step failed after it was started, or none can be started: what the device held is lost. plan: of the step."""

    def __init__(self, plan: StepPlan, error: Exception):
        lines = str(error).splitlines() or [""]  # the first says what, the others where
        super().__init__(f"{type(error).__name__}: {lines[0]}")
        self.plan = plan


@dataclasses.dataclass(frozen=True)
class DispatchedStep:
    """A plan under way: its parts in order, each with what the runner made of it; None for a row that was given up.

    failed: request ids of those rows, and why, in one line.
    """

    plan: StepPlan
    parts: tuple[tuple[StepPlan, Pending | None], ...]
    failed: tuple[tuple[str, str], ...] = ()


class StepExecutor:
    """The steps of one runner."""

    def __init__(self, runner: Runner, buckets: Buckets):
        self._runner = runner
        self._buckets = buckets
        self._most_rows: int | None = None

    def dispatch(self, plan: StepPlan) -> DispatchedStep:
        """Starts a step. Raises DeviceFaultError."""
        try:
            return self._dispatch(plan)
        except DeviceFaultError as fault:
            fault.plan = plan  # and not the part of it that failed
            raise

    def _dispatch(self, plan: StepPlan) -> DispatchedStep:
        if self._most_rows is not None and plan.num_rows > self._most_rows:
            return self._in_parts(plan, plan.parts(self._most_rows, self._buckets))
        try:
            return DispatchedStep(plan, ((plan, self._start(plan)),))
        except StepNotStartedError as error:
            _log.warning("step %d, %d rows, not started: %s; trying halves of it", plan.step, plan.num_rows, error)
            return self._in_parts(plan, self._halves(_without_copies(plan, error)))

    def done(self, step: DispatchedStep) -> bool:
        """Whether the device has finished a step; never waits."""
        return all(pending is None or self._runner.done(pending) for _, pending in step.parts)

    def collect(self, step: DispatchedStep) -> StepResult:
        """Waits for a step and returns its ids, NOT_FINITE for rows that were given up. Raises DeviceFaultError."""
        try:
            results = [self._collect(*part) for part in step.parts]
        except DeviceFaultError as fault:
            fault.plan = step.plan
            raise
        self._most_rows = None
        return results[0] if len(results) == 1 else StepResult(np.concatenate([one.token_ids for one in results]))

    def reset(self, failed: StepPlan) -> None:
        """Makes the device's arrays anew after a DeviceFaultError; steps have at most half of the rows of the one that
        failed until one of them has succeeded."""
        self._runner.reset()
        self._most_rows = max(1, failed.num_rows // 2)

    def _start(self, plan: StepPlan) -> Pending:
        try:
            return self._runner.dispatch(plan)
        except StepNotStartedError:
            raise
        except Exception as error:
            raise DeviceFaultError(plan, error) from error

    def _collect(self, plan: StepPlan, pending: Pending | None) -> StepResult:
        if pending is None:
            return StepResult(np.full(plan.num_sampled, NOT_FINITE, np.int32))
        try:
            return self._runner.collect(pending)
        except Exception as error:
            raise DeviceFaultError(plan, error) from error

    def _in_parts(self, plan: StepPlan, todo: list[StepPlan]) -> DispatchedStep:
        """Starts parts one after another, and halves of those that are not started."""
        parts: list[tuple[StepPlan, Pending | None]] = []
        failed: list[tuple[str, str]] = []
        while todo:
            part = todo.pop(0)
            try:
                parts.append((part, self._start(part)))
            except StepNotStartedError as error:
                part = _without_copies(part, error)
                if part.num_rows > 1:
                    todo[:0] = self._halves(part)
                else:
                    parts.append((part, self._alone(part, failed)))
        return DispatchedStep(plan, tuple(parts), tuple(failed))

    def _alone(self, part: StepPlan, failed: list[tuple[str, str]]) -> Pending | None:
        """Tries a single row once more, and notes it among `failed` where it is the row that cannot be computed."""
        try:
            return self._start(part)
        except StepNotStartedError as error:
            self._check(_without_copies(part, error), error)
            (request_id,) = part.request_ids
            _log.error("request %r cannot be computed: %s", request_id, error, exc_info=error)
            failed.append((request_id, f"the request cannot be computed: {error}"))
            return None

    def _check(self, part: StepPlan, error: StepNotStartedError) -> None:
        """Raises DeviceFaultError where a step without rows cannot be started either: then it is no row's fault. It
        makes the part's copies of pages, which others may need."""
        nothing = dataclasses.replace(
            part,
            decodes=NO_DECODES,
            chunks=(),
            token_bucket=self._buckets.tokens[0],
            row_bucket=self._buckets.rows[0],
            num_tokens=0,
            num_sampled=0,
        )
        try:
            pending = self._start(nothing)
        except StepNotStartedError as again:
            raise DeviceFaultError(part, again) from error
        self._collect(nothing, pending)

    def _halves(self, plan: StepPlan) -> list[StepPlan]:
        return plan.parts(max(1, -(-plan.num_rows // 2)), self._buckets)


def _without_copies(plan: StepPlan, error: StepNotStartedError) -> StepPlan:
    """The plan as it is to be tried again: copies of pages that were made are not made a second time."""
    return dataclasses.replace(plan, swaps=()) if error.swapped else plan
