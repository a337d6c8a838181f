"""Runs the engine's loop on a virtual clock: the real scheduler and page pool over a device that only takes time.

Each iteration, as in `jaxserve/engine/core.py`, takes the messages that have arrived, schedules and dispatches a step,
waits for the ids of the previous step and processes them. So one step is always in flight (more where steps sample
nothing), a request that arrives meanwhile waits for the next iteration, and a sequence that stops is seen one step
late.

A request's tokens are its answer's id (`submit`), and the stop id last: prompts that repeat an answer have its tokens.

Decode steps during which nothing arrives, ends or changes places are fast-forwarded (`Scheduler.fast_forward_steps`,
`advance`): numpy sums their times, and the records and final state equal those of single steps, bit by bit.
"""

from __future__ import annotations

import dataclasses
import heapq
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxserve.config.settings import EngineConfig
from jaxserve.kv_cache.content_keys import ContentKeys
from jaxserve.kv_cache.eviction import make_eviction
from jaxserve.kv_cache.page_groups import PageGroups
from jaxserve.kv_cache.page_pool import PagePool
from jaxserve.planning.step_cost_models import CostModel
from jaxserve.request import EngineRequest, RequestStatus
from jaxserve.scheduler import Scheduler, SequenceUpdate, StepPlan, StepResult, StepUpdate
from jaxserve.scheduler.buckets import Buckets
from jaxserve.scheduler.prefix_costs import page_seconds
from jaxserve.scheduler.step_shape import StepShape, shape_of
from jaxserve.simulator.fast_forward import pages_over, stretch_times
from jaxserve.simulator.prompt_content import STOP_ID, UNKNOWN_ID
from jaxserve.simulator.records import StepLog, TokenLog
from jaxserve.telemetry.engine_events import EngineEvents, IterationTimes
from jaxserve.telemetry.recorder import Recorder

_NEVER = -1


class _Answer(NamedTuple):
    """What a request generates: the position of its last token, and the id of the others."""

    last_position: int
    token_id: int


_NO_ANSWER = _Answer(_NEVER, UNKNOWN_ID)
_LONGEST_STRETCH = 4096


@dataclasses.dataclass(frozen=True)
class SimulatedDevice:
    """Describes what the engine would learn from its runner.

    Attributes:
        num_pages: counts the null page.
        platform: determines the buckets.
        group_windows: of each group of layers, the positions that they attend to; None for all.
    """

    num_pages: int
    max_model_len: int
    platform: str = "gpu"
    num_host_pages: int = 0
    group_windows: tuple[int | None, ...] = (None,)

    def pool_tokens(self, config: EngineConfig) -> int:
        """Returns the number of tokens of the longest request that the pages hold."""
        step_tokens = Buckets.from_config(config, self.platform).tokens[-1]
        groups = PageGroups(config.cache.page_size, self.group_windows, step_tokens)
        return groups.pool_tokens(self.num_pages - 1, self.max_model_len)


@dataclasses.dataclass(frozen=True)
class _Flight:
    """A step in flight: its plan and shape, its ids, when it ends, and whether one of its ids ends a sequence."""

    plan: StepPlan
    shape: StepShape
    token_ids: np.ndarray
    end: float
    stops: bool


@dataclasses.dataclass
class Outcome:
    """Result of one request, in seconds of the virtual clock; nan is never.

    reason: "" while unfinished, "refused" when the queue was full.
    cached_tokens: of the prompt, found in the prefix cache.
    """

    arrived: float = math.nan
    scheduled: float = math.nan
    first_token: float = math.nan
    finished: float = math.nan
    tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    reason: str = ""


class SimulatedEngine:
    """Simulates one replica. `submit` requests before they arrive and `run_until` a time; `now` is its clock.

    Request ids are the requests' numbers as text; `outcomes`, `tokens` and `steps` hold the results.
    """

    def __init__(
        self,
        config: EngineConfig,
        device: SimulatedDevice,
        costs: CostModel,
        *,
        content_keys: ContentKeys | None = None,
        recorder: Recorder | None = None,
        stretches: bool = True,
        on_finish: Callable[[int], object] | None = None,
        start: float = 0.0,
    ):
        """Creates an idle engine.

        Args:
            content_keys: make requests share pages; None where their token ids tell nothing.
            recorder: gets every event of the real engine, which costs time for each step of a stretch too.
            stretches: False goes step by step.
            on_finish: called with the number of each request that ends, when its outcome is known; it may submit
                others.
        """
        cache, buckets = config.cache, Buckets.from_config(config, device.platform)
        eviction = make_eviction(cache.eviction_policy, page_seconds(costs.seconds, cache.page_size, buckets))
        caches_on_host = content_keys is not None and cache.enable_host_caching
        pool = PagePool(
            device.num_pages, cache.page_size, device.num_host_pages, eviction, caches_on_host=caches_on_host
        )
        self.scheduler = Scheduler(
            config.scheduler,
            pool,
            buckets,
            costs=costs.preemption,
            max_model_len=device.max_model_len,
            group_windows=device.group_windows,
            step_seconds=costs.seconds,
            content_keys=content_keys,
        )
        self.costs = costs
        self.now = start
        self.steps = StepLog()
        self.tokens = TokenLog()
        self.outcomes: dict[int, Outcome] = {}
        self._host = costs.host
        self._events = None if recorder is None else EngineEvents(recorder, self.scheduler)
        self._stretches = stretches
        self._on_finish = on_finish
        self._inbox: list[tuple[float, int, EngineRequest]] = []  # a heap of (arrival, order of submission, request)
        self._num_submitted = 0
        self._answers: dict[str, _Answer] = {}  # of unfinished requests
        self._deadlines: list[float] = []  # a heap
        self._stop_at = np.full(config.scheduler.max_num_seqs, _NEVER)  # position of each slot's last token
        self._answer_ids = np.full(config.scheduler.max_num_seqs, UNKNOWN_ID)  # of each slot
        self._in_flight: _Flight | None = None
        self._free_at = start  # the device

    @property
    def busy(self) -> bool:
        """Whether an iteration has something to do."""
        return self.scheduler.unfinished or self._in_flight is not None

    @property
    def num_unfinished(self) -> int:
        """Number of requests submitted and not ended."""
        return len(self._answers)

    def submit(self, request: EngineRequest, output_tokens: int, answer_id: int = UNKNOWN_ID) -> None:
        """Submits a request that arrives at its arrival_time; of equal times, those submitted first arrive first.

        output_tokens: its true length. answer_id: the id of every token but the last.
        """
        last_position = len(request.prompt_token_ids) + output_tokens - 1
        self._answers[request.request_id] = _Answer(last_position, answer_id)
        heapq.heappush(self._inbox, (request.arrival_time, self._num_submitted, request))
        self._num_submitted += 1

    def run_until(self, limit: float = math.inf) -> None:
        """Runs every iteration that begins before `limit`, with the requests submitted so far."""
        while True:
            self._take_messages()
            if not self.busy:
                if not self._inbox or self._inbox[0][0] >= limit:
                    return
                self.now = max(self.now, self._inbox[0][0])
            elif self.now >= limit:
                return
            elif not self._take_stretch(limit):
                self._turn(limit)

    def _take_messages(self) -> None:
        while self._inbox and self._inbox[0][0] <= self.now:
            arrival, _, request = heapq.heappop(self._inbox)
            index = int(request.request_id)
            outcome = self.outcomes[index] = Outcome(arrival)
            try:
                self.scheduler.add(request)
            except ValueError:
                outcome.reason, outcome.finished = "refused", self.now
                self._ended(index)
                continue
            if request.options.deadline is not None:
                heapq.heappush(self._deadlines, request.options.deadline)
            if self._events is not None:
                self._events.arrived(request, arrival)

    def _turn(self, limit: float) -> None:
        """Runs one iteration of the loop."""
        previous, begin = self._in_flight, self.now
        expired = self.scheduler.expire(begin)
        plan = self.scheduler.schedule(begin)
        time = begin
        if plan is None:
            self._in_flight = None
        else:
            time += self._host.before + self._host.before_per_row * plan.num_rows
            self._in_flight = self._dispatch(plan, begin, time)
        if previous is not None:
            if previous.plan.num_sampled:
                time = max(time, previous.end)  # otherwise there is nothing to wait for
            update = self.scheduler.update(previous.plan, StepResult(previous.token_ids), time)
            self._take_update(update, time)
            time += self._host.after + self._host.after_per_row * previous.plan.num_rows
        for each in expired:
            self._take(each, time)
        self.now = time
        if plan is None and previous is None and not expired:
            self._wait(limit)

    def _dispatch(self, plan: StepPlan, begin: float, time: float) -> _Flight:
        for sequence in self.scheduler.admitted:
            if not sequence.num_preemptions:
                self.outcomes[int(sequence.request_id)].scheduled = time
        shape = shape_of(plan)
        start = max(time, self._free_at)
        free = start - self._free_at
        idle, unused = (free, 0.0) if self._in_flight is not None else (0.0, free if plan.step else 0.0)
        end = self._free_at = start + self.costs.seconds(shape)
        pool, preempted = self.scheduler.pool, self.scheduler.preempted
        swapped = sum(sequence.status is RequestStatus.SWAPPED for sequence in preempted)
        self.steps.add(
            (
                begin,
                start,
                end,
                shape.prefill_tokens,
                shape.decode_rows,
                plan.num_rows,
                plan.token_bucket,
                plan.row_bucket,
                pool.num_used,
                pool.num_cached,
                pool.num_host_used,
                self.scheduler.num_waiting,
                self.scheduler.num_running,
                self.scheduler.num_swapped,
                len(preempted) - swapped,
                swapped,
            )
        )
        if self._events is not None:
            previous = self._in_flight
            collected = time if previous is None or not previous.plan.num_sampled else max(time, previous.end)
            times = IterationTimes(begin, time, time, collected, collected + self._host.after)
            self._events.planned(time)
            self._events.step(plan, times, idle, unused, number=plan.step, pages_used=pool.num_used)
        token_ids, stops = self._sample(plan)
        return _Flight(plan, shape, token_ids, end, stops)

    def _sample(self, plan: StepPlan) -> tuple[np.ndarray, bool]:
        """Returns the ids of a step, int64 [num_sampled], and whether one of them ends a sequence."""
        for chunk in plan.chunks:
            if chunk.admit is not None:
                answer = self._answers.get(chunk.request_id, _NO_ANSWER)
                self._stop_at[chunk.slot], self._answer_ids[chunk.slot] = answer
        slots = plan.samples.slots
        found = plan.samples.positions == self._stop_at[slots]
        return np.where(found, STOP_ID, self._answer_ids[slots]), bool(found.any())

    def _wait(self, limit: float) -> None:
        """Advances the clock until a batch fills, a delay ends or a request arrives."""
        wake = self.scheduler.wake_at()
        until = min(math.inf if wake is None else wake, self._inbox[0][0] if self._inbox else math.inf, limit)
        if math.isinf(until):
            raise RuntimeError(f"the scheduler has requests, but nothing to compute and no time to wake: {self.now} s")
        # A time to wake that has come already makes no progress by itself: the clock takes the least step.
        self.now = max(until, math.nextafter(self.now, math.inf))

    def _take_stretch(self, limit: float) -> bool:
        """Fast-forwards iterations that only repeat the step in flight; returns False where there are fewer than
        two.
        """
        previous = self._in_flight
        if previous is None or not self._stretches or previous.stops or previous.plan.chunks:
            return False
        decodes = previous.plan.decodes
        if len(decodes) != self.scheduler.num_running:
            return False
        most = min(self.scheduler.fast_forward_steps(), _LONGEST_STRETCH)
        if most < 2:
            return False
        most = min(most, int((self._stop_at[decodes.slots] - decodes.starts).min()) - 1)
        if most < 2:
            return False
        before = self._host.before + self._host.before_per_row * len(decodes)
        after = self._host.after + self._host.after_per_row * len(decodes)
        shape = previous.shape._replace(
            decode_context=previous.shape.decode_context + previous.shape.decode_rows,
            longest=previous.shape.longest + 1,
        )
        begins, starts, ends = stretch_times(
            self.now, previous.end, self.costs.stretch_seconds(shape, most), before, after
        )
        turns = int(begins.searchsorted(self._next_event(limit)))
        if turns < 2:
            return False
        self._carry_out(previous, shape, begins[:turns], starts[:turns], ends[:turns])
        self.now = float(starts[turns - 1]) + after
        return True

    def _next_event(self, limit: float) -> float:
        """Returns the earliest time at which an iteration may find something new."""
        moment = min(limit, self._inbox[0][0]) if self._inbox else limit
        while self._deadlines and self._deadlines[0] <= self.now:
            heapq.heappop(self._deadlines)
        if self._deadlines:
            moment = min(moment, self._deadlines[0])
        wake = self.scheduler.wake_at()
        return moment if wake is None or wake <= self.now else min(moment, wake)

    def _carry_out(
        self, previous: _Flight, shape: StepShape, begins: np.ndarray, starts: np.ndarray, ends: np.ndarray
    ) -> None:
        """Runs fast-forwarded iterations: processes `previous`, schedules as many steps and leaves the last in
        flight.
        """
        turns = len(begins)
        pool, scheduler = self.scheduler.pool, self.scheduler
        request_ids = previous.plan.decodes.request_ids
        update = scheduler.update(previous.plan, StepResult(previous.token_ids))
        assert not update.others, "a step without a stop id ended a sequence"
        used, cached = pool.num_used, pool.num_cached
        scheduler.advance(turns - 1, previous.token_ids.tolist(), begins[:-1].tolist())
        plan = scheduler.schedule(float(begins[-1]))
        assert plan is not None, "a steady step is missing"
        assert plan.num_sampled == len(request_ids), "a steady step has other rows"
        pages = pages_over(previous.plan, turns, used, pool.num_used)
        kept = np.minimum(cached, pool.num_usable - pages)  # free pages are taken before cached ones
        count = shape.decode_rows
        self.steps.add_many(
            begins, starts, ends, 0, count, count, plan.token_bucket, plan.row_bucket, pages, kept,
            pool.num_host_used, scheduler.num_waiting, scheduler.num_running, scheduler.num_swapped, 0, 0,
        )  # fmt: skip
        self.tokens.add_many(request_ids, starts)
        if self._events is not None:
            before = self._host.before + self._host.before_per_row * count
            numbers = range(plan.step - turns + 1, plan.step + 1)
            columns = (begins.tolist(), starts.tolist(), pages.tolist(), kept.tolist())
            for number, begin, start, used, cached in zip(numbers, *columns, strict=True):
                times = IterationTimes(begin, begin + before, begin + before, start, start + self._host.after)
                self._events.step(plan, times, 0.0, number=number, pages_used=used, pages_cached=cached)
                self._events.tokens(request_ids, start)
        self._free_at = float(ends[-1])
        token_ids, stops = self._sample(plan)
        last = shape._replace(
            decode_context=shape.decode_context + count * (turns - 1), longest=shape.longest + turns - 1
        )
        self._in_flight = _Flight(plan, last, token_ids, float(ends[-1]), stops)

    def _take_update(self, update: StepUpdate, time: float) -> None:
        request_ids = update.request_ids
        if request_ids:
            self.tokens.add(request_ids, time)
        if self._events is not None:
            self._events.gaps_exceeded(update.gaps, time)
            others = [each.sequence.request_id for each in update.others if each.token_ids]
            if request_ids or others:
                self._events.tokens((*request_ids, *others), time)
        for each in update.others:
            self._take(each, time)

    def _take(self, update: SequenceUpdate, time: float) -> None:
        sequence = update.sequence
        index = int(sequence.request_id)
        outcome = self.outcomes[index]
        if update.token_ids:
            self.tokens.add_one(index, time)
            if math.isnan(outcome.first_token):
                outcome.first_token = time
                if self._events is not None:
                    self._events.first_token(sequence, time)
        if update.finish_reason is None:
            return
        outcome.finished, outcome.reason = time, update.finish_reason.value
        outcome.tokens = len(sequence.output_token_ids)
        outcome.cached_tokens = sequence.num_cached_tokens
        outcome.preemptions = sequence.num_preemptions
        if self._events is not None:
            self._events.finished(sequence, update.finish_reason, time)
        self._ended(index)

    def _ended(self, index: int) -> None:
        del self._answers[str(index)]
        if self._on_finish is not None:
            self._on_finish(index)
