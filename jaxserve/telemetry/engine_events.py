"""Records the events of an engine's loop, for the engine and its simulation alike.

A request that arrives is `arrived`; a plan is `planned`, and a `step` when the loop's iteration is over; an update
gives `tokens`, `first_token` and `finished`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from jaxserve.request import EngineRequest, FinishReason, RequestStatus
from jaxserve.scheduler import Scheduler, Sequence, StepPlan
from jaxserve.scheduler.gap_monitor import GapExceeded
from jaxserve.telemetry.recorder import (
    DecodeGapsExceeded,
    FirstToken,
    Recorder,
    RequestArrived,
    RequestFinished,
    RequestPreempted,
    RequestScheduled,
    StepRecorded,
    TokensProduced,
)


class IterationTimes(NamedTuple):
    """Times at which an iteration of the loop began, had scheduled, had dispatched, had the previous step's ids, and
    ended.
    """

    begin: float
    scheduled: float
    dispatched: float
    collected: float
    end: float


class EngineEvents:
    """Writes the events of one scheduler and its loop into a recorder. Times are of the recorder's clock.

    rows_together: count of the rows that have read shared pages together until now.
    """

    def __init__(self, recorder: Recorder, scheduler: Scheduler, rows_together: int = 0):
        self._record = recorder.record
        self._rows_together = rows_together
        self._scheduler = scheduler

    def arrived(self, request: EngineRequest, time: float) -> None:
        """Records that the scheduler accepted a request."""
        self._record(
            RequestArrived(
                time=time,
                request_id=request.request_id,
                prompt_tokens=len(request.prompt_token_ids),
                max_tokens=request.max_tokens,
                tenant=request.options.tenant,
                priority=request.options.priority,
            )
        )

    def planned(self, time: float) -> None:
        """Records the sequences that the last `schedule` preempted or scheduled for the first time."""
        for sequence in self._scheduler.preempted:
            kind = "swap" if sequence.status is RequestStatus.SWAPPED else "recompute"
            self._record(RequestPreempted(time, sequence.request_id, kind))
        for sequence in self._scheduler.admitted:
            if not sequence.num_preemptions:
                self._record(RequestScheduled(time, sequence.request_id))

    def restarted(self, sequences: Iterable[Sequence], time: float) -> None:
        """Records that the device lost its pages, and that these sequences will be recomputed."""
        for sequence in sequences:
            self._record(RequestPreempted(time, sequence.request_id, "recompute"))

    def step(
        self,
        plan: StepPlan,
        times: IterationTimes,
        idle: float,
        unused: float = 0.0,
        *,
        number: int,
        pages_used: int,
        pages_cached: int | None = None,
        pack_seconds: float = 0.0,
        rows_together: int = 0,
    ) -> None:
        """Records the iteration that created `plan`.

        idle, unused, pack_seconds: as in `StepRecorded`. rows_together: since the process began. number, pages_used,
        pages_cached: of the step, which may be another of the plan's fast-forwarded steps; pages_cached: None for those
        of the pool.
        """
        scheduler, pool = self._scheduler, self._scheduler.pool
        begin, scheduled, dispatched, collected, end = times
        cached = pool.num_cached if pages_cached is None else pages_cached
        together, self._rows_together = rows_together - self._rows_together, rows_together
        self._record(
            StepRecorded(
                time=begin,
                step=number,
                prefill_tokens=plan.num_prefill_tokens,
                decode_tokens=len(plan.decodes),
                rows=plan.num_rows,
                token_bucket=plan.token_bucket,
                row_bucket=plan.row_bucket,
                padding=plan.padding,
                pages_used=pages_used,
                pages_free=pool.num_usable - pages_used - cached,
                pages_cached=cached,
                waiting=scheduler.num_waiting,
                running=scheduler.num_running,
                schedule_seconds=scheduled - begin,
                dispatch_seconds=dispatched - scheduled,
                collect_seconds=collected - dispatched,
                update_seconds=end - collected,
                idle_seconds=idle,
                pages_swapped=pool.num_host_used,
                swapped=scheduler.num_swapped,
                unused_seconds=unused,
                pack_seconds=pack_seconds,
                rows_together=together,
            )
        )

    def tokens(self, request_ids: Iterable[str], time: float) -> None:
        """Records that the host has a token for each of the requests."""
        self._record(TokensProduced(time, tuple(request_ids)))

    def gaps_exceeded(self, gaps: Iterable[GapExceeded], time: float) -> None:
        """Records that requests waited longer for their tokens of `time` than max_decode_gap allows."""
        for gap in gaps:
            self._record(DecodeGapsExceeded(time, gap.cause, gap.count, gap.longest_seconds))

    def first_token(self, sequence: Sequence, time: float) -> None:
        """Records that the host has the sequence's first token, which `tokens` counts too."""
        self._record(FirstToken(time, sequence.request_id))

    def finished(self, sequence: Sequence, reason: FinishReason, time: float) -> None:
        """Records that the sequence ended."""
        self._record(
            RequestFinished(
                time=time,
                request_id=sequence.request_id,
                reason=reason.value,
                prompt_tokens=sequence.num_prompt_tokens,
                output_tokens=len(sequence.output_token_ids),
                preemptions=sequence.num_preemptions,
            )
        )
