"""Implements the runner over a model: weights, pages and slots on the devices, and the compiled programs that use
them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxserve.config.failpoints import Failpoints, InjectedFaultError
from jaxserve.config.settings import EngineConfig
from jaxserve.kv_cache.page_pool import PageCopy, PageState
from jaxserve.logprob_columns import LogprobColumns
from jaxserve.pallas_kernels.paged_attention import IMPLEMENTATIONS
from jaxserve.planning.step_cost_models import FittedCosts
from jaxserve.programs.compiler import CompilationCounter, CompileMissError, ProgramSet
from jaxserve.programs.layout import PENALTY_RUNS
from jaxserve.programs.pooling import sums
from jaxserve.programs.state_programs import mask_words
from jaxserve.programs.step_programs import (
    MASK_WRITE,
    OPTION_WRITE,
    PAGE_COPY,
    TABLE_WRITE,
    ProgramKey,
    Shapes,
    program_keys,
)
from jaxserve.programs.swap_programs import DISK_WAYS, copy_blocks, copy_vector, way
from jaxserve.runner.copy_times import CopyTimes
from jaxserve.runner.disk_start import open_disk
from jaxserve.runner.engine_startup import Startup
from jaxserve.runner.packing import (
    ForwardPacker,
    SamplePacker,
    mask_vectors,
    option_vectors,
    penalty_vectors,
    pooling_vector,
    score_vectors,
    table_vectors,
    unused_option_vector,
)
from jaxserve.runner.protocol import PageCopies, StepNotStartedError
from jaxserve.runner.step_cost_model import step_costs
from jaxserve.runner.step_timing import measure_steps
from jaxserve.runner.swap_timing import measure, swap_copies
from jaxserve.scheduler.plan import NO_DECODES, NO_SAMPLES, PageTableWrite, PenaltyWrite, Scores, StepPlan, StepResult
from jaxserve.scheduler.preemption_costs import PreemptionCosts
from jaxserve.telemetry.startup_spans import StartupSpans

_COUNTER = CompilationCounter()  # one listener a process: jax keeps listeners for good


class _Call(NamedTuple):
    """Pairs a program with the packed vector it is called with."""

    program: Callable[..., Any]
    vector: np.ndarray


class _Writes(NamedTuple):
    """Holds the calls that write a step's state before its forward program: to slots, and to penalty rows."""

    slots: list[_Call]
    penalties: list[_Call]


class _Calls(NamedTuple):
    """Holds the calls of a step's programs: of writes, forward, sample (None without samples), score, and pooling (None
    when nothing is pooled)."""

    writes: _Writes
    forward: _Call
    sample: _Call | None
    scores: list[_Call]
    pooling: _Call | None


@dataclasses.dataclass(eq=False)
class PendingStep:
    """Represents a step in flight.

    hidden: the output of its forward program, until the next step takes it over. sample: the call that samples it; None
    when nothing is sampled. copied: its page copies were made. ids: its sampled ids on the device, int32 [row bucket],
    of which as many are real as `plan.samples` has; None until sampling is dispatched. logprobs: theirs, where a sample
    wants them. scores: blocks of `plan.scores`. pooled: what the pooling program computed, of which the first
    `plan.num_pooled` rows are real; None when nothing is pooled.
    """

    plan: StepPlan
    hidden: jax.Array
    sample: _Call | None
    copied: bool
    scores: tuple[jax.Array, ...] = ()
    ids: jax.Array | None = None
    logprobs: jax.Array | None = None
    pooled: jax.Array | None = None


def annotate(name: str) -> contextlib.AbstractContextManager[object]:
    """Names what the host does inside the `with`, while jax's profiler is on."""
    return jax.profiler.TraceAnnotation(name)


class ModelRunner:
    """Runs a model: executes steps with the programs and arrays that `Startup` has made."""

    _copy_times: CopyTimes | None = None  # none of the copies of the start are counted
    _unsampled: PendingStep | None = None  # the step whose forward program was dispatched last, until it is sampled

    def __init__(
        self, config: EngineConfig, *, progress: bool = False, phases: StartupSpans | None = None, server: bool = False
    ):
        """Starts the runner.

        Args:
            config: the engine's settings.
            progress: shows the progress of compilation.
            phases: startup spans of this process so far; those of this start are added.
            server: the engine belongs to a server; `EngineConfig.ready_when` "auto" depends on it.
        """
        phases = StartupSpans() if phases is None else phases
        startup = Startup(config, progress=progress, phases=phases, server=server)
        made = startup.make()
        self._failpoints = Failpoints(config.failpoints)
        self._shapes, self._programs, self._weights = made.shapes, made.programs, made.weights
        self._arrays, self._host_pages = made.arrays, made.host_pages
        self._copies = made.mesh.devices.flat[0].platform != "cpu"  # there the host reads the device's own memory
        self.disk = open_disk(config, made)
        self._forward_packers, self._sample_packers = packers(self._shapes)
        self.compile_misses = 0
        self.pack_seconds = 0.0
        with phases.phase("warm-up"):
            self._warm_up()
            costs = self._measure_costs() if self._shapes.num_host_pages else None
            bounded = config.scheduler.max_decode_gap is not None
            measured = self._measure_steps(costs) if bounded else None
        startup.log_allocator()
        self.info = startup.info(made, costs)
        self.step_costs = step_costs(self._shapes, made.mesh, measured)
        startup.finish(made)
        self._copy_times = CopyTimes()

    @property
    def num_compilations(self) -> int:
        return _COUNTER.count

    @property
    def programs(self) -> ProgramSet:
        return self._programs

    @property
    def num_executables(self) -> int:
        return len(self._programs.executables)

    def close(self, copies: Sequence[PageCopy] = ()) -> None:
        if self.disk is not None:
            self.disk.close_with(copies, self._copy)

    def page_copies(self) -> dict[str, PageCopies]:
        return {} if self._copy_times is None else self._copy_times.counts()

    def shared_reads(self) -> dict[str, int]:
        counts = IMPLEMENTATIONS[self._shapes.attention].shared_read_counts
        return {} if counts is None else counts()

    def fitted(self, plan: StepPlan) -> StepPlan:
        if not self._programs.missing:
            return plan
        tokens = self._programs.standing_in(self._shapes.forward_key(plan)).size
        rows = self._programs.standing_in(ProgramKey("sample", plan.row_bucket)).size if plan.row_bucket else 0
        return dataclasses.replace(plan, token_bucket=tokens, row_bucket=rows)

    @functools.cached_property
    def _no_masks(self) -> np.ndarray:
        """Returns the masks of a step in which no sample wants one: uint32 [0, words]."""
        return np.zeros((0, mask_words(self._shapes.model.vocab_size)), np.uint32)

    def dispatch_forward(self, plan: StepPlan) -> PendingStep:
        arrays, begun, copied = self._arrays, False, False  # begun: what was enqueued must not be enqueued again
        pooled = None
        try:
            with annotate("Execute"):
                start = time.perf_counter()
                calls = self._prepare(plan)
                self.pack_seconds = time.perf_counter() - start
                begun = bool(plan.copies)
                self._copy(plan.copies)
                copied, begun = begun, False
                self._write(calls.writes)
                self._fail_at("enqueue", plan)
                self._forward(calls.forward)
                if calls.pooling is not None:
                    pooled = self._pool(calls.pooling)
                self._fail_at("execute", plan, lose=True)
                scores = tuple([self._score(call) for call in calls.scores])
        except Exception as error:
            raise self._not_started(error, begun=begun, copied=copied) from error
        self._unsampled = PendingStep(plan, arrays.hidden, calls.sample, copied, scores, pooled=pooled)
        return self._unsampled

    def dispatch_sample(self, plan: StepPlan, masks: np.ndarray | None = None) -> None:
        step, self._unsampled = self._unsampled, None
        if step is None or step.plan is not plan:
            raise ValueError(f"step {plan.step} is to be sampled; its forward program was not the last one dispatched")
        if step.sample is None:
            return
        masked, begun = plan.samples.masked, False
        masks = self._no_masks if masks is None else masks
        if masks.shape != (len(masked), self._no_masks.shape[1]) or masks.dtype != np.uint32:
            raise ValueError(
                f"masks of step {plan.step} are {masks.dtype}{list(masks.shape)}; its samples need "
                f"uint32{[len(masked), self._no_masks.shape[1]]}"
            )
        try:
            with annotate("Sample"):
                for vector in mask_vectors(plan.samples.slots[masked], masks, self._shapes.num_slots):
                    self._arrays.masks = self._program(MASK_WRITE)(self._arrays.masks, vector)
                ids, logprobs = self._sample(step.sample)
                begun = True
                wanted = (ids, logprobs) if plan.wants_logprobs else (ids,)
                if self._copies:
                    for result in wanted:
                        result.copy_to_host_async()
        except Exception as error:
            raise self._not_started(error, begun=begun, copied=step.copied) from error
        step.ids, step.logprobs = ids, logprobs if plan.wants_logprobs else None
        if self._copy_times is not None:
            self._copy_times.before = ids

    def _not_started(self, error: Exception, *, begun: bool, copied: bool) -> Exception:
        """Returns the exception to raise for an error during dispatch: the error itself when the step must not be
        retried.

        Computing the same tokens a second time writes the same keys and values, as do page tables, options and masks,
        and penalty rows, which are emptied first; copying pages twice does not.
        """
        if begun or not self._arrays.intact:
            return error
        return StepNotStartedError(f"{type(error).__name__}: {error}", copied=copied)

    def done(self, pending: PendingStep) -> bool:
        if pending.ids is not None:
            return pending.ids.is_deleted() or _is_ready(pending.ids)
        if pending.scores:
            return pending.scores[-1].is_deleted() or _is_ready(pending.scores[-1])
        return pending.hidden.is_deleted() or _is_ready(pending.hidden)

    def collect(self, pending: PendingStep) -> StepResult:
        self._fail_at("collect", None, lose=True)
        plan, ids, scores, logprobs, pooled = pending.plan, (), None, None, None
        if pending.scores:
            blocks = [LogprobColumns(np.asarray(block)) for block in pending.scores]
            scores = LogprobColumns.joined(blocks).part(0, len(plan.scores))
        if pending.pooled is not None:
            pooled = sums(np.asarray(pending.pooled)[: plan.num_pooled], self._shapes.buckets.tokens[-1])
        if pending.sample is not None:
            assert pending.ids is not None, "a step is collected that was not sampled"
            ids = np.asarray(pending.ids)[: plan.num_sampled]
        if pending.logprobs is not None:
            logprobs = LogprobColumns(np.asarray(pending.logprobs)[: plan.num_sampled])
        return StepResult(ids, logprobs=logprobs, scores=scores, pooled=pooled)

    def reset(self) -> None:
        self._arrays.delete()
        self._host_pages.forget_transit()
        self._arrays.make()
        self._unsampled = None

    def _prepare(self, plan: StepPlan) -> _Calls:
        """Packs a step and looks up all of its programs, so that whatever can fail on the host does so before any of
        them runs."""
        self._fail_at("pack", plan)
        for block in copy_blocks(plan.copies, self._shapes.num_groups):
            if way(block[0]) not in DISK_WAYS:
                self._copy_program(block)
        tables = table_vectors(plan.table_writes, self._shapes.num_slots, self._shapes.num_groups)
        slots = [_Call(self._program(TABLE_WRITE), vector) for vector in tables]
        slots += [_Call(self._program(OPTION_WRITE), vector) for vector in option_vectors((*plan.chunks, *plan.forks))]
        penalties = self._penalty_calls(plan.penalty_writes)
        forward = self._forward_call(self._shapes.forward_key(plan), plan)
        sample = self._sample_call(plan.row_bucket, plan) if plan.row_bucket else None
        scores = self._score_calls(plan.scores) if len(plan.scores) else []
        pooling = self._pooling_call(self._shapes.pooling_key(plan.num_pooled), plan) if plan.num_pooled else None
        return _Calls(_Writes(slots, penalties), forward, sample, scores, pooling)

    def _penalty_calls(self, writes: Sequence[PenaltyWrite]) -> list[_Call]:
        vectors = penalty_vectors(writes)
        return [_Call(self._program(ProgramKey("penalty_write", size)), vector) for size, vector in vectors]

    def _write(self, writes: _Writes) -> None:
        arrays = self._arrays
        for call in writes.slots:
            arrays.slots = call.program(arrays.slots, call.vector)
        for call in writes.penalties:
            arrays.penalties = call.program(arrays.penalties, call.vector)

    def _forward_call(self, key: ProgramKey, plan: StepPlan) -> _Call:
        key = self._programs.standing_in(key)
        return _Call(self._program(key), self._forward_packers[key.size].pack(plan))

    def _sample_call(self, rows: int, plan: StepPlan) -> _Call:
        key = self._programs.standing_in(ProgramKey("sample", rows))
        return _Call(self._program(key), self._sample_packers[key.size].pack(plan))

    def _pooling_call(self, key: ProgramKey, plan: StepPlan) -> _Call:
        key = self._programs.standing_in(key)
        return _Call(self._program(key), pooling_vector(plan, key.size))

    def _forward(self, call: _Call) -> None:
        arrays = self._arrays
        arrays.pools, arrays.slots, arrays.hidden = call.program(
            self._weights, arrays.pools, arrays.slots, arrays.hidden, call.vector
        )

    def _score_calls(self, scores: Scores) -> list[_Call]:
        key = self._shapes.score_key
        return [_Call(self._program(key), vector) for vector in score_vectors(scores, key.size)]

    def _sample(self, call: _Call) -> tuple[jax.Array, jax.Array]:
        """Starts the sample program; returns ids and log-probabilities."""
        arrays = self._arrays
        arrays.slots, arrays.penalties, ids, logprobs = call.program(
            self._weights.params, arrays.slots, arrays.hidden, arrays.masks, arrays.penalties, call.vector
        )
        return ids, logprobs

    def _score(self, call: _Call) -> jax.Array:
        scores = call.program(self._weights.params, self._arrays.hidden, call.vector)
        if self._copies:
            scores.copy_to_host_async()
        return scores

    def _pool(self, call: _Call) -> jax.Array:
        pooled = call.program(self._arrays.hidden, call.vector)
        if self._copies:
            pooled.copy_to_host_async()
        return pooled

    def _fail_at(self, point: str, plan: StepPlan | None, *, lose: bool = False) -> None:
        """Triggers the failpoints at `point`.

        Args:
            point: one of `failpoints.POINTS`.
            plan: the step, if there is one.
            lose: deletes the donated arguments too, as a program does that fails in execution.
        """
        if not self._failpoints:
            return
        try:
            self._failpoints.hit(point, () if plan is None else plan.request_ids)
        except InjectedFaultError:
            if lose:
                self._arrays.delete()
            raise

    def _copy(self, copies: Sequence[PageCopy]) -> None:
        """Starts the programs that copy pages; each reads the result of the one before it."""
        arrays, host = self._arrays, self._host_pages
        for block in copy_blocks(copies, self._shapes.num_groups):
            if way(block[0]) in DISK_WAYS:
                self._copy_disk(block)
                continue
            program, (first, *_) = self._copy_program(block), block
            if first.source_tier is first.destination_tier:
                arrays.pools = program(arrays.pools, copy_vector(block))
                continue
            sources, destinations = [copy.source for copy in block], [copy.destination for copy in block]
            host.wait_for_room(len(block))
            if first.destination_tier is PageState.HOST:
                done = host.store(destinations, program(arrays.pools, np.array(sources, np.int32)))
                self._watch("out", len(block), done)
                continue
            pages = host.take(sources)
            arrays.pools, placed = program(arrays.pools, pages, np.array(destinations, np.int32))
            host.taken(len(block), placed)
            self._watch("in", len(block), placed)

    def _copy_disk(self, block: Sequence[PageCopy]) -> None:
        assert self.disk is not None, "a page is copied to or from a disk that is not there"
        for copy in block:
            if copy.source_tier is PageState.DISK:
                self.disk.read(copy.source, copy.key)
            else:
                self.disk.write(copy.key, self._host_pages.page(copy.source))

    def _watch(self, way: str, pages: int, done: jax.Array) -> None:
        if self._copy_times is not None:
            self._copy_times.watch(way, pages, done)

    def _copy_program(self, block: Sequence[PageCopy]) -> Callable[..., Any]:
        """Returns the program that makes a block of copies."""
        kind = way(block[0])
        return self._program(PAGE_COPY if kind == PAGE_COPY.kind else ProgramKey(kind, len(block)))

    def _program(self, key: ProgramKey) -> Callable[..., Any]:
        try:
            return self._programs.get(key)
        except CompileMissError:
            self.compile_misses += 1
            raise

    def _warm_up(self) -> None:
        """Runs every available program once on padding alone, so that the first request finds them loaded."""
        nothing = StepPlan(-1, NO_DECODES, (), NO_SAMPLES, token_bucket=0, row_bucket=0, num_tokens=0)
        arrays, padding = self._arrays, self._shapes.num_slots
        for key in program_keys(self._shapes):
            if key in self._programs.missing:
                continue
            if key.kind == "sample":
                self._sample(self._sample_call(key.size, nothing))[0].block_until_ready()
            elif key.kind == "pooling":
                self._pool(self._pooling_call(key, nothing)).block_until_ready()
            elif key.kind in ("forward", "decode"):
                self._forward(self._forward_call(key, nothing))
        for call in self._score_calls(Scores(np.zeros(1, np.int32), np.zeros(1, np.int32))):
            self._score(call).block_until_ready()
        (vector,) = table_vectors([PageTableWrite(0, padding, 0, (0,))], padding, self._shapes.num_groups)
        arrays.slots = self._program(TABLE_WRITE)(arrays.slots, vector)
        arrays.slots = self._program(OPTION_WRITE)(arrays.slots, unused_option_vector(padding))
        unused = [PenaltyWrite(self._shapes.num_penalty_rows, (0,) * size, ()) for size in PENALTY_RUNS]
        self._write(_Writes([], self._penalty_calls(unused)))
        (vector,) = mask_vectors(np.array([padding]), np.zeros((1, self._no_masks.shape[1]), np.uint32), padding)
        arrays.masks = self._program(MASK_WRITE)(arrays.masks, vector)
        arrays.pools = self._program(PAGE_COPY)(arrays.pools, copy_vector(()))
        for size in self._shapes.swap_sizes:
            for copies in swap_copies(size, null=True):
                self._copy(copies)

    def _measure_costs(self) -> PreemptionCosts:
        """Measures the cost of a preemption on this device; no step may be in flight."""

        def compute(plan: StepPlan) -> None:
            self._forward(self._forward_call(self._shapes.forward_key(plan), plan))
            jax.block_until_ready(self._arrays.hidden)

        def swap(copies: Sequence[PageCopy]) -> None:
            self._copy(copies)
            self._host_pages.wait()
            jax.block_until_ready(self._arrays.pools)

        jax.block_until_ready(self._arrays.pools)
        return measure(self._shapes, compute, swap)

    def _measure_steps(self, costs: PreemptionCosts | None) -> FittedCosts:
        """Measures the steps of every bucket on this device; no step may be in flight. costs: of a preemption."""

        def compute(plan: StepPlan) -> None:
            for vector in table_vectors(plan.table_writes, self._shapes.num_slots, self._shapes.num_groups):
                self._arrays.slots = self._program(TABLE_WRITE)(self._arrays.slots, vector)
            self._forward(self._forward_call(self._shapes.forward_key(plan), plan))
            self._sample(self._sample_call(plan.row_bucket, plan))[0].block_until_ready()

        return measure_steps(self._shapes, compute, 0.0 if costs is None else costs.swap_seconds_per_page)


def _is_ready(array: Any) -> bool:
    """Tells whether an array is computed; jax's type stubs lack the method."""
    return array.is_ready()


def packers(shapes: Shapes) -> tuple[dict[int, ForwardPacker], dict[int, SamplePacker]]:
    """Makes the packers of all forward programs, by token bucket, and of all sample programs, by row bucket."""
    buckets, num_slots, told = shapes.buckets, shapes.num_slots, (shapes.page_size, shapes.num_slots, shapes.num_groups)
    forward = {size: ForwardPacker(size, buckets.rows_of(size), *told) for size in buckets.tokens}
    return forward, {size: SamplePacker(size, num_slots) for size in buckets.rows}
