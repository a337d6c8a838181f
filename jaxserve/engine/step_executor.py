"""Executes plans on a runner, in parts when a whole one cannot be started.

A step that was not started (`StepNotStartedError`) changed nothing, so its rows are tried again in halves, and a half
that is not started either in halves of its own. A row that fails alone is tried once more, and then given up; the
others go on. It is not given up where even a step without rows fails: then the runner is at fault, and not the row.

That, and any other error of a runner, is a `DeviceFaultError`: the content of its arrays is lost, or of no use.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxserve.logprob_columns import LogprobColumns
from jaxserve.runner.protocol import Pending, Runner, StepNotStartedError
from jaxserve.scheduler.buckets import Buckets
from jaxserve.scheduler.plan import NO_DECODES, NO_SAMPLES, NO_SCORES, NOT_FINITE, StepPlan, StepResult

_log = logging.getLogger(__name__)


class EngineBrokenError(RuntimeError):
    """Signals that the engine cannot go on; the text is one line that says why."""


class DeviceFaultError(RuntimeError):
    """Signals that a step failed after it was started, or that none can be started: the device's state is lost.

    plan: of the step.
    """

    def __init__(self, plan: StepPlan, error: Exception):
        lines = str(error).splitlines() or [""]  # the first says what, the others where
        super().__init__(f"{type(error).__name__}: {lines[0]}")
        self.plan = plan


@dataclasses.dataclass(frozen=True)
class DispatchedStep:
    """Represents a plan in flight: its parts in order, each with the runner's handle, or None for a row that was given
    up.

    failed: request ids of those rows, and why, in one line. waits: its samples want masks and are not dispatched yet;
    the forward program is, unless there are no parts: then `dispatch_sample` starts the whole step. not_started: why
    its forward program was not started.
    """

    plan: StepPlan
    parts: tuple[tuple[StepPlan, Pending | None], ...]
    failed: tuple[tuple[str, str], ...] = ()
    waits: bool = False
    not_started: StepNotStartedError | None = None


class _Share(NamedTuple):
    """Pairs a step, or a part of one, with its masks as `Runner.dispatch_sample` takes them."""

    plan: StepPlan
    masks: np.ndarray | None

    def parts(self, most_rows: int, buckets: Buckets) -> list[_Share]:
        """Splits the step as `StepPlan.parts` does."""
        shares, place = [], 0
        for part in self.plan.parts(most_rows, buckets):
            count = len(part.samples.masked)
            shares.append(_Share(part, None if self.masks is None or not count else self.masks[place : place + count]))
            place += count
        return shares

    def without_copies(self, error: StepNotStartedError) -> _Share:
        """Returns the share to retry: page copies that were made are not made again."""
        return self._replace(plan=dataclasses.replace(self.plan, copies=())) if error.copied else self


class StepExecutor:
    """Executes the steps of one runner."""

    def __init__(self, runner: Runner, buckets: Buckets):
        self._runner = runner
        self._buckets = buckets
        self._most_rows: int | None = None

    def dispatch_forward(self, plan: StepPlan) -> DispatchedStep:
        """Starts a step: its forward program and, unless a sample wants a mask, its sample program. Raises
        DeviceFaultError."""
        try:
            if not plan.constrained:
                return self._dispatch(_Share(plan, None))
            if self._too_large(plan):
                return DispatchedStep(plan, (), waits=True)
            try:
                return DispatchedStep(plan, ((plan, self._guarded(plan, self._runner.dispatch_forward)),), waits=True)
            except StepNotStartedError as error:
                return DispatchedStep(plan, (), waits=True, not_started=error)
        except DeviceFaultError as fault:
            fault.plan = plan  # and not the part of it that failed
            raise

    def dispatch_sample(self, step: DispatchedStep, masks: np.ndarray) -> DispatchedStep:
        """Samples a step that waits for masks, uint32 [M, words], one for each of `plan.samples.masked`. Raises
        DeviceFaultError."""
        plan, share = step.plan, _Share(step.plan, masks)
        try:
            if not step.parts:
                return self._dispatch(share) if step.not_started is None else self._retry(share, step.not_started)
            try:
                self._guarded(plan, lambda plan: self._runner.dispatch_sample(plan, masks))
            except StepNotStartedError as error:
                return self._retry(share, error)
            return dataclasses.replace(step, waits=False)
        except DeviceFaultError as fault:
            fault.plan = plan
            raise

    def _dispatch(self, share: _Share) -> DispatchedStep:
        plan = share.plan
        if self._most_rows is not None and self._too_large(plan):
            return self._in_parts(plan, share.parts(self._most_rows, self._buckets))
        try:
            return DispatchedStep(plan, ((plan, self._start(share)),))
        except StepNotStartedError as error:
            return self._retry(share, error)

    def _retry(self, share: _Share, error: StepNotStartedError) -> DispatchedStep:
        plan = share.plan
        _log.warning("step %d, %d rows, not started: %s; trying halves of it", plan.step, plan.num_rows, error)
        return self._in_parts(plan, self._halves(share.without_copies(error)))

    def _too_large(self, plan: StepPlan) -> bool:
        return self._most_rows is not None and plan.num_rows > self._most_rows

    def done(self, step: DispatchedStep) -> bool:
        """Tells whether the device has finished what was dispatched of a step; never waits."""
        return all(pending is None or self._runner.done(pending) for _, pending in step.parts)

    def collect(self, step: DispatchedStep) -> StepResult:
        """Waits for a step and returns its ids, NOT_FINITE for rows that were given up. Raises DeviceFaultError."""
        try:
            results = [self._collect(*part) for part in step.parts]
        except DeviceFaultError as fault:
            fault.plan = step.plan
            raise
        self._most_rows = None
        return results[0] if len(results) == 1 else _joined(results)

    def reset(self, failed: StepPlan) -> None:
        """Recreates the device's arrays after a DeviceFaultError.

        Steps then have at most half the rows of the failed one, until one of them succeeds.
        """
        self._runner.reset()
        self._most_rows = max(1, failed.num_rows // 2)

    def _start(self, share: _Share) -> Pending:
        try:
            pending = self._runner.dispatch_forward(share.plan)
            self._runner.dispatch_sample(share.plan, share.masks)
            return pending
        except StepNotStartedError:
            raise
        except Exception as error:
            raise DeviceFaultError(share.plan, error) from error

    def _guarded(self, plan: StepPlan, call: Callable[[StepPlan], Pending]) -> Pending:
        """Calls the runner and converts every error but StepNotStartedError to a DeviceFaultError."""
        try:
            return call(plan)
        except StepNotStartedError:
            raise
        except Exception as error:
            raise DeviceFaultError(plan, error) from error

    def _collect(self, plan: StepPlan, pending: Pending | None) -> StepResult:
        if pending is None:
            counts = None if plan.decodes.counts is None else np.ones(len(plan.decodes), np.int32)
            lost = np.full(plan.num_sampled, NOT_FINITE, np.int32)
            pooled = np.full((plan.num_pooled, 1), np.nan) if plan.num_pooled else None
            return StepResult(lost, counts, scores=LogprobColumns.unknown(len(plan.scores), 0), pooled=pooled)
        try:
            return self._runner.collect(pending)
        except Exception as error:
            raise DeviceFaultError(plan, error) from error

    def _in_parts(self, plan: StepPlan, todo: list[_Share]) -> DispatchedStep:
        """Starts parts one after another, and halves of those that cannot be started."""
        parts: list[tuple[StepPlan, Pending | None]] = []
        failed: list[tuple[str, str]] = []
        while todo:
            share = todo.pop(0)
            try:
                parts.append((share.plan, self._start(share)))
            except StepNotStartedError as error:
                share = share.without_copies(error)
                if share.plan.num_rows > 1:
                    todo[:0] = self._halves(share)
                else:
                    parts.append((share.plan, self._alone(share, failed)))
        return DispatchedStep(plan, tuple(parts), tuple(failed))

    def _alone(self, share: _Share, failed: list[tuple[str, str]]) -> Pending | None:
        """Retries a single row once, and adds it to `failed` when that row itself cannot be computed."""
        try:
            return self._start(share)
        except StepNotStartedError as error:
            self._check(share.without_copies(error).plan, error)
            for request_id in share.plan.request_ids:  # one and its forks; none where the step only copies pages
                _log.error("request %r cannot be computed: %s", request_id, error, exc_info=error)
                failed.append((request_id, f"the request cannot be computed: {error}"))
            return None

    def _check(self, part: StepPlan, error: StepNotStartedError) -> None:
        """Raises DeviceFaultError when a step without rows cannot be started either, so that no row is at fault. It
        makes the part's copies of pages and writes to page tables, which others may need."""
        nothing = dataclasses.replace(
            part,
            decodes=NO_DECODES,
            chunks=(),
            forks=(),
            samples=NO_SAMPLES,
            token_bucket=self._buckets.tokens[0],
            row_bucket=self._buckets.rows[0],
            num_tokens=0,
            scores=NO_SCORES,
        )
        try:
            pending = self._start(_Share(nothing, None))
        except StepNotStartedError as again:
            raise DeviceFaultError(part, again) from error
        self._collect(nothing, pending)

    def _halves(self, share: _Share) -> list[_Share]:
        return share.parts(max(1, -(-share.plan.num_rows // 2)), self._buckets)


def _joined(results: list[StepResult]) -> StepResult:
    """Concatenates the results of parts: the ids of the decoding rows come first in each, and only one part has both
    these and chunks."""
    token_ids = np.concatenate([np.asarray(one.token_ids, np.int32) for one in results])
    counts = [np.asarray(one.counts, np.int32) for one in results if one.counts is not None]
    logprobs = _joined_logprobs([(one.logprobs, len(one.token_ids)) for one in results])
    scores = _joined_logprobs([(one.scores, 0) for one in results])
    pooled = _joined_pooled([one.pooled for one in results if one.pooled is not None])
    return StepResult(token_ids, np.concatenate(counts) if counts else None, logprobs, scores, pooled)


def _joined_pooled(parts: Sequence[np.ndarray]) -> np.ndarray | None:
    """Joins the pooled sums of parts; those of a row that was given up have one number, as wide as the others here."""
    if not parts:
        return None
    width = max(part.shape[1] for part in parts)
    return np.concatenate([np.broadcast_to(part, (len(part), width)) for part in parts])


def _joined_logprobs(parts: Sequence[tuple[LogprobColumns | None, int]]) -> LogprobColumns | None:
    """Joins the log-probabilities of parts, each with the number of tokens that a part without any has: those are
    unknown, and so are those of a row that was given up."""
    width = max((part.width for part, _ in parts if part is not None), default=None)
    if width is None:
        return None
    joined = []
    for part, count in parts:
        if part is None or part.width < width:
            part = LogprobColumns.unknown(count if part is None else len(part), width)
        joined.append(part)
    return LogprobColumns.joined(joined)
