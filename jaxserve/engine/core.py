"""Runs the engine loop: schedules step N + 1 and dispatches it, then reads the ids of step N.

    message -> handle -> Scheduler.add
    step:  plan    = scheduler.schedule(now)
           pending = executor.dispatch_forward(plan)   returns without waiting; samples too, unless a row wants a mask
           result  = executor.collect(previous)        the only wait
           updates = scheduler.update(previous plan, result)
           executor.dispatch_sample(pending, masks)    if one does: its mask needs the ids of the step before
    -> one TokenBatch for the rows that go on, an EngineOutput for each of the others

What `step` returns is sent while the device computes the step after. The loop knows the scheduler and the Runner
protocol and nothing of jax, sockets or text.

A step that fails after it was started destroys the content of the device's pages. The loop then has the runner allocate
them anew, preempts all running requests for recomputation, and goes on; a second such fault within `FAULT_SECONDS` ends
it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as List

from jaxserve.config.settings import EngineConfig, ineffective_settings
from jaxserve.engine.cache_control import CacheControl
from jaxserve.engine.constraints import CombinedConstraints, Constraints
from jaxserve.engine.constraints.compiled_grammars import CompiledGrammars
from jaxserve.engine.constraints.grammar_constraints import GrammarConstraints
from jaxserve.engine.constraints.grammar_wait import LOOK_SECONDS, GrammarWait
from jaxserve.engine.constraints.token_masks import TokenMasks
from jaxserve.engine.core_setup import make_scheduler, ready_message
from jaxserve.engine.idle import IdleMeter
from jaxserve.engine.messages import (
    AbortRequest,
    AddRequest,
    AskProgress,
    CaptureProfile,
    CaptureTimeline,
    EngineOutput,
    EngineReady,
    EngineStats,
    FlushPrefixCache,
    FollowCacheEvents,
    FromEngine,
    ProfileCaptured,
    Progress,
    TimelineEvents,
    ToEngine,
)
from jaxserve.engine.output_messages import OutputMessages
from jaxserve.engine.step_executor import DeviceFaultError, DispatchedStep, EngineBrokenError, StepExecutor
from jaxserve.engine.step_time import StepTimePrediction
from jaxserve.request import EngineRequest, FinishReason
from jaxserve.runner.protocol import Runner
from jaxserve.scheduler import PageAllocationError, SequenceUpdate, StepPlan, Wants
from jaxserve.scheduler.buckets import Buckets
from jaxserve.telemetry.engine_events import EngineEvents, IterationTimes
from jaxserve.telemetry.engine_meter import EngineMeter
from jaxserve.telemetry.recorder import Recorder
from jaxserve.telemetry.timeline_capture import TimelineCapture

_log = logging.getLogger(__name__)

STATS_SECONDS = 0.1
"""Interval, in seconds, at which the front end receives the counts while steps follow one another."""

FAULT_SECONDS = 60.0
"""An engine whose steps fail twice within this many seconds is considered broken."""

RANKING_SECONDS = 1.0
"""Interval, in seconds, at which Kendall's tau is recalculated, which takes about half a millisecond."""


class EngineCore:
    """Runs one scheduler over one runner. `handle` and `step` return messages for the front end, in order."""

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        *,
        recorder: Recorder | None = None,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.perf_counter,
        annotate: Callable[[str], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
        constraints: Constraints | None = None,
        grammars: CompiledGrammars | None = None,
    ):
        """Creates the scheduler and the page pool that fit the runner.

        Args:
            config: the engine's settings.
            runner: executes the steps.
            recorder: receives the engine's events; by default a new one.
            now: seconds of `time.time`, the clock of arrival times and deadlines.
            clock: a monotonic clock, in seconds.
            annotate: names a part of the loop in a profile of the host.
            constraints: makes masks of requests that are constrained otherwise than by a grammar or lists of tokens;
                None if there are none.
            grammars: compiles the grammars of requests; None refuses those.
        """
        info = runner.info
        self.config = config
        self.runner = runner
        for line in ineffective_settings(config, info.max_model_len):
            _log.warning("%s", line)
        buckets = Buckets.from_config(config, info.platform, info.tokens_per_step)
        self.scheduler = make_scheduler(config, runner, buckets)
        self._cache_control = CacheControl(self.scheduler, runner)
        for line in () if self.scheduler.decode_gap is None else self.scheduler.decode_gap.warnings:
            _log.warning("%s", line)
        others = (TokenMasks(info.vocab_size),) if constraints is None else (TokenMasks(info.vocab_size), constraints)
        self._constraints = CombinedConstraints(
            others,
            None
            if grammars is None
            else GrammarConstraints(grammars, info.eos_token_ids, config.structured_outputs.mask_threads),
        )
        self._compiling = GrammarWait()
        self.recorder = recorder or Recorder(clock=clock)
        self._events = EngineEvents(self.recorder, self.scheduler, self._rows_together())
        self._meter = EngineMeter()
        self.recorder.subscribe(self._meter)
        self._outputs = OutputMessages(self._events, self._meter, self._constraints.forget)
        self._capture = TimelineCapture(self.recorder)
        self._now = now
        self._clock = clock
        self._annotate = annotate
        self._in_flight: DispatchedStep | None = None
        self._executor = StepExecutor(runner, buckets)
        self._step_time = StepTimePrediction(runner.step_costs)
        self._fault_at = -math.inf  # on the clock
        self._turns = 0
        self._in_turn = False
        self._idle = IdleMeter()
        self._nothing_to_do = False  # as of the last `step`
        self._stats_due = 0.0  # on the clock
        self._tau: float | None = None
        self._tau_due = 0.0  # on the clock
        self._totals = dict.fromkeys(("num_steps", "computed_tokens", "padding_tokens", "num_dropped"), 0)

    @property
    def busy(self) -> bool:
        """Tells whether requests are unfinished or a step is in flight."""
        return self.scheduler.unfinished or self._in_flight is not None or len(self._compiling) > 0

    @property
    def pause(self) -> float | None:
        """Returns the seconds until `step` next has something to do if no message arrives first; None if it has
        already.

        Only a batch that waits for more requests causes such a pause, a grammar that is being compiled, and pages that
        are read from disk.
        """
        if self._in_flight is not None or not self._nothing_to_do:
            return None
        if self.scheduler.pool.host.num_loading:
            return LOOK_SECONDS
        wake_at = self.scheduler.wake_at()
        pause = None if wake_at is None else max(0.0, wake_at - self._now())
        if len(self._compiling):
            return LOOK_SECONDS if pause is None else min(pause, LOOK_SECONDS)
        return pause

    def ready(self, start_seconds: float) -> EngineReady:
        """Returns the message that describes the engine to the front end."""
        pool_tokens = self.scheduler.page_groups.pool_tokens(
            self.runner.info.usable_pages, self.runner.info.max_model_len
        )
        return ready_message(self.config, self.runner.info, pool_tokens, start_seconds)

    def handle(self, message: ToEngine) -> list[FromEngine]:
        """Handles one message. A request that cannot be queued is answered with an error at once."""
        self._nothing_to_do = False
        if isinstance(message, AddRequest):
            return self._add(message)
        if isinstance(message, AbortRequest):
            messages: list[FromEngine] = self._abort(message.request_id)
        elif isinstance(message, AskProgress):
            return [self.progress(message.beat)]
        elif isinstance(message, CaptureTimeline):
            (self._capture.start if message.on else self._capture.stop)()
            return [self._captured()]
        elif isinstance(message, CaptureProfile):
            reason = "a profile needs an engine in a process of its own (engine_process)"
            return [ProfileCaptured(message.directory, reason)]
        elif isinstance(message, FlushPrefixCache | FollowCacheEvents):
            messages = self._cache_control.handle(message)
        else:
            messages = self._abort_all()
        return [*messages, self.stats()] if messages and not self.busy else messages

    def step(self) -> list[FromEngine]:
        """Dispatches the next step and collects the one before; call it while `busy`.

        Raises:
            EngineBrokenError: the engine cannot go on; every unfinished request is lost.
        """
        messages: list[FromEngine] = []
        self._turns, self._in_turn = self._turns + 1, True
        try:
            try:
                self._step(messages)
            except PageAllocationError as error:
                self._plan_anew(error, messages)
        except DeviceFaultError as fault:
            self._recover(fault, messages)
        finally:
            self._in_turn = False
        messages += self._cache_control.events()
        return messages

    def progress(self, beat: int) -> Progress:
        """Reports how far the loop is; may be called from any thread.

        Args:
            beat: the number of the question, which the answer repeats.
        """
        return Progress(beat, self._turns, self._in_turn, self._step_time.largest_seconds)

    def _step(self, messages: list[FromEngine]) -> None:
        previous = self._in_flight
        begin = self._look(previous)
        with self._annotate("Schedule"):
            messages += self._start_compiled()
            self._cache_control.take_from_disk(self._now())
            messages += [self._outputs.of_request(update, begin) for update in self._expire()]
            plan = self.scheduler.schedule(self._now())
            plan = None if plan is None else self.runner.fitted(plan)
        scheduled = dispatched = collected = self._look(previous)
        idle = unused = 0.0
        self._nothing_to_do = plan is None
        if plan is None:
            self._in_flight = None
        else:
            self._in_flight = self._executor.dispatch_forward(plan)
            dispatched = collected = self._clock()
            if previous is not None:
                idle = self._idle.idle(self._executor.done(previous), dispatched)
            else:
                unused = self._idle.unused(dispatched)
            self._idle.dispatched(dispatched, idle + unused)
            self._events.planned(dispatched)
            self._count(plan)
            self._fail(self._in_flight.failed, dispatched, messages)
        if previous is not None:
            result = self._executor.collect(previous)
            collected = self._look(self._in_flight)
            if plan is None:
                self._idle.emptied(collected)
            messages += self._outputs.of_step(self.scheduler.update(previous.plan, result, self._now()), collected)
        if self._in_flight is not None and self._in_flight.waits:
            self._sample(self._in_flight, messages)
        end = self._look(self._in_flight)
        if plan is not None:
            times = IterationTimes(begin, scheduled, dispatched, collected, end)
            self._events.step(
                plan,
                times,
                idle,
                unused,
                number=plan.step,
                pages_used=self.scheduler.pool.num_used,
                pack_seconds=self.runner.pack_seconds,
                rows_together=self._rows_together(),
            )
        if end >= self._stats_due or not self.busy:
            self._stats_due = end + STATS_SECONDS
            if previous is not None and plan is not None:
                self._step_time.observe(previous.plan, collected - begin)
            messages.append(self.stats())
            if self._capture.is_on:
                messages.append(self._captured())

    def _rows_together(self) -> int:
        return self.runner.shared_reads().get("rows_together", 0)

    def _captured(self) -> TimelineEvents:
        rows, dropped = self._capture.take()
        return TimelineEvents(rows, not self._capture.is_on, dropped)

    def _sample(self, step: DispatchedStep, messages: list[FromEngine]) -> None:
        """Makes a step's masks while the device runs its forward program, then dispatches its sampling."""
        start = self._clock()
        with self._annotate("Mask"):
            sequences = self.scheduler.masked_sequences(step.plan)
            made = self._constraints.masks(sequences, self.runner.info.vocab_size)
        self._meter.masked(self._clock() - start)
        self._in_flight = self._executor.dispatch_sample(step, made.masks)
        now = self._clock()
        self._fail((*made.failed, *self._in_flight.failed), now, messages)
        for request_id in made.complete:
            update = self.scheduler.complete(request_id)
            if update is not None:
                messages.append(self._outputs.of_request(update, now))

    def _fail(self, failed: Iterable[tuple[str, str]], now: float, messages: list[FromEngine]) -> None:
        """Ends each request with its error: its row could not be computed, or its mask could not be made."""
        for request_id, error in failed:
            update = self.scheduler.fail(request_id, error)
            if update is not None:
                messages.append(self._outputs.of_request(update, now))

    def _plan_anew(self, error: PageAllocationError, messages: list[FromEngine]) -> None:
        """Ends the request whose pages could not be allocated while a step was planned. That plan is lost, so all
        running requests are computed again, after the ids of the step before it are read."""
        now = self._clock()
        _log.error("request %r cannot be computed: %s", error.request_id, error, exc_info=error)
        previous, self._in_flight = self._in_flight, None
        try:
            if previous is not None:
                result = self._executor.collect(previous)
                self._idle.emptied(now)
                messages += self._outputs.of_step(self.scheduler.update(previous.plan, result), now)
        finally:
            self._fail([(error.request_id, f"the request cannot be computed: {error}")], now, messages)
            self._events.restarted(self.scheduler.restart(self.scheduler.lost_copies), now)
            messages.append(self.stats())

    def _recover(self, fault: DeviceFaultError, messages: list[FromEngine]) -> None:
        """Continues after a fault that destroyed the content of the device's pages.

        Raises EngineBrokenError when it is the second one within FAULT_SECONDS, or the device does not recover.
        """
        now = self._clock()
        if now - self._fault_at < FAULT_SECONDS:
            raise EngineBrokenError(
                f"step {fault.plan.step} failed {now - self._fault_at:.1f} s after another: {fault}"
            ) from fault
        self._fault_at = now
        _log.error("step %d failed, running requests are computed again: %s", fault.plan.step, fault, exc_info=fault)
        lost, other = [fault.plan], self._in_flight
        self._in_flight = None
        self._idle.emptied(now)
        if other is None or other.plan.step == fault.plan.step:
            pass  # the step that failed was the only one under way
        elif other.plan.step > fault.plan.step or not self._rescue(other, messages):
            lost.append(other.plan)
        copies = itertools.chain.from_iterable(plan.copies for plan in lost)
        self._events.restarted(self.scheduler.restart(copies), now)
        try:
            self._executor.reset(fault.plan)
        except Exception as error:
            raise EngineBrokenError(f"step {fault.plan.step} failed, and the device with it: {error}") from fault

    def _rescue(self, step: DispatchedStep, messages: list[FromEngine]) -> bool:
        """Collects the step before the one that failed; returns False when its ids cannot be read any more."""
        try:
            result = self._executor.collect(step)
        except DeviceFaultError:
            return False
        messages += self._outputs.of_step(self.scheduler.update(step.plan, result, self._now()), self._clock())
        return True

    def stats(self) -> EngineStats:
        """Returns the current counts."""
        scheduler, pool, now = self.scheduler, self.scheduler.pool, self._clock()
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + len(self._compiling),
            pages_free=pool.num_free,
            pages_used=pool.num_used,
            pages_cached=pool.num_cached,
            group_pages=scheduler.group_pages,
            num_executables=self.runner.num_executables,
            num_compilations=self.runner.num_compilations,
            compile_misses=self.runner.compile_misses,
            num_preemptions=scheduler.num_preemptions,
            num_swapped=scheduler.num_swapped,
            pages_swapped=pool.num_host_used,
            num_preemptions_recompute=scheduler.num_preemptions_by_kind["recompute"],
            num_preemptions_swap=scheduler.num_preemptions_by_kind["swap"],
            kendall_tau=self._ranking(now),
            device_busy_seconds=self._idle.busy_seconds(now),
            step_histograms=self._meter.step_histograms(),
            **{f"num_gap_exceeded_{cause}": count for cause, count in scheduler.num_gaps_exceeded.items()},
            **self._cache_control.stats(),
            prompt_tokens=self._outputs.prompt_tokens,
            generation_tokens=self._outputs.generation_tokens,
            **self._totals,
        )

    def close(self) -> None:
        """Ends all requests and, where cached pages go to disk, writes those that are not there yet."""
        if self.runner.disk is None:
            return
        self._abort_all()
        if self._in_flight is not None:
            previous, self._in_flight = self._in_flight, None
            self.scheduler.update(previous.plan, self._executor.collect(previous))
        self.runner.close(self.scheduler.pool.part_all())

    def check_integrity(self) -> None:
        """Asserts the invariants of scheduler and pool; O(pages)."""
        self.scheduler.check_integrity()

    def _add(self, message: AddRequest) -> list[FromEngine]:
        request, names = message.request, message.sample_ids
        requests = [request, *[request.sample(index, name) for index, name in enumerate(names, start=1)]]
        try:
            masked = [self._constraints.constrains(one) for one in requests]
            compilations = [self._constraints.compiled(one) for one in requests]
        except ValueError as error:
            return self._refused(requests, str(error))
        if compilations[0] is None:
            return self._queue(requests, masked=masked[0])
        self._compiling.add(requests, compilations[0])  # they have one grammar
        return self._start_compiled()

    def _queue(self, requests: List[EngineRequest], *, masked: bool) -> list[FromEngine]:
        """Queues the samples of one prompt, which want the same."""
        wants = Wants.MASK if masked else Wants.NONE
        if requests[0].logprobs is not None:
            wants |= Wants.LOGPROBS
        try:
            if len(requests) > 1:
                self.scheduler.add_samples(requests, [wants] * len(requests))
            else:
                self.scheduler.add(requests[0], wants)
        except ValueError as error:
            return self._refused(requests, str(error))
        now = self._clock()
        for one in requests:
            self._events.arrived(one, now)
        return []

    def _start_compiled(self) -> list[FromEngine]:
        """Queues the requests whose grammars have been compiled."""
        messages: list[FromEngine] = []
        for requests, error in self._compiling.ready() if len(self._compiling) else ():
            messages += self._refused(requests, error) if error else self._queue(requests, masked=True)
        return messages

    def _refused(self, requests: List[EngineRequest], error: str) -> list[FromEngine]:
        for request in requests:
            if request.request_id not in self.scheduler:  # of another request, it may
                self._constraints.forget(request.request_id)
        return [EngineOutput(request.request_id, (), FinishReason.ERROR, error) for request in requests]

    def _abort(self, request_id: str) -> list[FromEngine]:
        if self._compiling.remove(request_id):
            self._constraints.forget(request_id)
            return [EngineOutput(request_id, (), FinishReason.ABORT)]
        update = self.scheduler.abort(request_id)
        return [] if update is None else [self._outputs.of_request(update, self._clock())]

    def _expire(self) -> list[SequenceUpdate]:
        """Returns the updates of requests dropped while waiting, and the final outputs that a static batch held
        back."""
        ended = self.scheduler.expire(self._now())
        self._totals["num_dropped"] += sum(update.finish_reason is FinishReason.DEADLINE for update in ended)
        return ended

    def _abort_all(self) -> list[FromEngine]:
        request_ids = (*self._compiling.request_ids, *self.scheduler.request_ids)
        return [message for request_id in request_ids for message in self._abort(request_id)]

    def _look(self, in_flight: DispatchedStep | None) -> float:
        """Returns the time, and samples whether the device is busy."""
        now = self._clock()
        if in_flight is not None:
            self._idle.look(self._executor.done(in_flight), now)
        return now

    def _ranking(self, now: float) -> float | None:
        if now >= self._tau_due or not self.busy:
            self._tau_due = now + RANKING_SECONDS
            self._tau = self.scheduler.predictor.kendall_tau
        return self._tau

    def _count(self, plan: StepPlan) -> None:
        self._totals["num_steps"] += 1
        self._totals["computed_tokens"] += plan.num_tokens
        self._totals["padding_tokens"] += plan.padding
