"""The runner that computes: weights, pages and slots on the devices, and the compiled programs over them."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jaxserve.config.failpoints import Failpoints, InjectedFaultError
from jaxserve.config.settings import EngineConfig
from jaxserve.kv_cache.page_pool import PageCopy, PageState
from jaxserve.models.checkpoint import load, load_kv_scales, read_ahead
from jaxserve.models.kv_scales import calibrate, placed
from jaxserve.models.params import abstract_params, make_mesh, pack_for, random_params
from jaxserve.pallas_kernels.paged_attention import is_quantised
from jaxserve.planning.memory_plan import (
    DeviceMemory,
    MemoryPlan,
    check_available,
    claim_memory,
    local_memory,
    plan_memory,
    plan_pool,
    roomy_plan,
)
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.programs.aot.bundle import Bundle, bundled_cache
from jaxserve.programs.aot.program_cache import CacheRefusedError, ProgramCache, default_directory
from jaxserve.programs.build_set import SetBuilder
from jaxserve.programs.compiler import CompilationCounter, CompileMissError, ProgramSet
from jaxserve.programs.program_needs import ProgramNeeds, loaded
from jaxserve.programs.state_programs import mask_words
from jaxserve.programs.step_programs import (
    MASK_WRITE,
    TABLE_WRITE,
    ProgramKey,
    Shapes,
    Weights,
    products_of,
    program_keys,
)
from jaxserve.programs.swap_programs import copy_blocks, way
from jaxserve.runner.device_arrays import DeviceArrays
from jaxserve.runner.freed_memory import keep_freed_memory
from jaxserve.runner.host_pages import HostPages
from jaxserve.runner.packing import ForwardPacker, SamplePacker, mask_vectors, table_vectors
from jaxserve.runner.protocol import RunnerInfo, StepNotStartedError
from jaxserve.runner.step_cost_model import step_costs
from jaxserve.runner.swap_timing import measure, swap_copies
from jaxserve.scheduler.plan import NO_DECODES, NO_SAMPLES, PageTableWrite, StepPlan, StepResult
from jaxserve.scheduler.preemption_costs import PreemptionCosts
from jaxserve.telemetry.startup_spans import Phases

_log = logging.getLogger(__name__)

_COUNTER = CompilationCounter()  # one listener a process: jax keeps listeners for good


class _Call(NamedTuple):
    """A program and the packed vector that it is called with."""

    program: Callable[..., Any]
    vector: np.ndarray


@dataclasses.dataclass(eq=False)
class PendingStep:
    """A step under way.

    hidden: what its forward program made, until the next step takes it. sample: what samples it; None where nothing is
    sampled. copied: copies of pages were made for it. ids: its sampled ids on the device, int32 [row bucket], as many
    of them real as `plan.samples`; None until they are dispatched.
    """

    plan: StepPlan
    hidden: jax.Array
    sample: _Call | None
    copied: bool
    ids: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class _Made:
    """What a start makes: the shapes with the pool's size, programs, weights and the plan that holds them all.

    kv_cache: what the start-up log says of the pages' dtype and scales.
    """

    shapes: Shapes
    programs: ProgramSet
    weights: Weights
    kv_cache: str
    plan: MemoryPlan


def annotate(name: str) -> contextlib.AbstractContextManager[object]:
    """Names what the host does inside the `with`, where jax's profiler is on."""
    return jax.profiler.TraceAnnotation(name)


class ModelRunner:
    """Runner over a model. Start-up loads the weights while it compiles, or loads, every program of the closed set."""

    _unsampled: PendingStep | None = None  # the step whose forward program was dispatched last, until it is sampled

    def __init__(self, config: EngineConfig, *, progress: bool = False, phases: Phases | None = None):
        """progress: shows how far compiling is. phases: of this process so far; those of this start are added."""
        phases = Phases() if phases is None else phases
        with phases.phase("devices"):
            claim_memory(config.cache)
            mesh = make_mesh()
            memory = local_memory(mesh, config.cache.gpu_memory_utilization)
        with phases.phase("shapes"):
            shapes = resolve_shapes(config, mesh.devices.flat[0].platform)
        with phases.phase("kernels"):
            products_of(shapes, mesh).prepare()
        if config.bundle is None:
            with SetBuilder(mesh, _cache(config, mesh), progress=progress) as builder:
                made = _build(config, shapes, memory, builder, phases)
        else:
            made = _load_bundle(config, config.bundle, shapes, memory, mesh, phases)
        self._mesh, self._failpoints = mesh, Failpoints(config.failpoints)
        self._shapes, self._programs = made.shapes, made.programs
        self._weights, self._kv_cache = made.weights, made.kv_cache
        if mesh.devices.flat[0].platform == "cpu":
            keep_freed_memory()
        check_available(made.plan, self._shapes, mesh)
        with phases.phase("pool"):
            self._arrays = DeviceArrays(self._shapes, mesh)
        self._copies = mesh.devices.flat[0].platform != "cpu"  # there the host reads the device's own memory
        self._host_pages = HostPages(self._shapes, mesh, made.plan.page)
        self._forward_packers, self._sample_packers = packers(self._shapes)
        self.compile_misses = 0
        with phases.phase("warm-up"):
            self._warm_up()
            costs = self._measure_costs() if self._shapes.num_host_pages else None
        _log_allocator(made.plan, mesh)
        info = _info(self._shapes, self._programs, mesh, self._kv_cache, config.bundle)
        self.info = dataclasses.replace(
            info,
            phases=phases.all(),
            memory=tuple(made.plan.parts().items()),
            num_host_pages=self._shapes.num_host_pages,
            preemption_costs=costs,
            step_costs=step_costs(self._shapes, mesh),
        )

    @property
    def num_compilations(self) -> int:
        return _COUNTER.count

    @property
    def programs(self) -> ProgramSet:
        return self._programs

    @functools.cached_property
    def _no_masks(self) -> np.ndarray:
        """The masks of a step in which no sample wants one: uint32 [0, words]."""
        return np.zeros((0, mask_words(self._shapes.model.vocab_size)), np.uint32)

    def dispatch_forward(self, plan: StepPlan) -> PendingStep:
        arrays, begun, copied = self._arrays, False, False  # begun: what was enqueued must not be enqueued again
        try:
            with annotate("Execute"):
                forward, sample, tables = self._prepare(plan)
                begun = bool(plan.copies)
                self._copy(plan.copies)
                copied, begun = begun, False
                for call in tables:
                    arrays.slots = call.program(arrays.slots, call.vector)
                self._fail_at("enqueue", plan)
                self._forward(forward)
                self._fail_at("execute", plan, lose=True)
        except Exception as error:
            raise self._not_started(error, begun=begun, copied=copied) from error
        self._unsampled = PendingStep(plan, arrays.hidden, sample, copied)
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
                ids = self._sample(step.sample)
                begun = True
                if self._copies:
                    ids.copy_to_host_async()
        except Exception as error:
            raise self._not_started(error, begun=begun, copied=step.copied) from error
        step.ids = ids

    def _not_started(self, error: Exception, *, begun: bool, copied: bool) -> Exception:
        """What to raise for an error while a step was dispatched: itself where the step must not be tried again.

        Computing the same tokens a second time writes the same keys and values, as do page tables and masks; copying
        pages twice does not.
        """
        if begun or not self._arrays.intact:
            return error
        return StepNotStartedError(f"{type(error).__name__}: {error}", copied=copied)

    def done(self, pending: PendingStep) -> bool:
        if pending.ids is not None:
            return pending.ids.is_deleted() or _is_ready(pending.ids)
        return pending.hidden.is_deleted() or _is_ready(pending.hidden)

    def collect(self, pending: PendingStep) -> StepResult:
        self._fail_at("collect", None, lose=True)
        if pending.sample is None:
            return StepResult(())
        assert pending.ids is not None, "a step is collected that was not sampled"
        return StepResult(np.asarray(pending.ids)[: pending.plan.num_sampled])

    def reset(self) -> None:
        self._arrays.delete()
        self._host_pages.forget_transit()
        self._arrays.make()
        self._unsampled = None

    def _prepare(self, plan: StepPlan) -> tuple[_Call, _Call | None, list[_Call]]:
        """Packs a step and finds all of its programs, so that what can fail on the host does so before any of them.

        Returns those of the forward program, of the sample program, and of the writes to page tables.
        """
        self._fail_at("pack", plan)
        for block in copy_blocks(plan.copies):
            for kind in way(block[0]):
                self._program(ProgramKey(kind, len(block)))
        vectors = table_vectors(plan.table_writes, self._shapes.num_slots)
        tables = [_Call(self._program(TABLE_WRITE), vector) for vector in vectors]
        forward = self._forward_call(self._shapes.forward_key(plan), plan)
        return forward, self._sample_call(plan.row_bucket, plan) if plan.row_bucket else None, tables

    def _forward_call(self, key: ProgramKey, plan: StepPlan) -> _Call:
        return _Call(self._program(key), self._forward_packers[key.size].pack(plan))

    def _sample_call(self, rows: int, plan: StepPlan) -> _Call:
        return _Call(self._program(ProgramKey("sample", rows)), self._sample_packers[rows].pack(plan))

    def _forward(self, call: _Call) -> None:
        arrays = self._arrays
        arrays.pools, arrays.slots, arrays.hidden = call.program(
            self._weights, arrays.pools, arrays.slots, arrays.hidden, call.vector
        )

    def _sample(self, call: _Call) -> jax.Array:
        arrays = self._arrays
        arrays.slots, ids = call.program(self._weights.params, arrays.slots, arrays.hidden, arrays.masks, call.vector)
        return ids

    def _fail_at(self, point: str, plan: StepPlan | None, *, lose: bool = False) -> None:
        """Passes a failpoint. lose: as after a program that fails in execution, its donated arguments are gone."""
        if not self._failpoints:
            return
        try:
            self._failpoints.hit(point, () if plan is None else plan.request_ids)
        except InjectedFaultError:
            if lose:
                self._arrays.delete()
            raise

    def _copy(self, copies: Sequence[PageCopy]) -> None:
        """Starts the programs that copy pages; each reads what the one before it left."""
        arrays, host = self._arrays, self._host_pages
        for block in copy_blocks(copies):
            size, (first, *_) = len(block), block
            sources, destinations = [copy.source for copy in block], [copy.destination for copy in block]
            if way(first) != ("swap_out", "swap_in"):
                host.wait_for_room(size)
            if first.source_tier is PageState.HOST:
                pages = host.take(sources)
            else:
                pages = self._program(ProgramKey("swap_out", size))(arrays.pools, np.array(sources, np.int32))
            if first.destination_tier is PageState.HOST:
                host.store(destinations, pages)
                continue
            program = self._program(ProgramKey("swap_in", size))
            arrays.pools, placed = program(arrays.pools, pages, np.array(destinations, np.int32))
            if first.source_tier is PageState.HOST:
                host.taken(size, placed)

    def _program(self, key: ProgramKey) -> Callable[..., Any]:
        try:
            return self._programs.get(key)
        except CompileMissError:
            self.compile_misses += 1
            raise

    def _warm_up(self) -> None:
        """Runs every program once on padding alone, so that the first request finds them loaded."""
        nothing = StepPlan(-1, NO_DECODES, (), NO_SAMPLES, token_bucket=0, row_bucket=0, num_tokens=0)
        arrays, padding = self._arrays, self._shapes.num_slots
        for key in program_keys(self._shapes):
            if key.kind == "sample":
                self._sample(self._sample_call(key.size, nothing)).block_until_ready()
            elif key.kind in ("forward", "decode"):
                self._forward(self._forward_call(key, nothing))
        (vector,) = table_vectors([PageTableWrite(0, padding, 0, (0,))], padding)
        arrays.slots = self._program(TABLE_WRITE)(arrays.slots, vector)
        (vector,) = mask_vectors(np.array([padding]), np.zeros((1, self._no_masks.shape[1]), np.uint32), padding)
        arrays.masks = self._program(MASK_WRITE)(arrays.masks, vector)
        for size in self._shapes.swap_sizes:
            for copies in swap_copies(size, null=True):
                self._copy(copies)

    def _measure_costs(self) -> PreemptionCosts:
        """What a preemption costs here; nothing may run yet."""

        def compute(plan: StepPlan) -> None:
            self._forward(self._forward_call(self._shapes.forward_key(plan), plan))
            jax.block_until_ready(self._arrays.hidden)

        def swap(copies: Sequence[PageCopy]) -> None:
            self._copy(copies)
            self._host_pages.wait()
            jax.block_until_ready(self._arrays.pools)

        jax.block_until_ready(self._arrays.pools)
        return measure(self._shapes, compute, swap)


def _log_allocator(plan: MemoryPlan, mesh: Mesh) -> None:
    """Logs how much of the plan a GPU's allocator has in use, and the largest block that it has left."""
    stats = mesh.devices.flat[0].memory_stats() or {}
    if mesh.devices.flat[0].platform != "cpu" and "bytes_in_use" in stats:
        _log.info(
            "device memory: %d bytes in use, planned %d beside temporaries of %d; largest free block %d of %d",
            stats["bytes_in_use"],
            plan.total - plan.programs.temporaries - plan.programs.code,
            plan.programs.temporaries,
            stats.get("largest_free_block_bytes", 0),
            stats["bytes_limit"],
        )


def _build(config: EngineConfig, shapes: Shapes, memory: DeviceMemory, builder: SetBuilder, phases: Phases) -> _Made:
    """Sizes the pool and compiles the programs, or finds them in the cache, while the weights are loaded."""
    mesh, cache = builder.mesh, config.cache
    explicit = cache.num_pages is not None or cache.kv_cache_memory_bytes is not None
    with phases.phase("plan"):
        if explicit:
            plan = plan_pool(shapes, cache, mesh, memory, lambda: ProgramNeeds(0, 0))
        else:
            plan = roomy_plan(shapes, cache, mesh, memory)
    with _weights_meanwhile(config, shapes, mesh, phases) as weights:
        if plan is None:
            with phases.phase("largest programs"):
                plan = plan_pool(shapes, cache, mesh, memory, lambda: builder.needs(shapes))
        while True:
            shapes = dataclasses.replace(shapes, num_pages=plan.num_pages)
            with phases.phase("programs"):
                programs = builder.build(shapes)
            needs = loaded(ProgramNeeds.of(programs.memory.values()), mesh)
            found = plan_memory(shapes, mesh, memory, needs)
            if found.fits or explicit:
                break
            plan = plan_pool(shapes, cache, mesh, memory, lambda needs=needs: needs)  # they need more than was foreseen
        found.check()
        return _Made(shapes, programs, *weights(), found)


def _load_bundle(
    config: EngineConfig, directory: str, shapes: Shapes, memory: DeviceMemory, mesh: Mesh, phases: Phases
) -> _Made:
    """As `_build`, with the bundle's programs."""
    with phases.phase("plan"):
        bundle = Bundle.open(directory)
        plan = plan_pool(shapes, bundled_cache(config.cache, bundle), mesh, memory, lambda: ProgramNeeds(0, 0))
        shapes = dataclasses.replace(shapes, num_pages=plan.num_pages)
        bundle.check(shapes, mesh)  # before the weights take their time
    with concurrent.futures.ThreadPoolExecutor(1) as loader:
        loading = loader.submit(_weights, config, shapes, mesh, phases)
        with phases.phase("programs"):
            programs = bundle.load(shapes, mesh, checked=True)
        needs = loaded(ProgramNeeds.of(programs.memory.values()), mesh)
        found = plan_memory(shapes, mesh, memory, needs)
        found.check()
        return _Made(shapes, programs, *loading.result(), found)


def _cache(config: EngineConfig, mesh: Mesh) -> ProgramCache | None:
    """Where programs are kept between starts. A configured directory must do; without the default one it starts too."""
    directory = config.compilation_cache_dir
    if directory is None:
        return None
    size = config.compilation_cache_max_bytes
    if directory != "auto":
        return ProgramCache.open(directory, size, mesh)
    try:
        return ProgramCache.open(default_directory(), size, mesh)
    except CacheRefusedError as error:
        _log.warning("compiled programs are not kept for the next start: %s", error)
        return None


@contextlib.contextmanager
def _weights_meanwhile(
    config: EngineConfig, shapes: Shapes, mesh: Mesh, phases: Phases
) -> Iterator[Callable[[], tuple[Weights, str]]]:
    """What returns the weights, for use when the programs are there. A thread loads them meanwhile; for a GPU it only
    reads the checkpoint, so that the host has it in its file cache.

    A GPU's compiler tries kernels on the device. Weights placed between what it takes and frees leave holes that no
    pool of pages fills: an 8B model's lost 2.3 GB on an H200, far more than the plan's margin.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as loader:
        if mesh.devices.flat[0].platform == "cpu":
            yield loader.submit(_weights, config, shapes, mesh, phases).result
        else:
            reading = loader.submit(_read_ahead, config, shapes, phases)

            def place() -> tuple[Weights, str]:
                reading.result()
                return _weights(config, shapes, mesh, phases)

            yield place


def _read_ahead(config: EngineConfig, shapes: Shapes, phases: Phases) -> None:
    """Checks the checkpoint and reads it once."""
    if config.load_format != "dummy":
        with phases.phase("read ahead"):
            read_ahead(str(config.model), shapes.model)


def _weights(config: EngineConfig, shapes: Shapes, mesh: Mesh, phases: Phases) -> tuple[Weights, str]:
    """The weights, and what the start-up log says of the pages' dtype and scales."""
    with phases.phase("weights"):
        return _read_weights(config, shapes, mesh)


def _read_weights(config: EngineConfig, shapes: Shapes, mesh: Mesh) -> tuple[Weights, str]:
    dummy = config.load_format == "dummy"
    stored = None
    quantised = is_quantised(shapes.pool_dtype)
    if quantised and not dummy:
        stored = load_kv_scales(str(config.model), shapes.model)  # malformed ones fail before the weights are read
    if dummy:
        params = random_params(shapes.model, shapes.dtype, mesh, config.seed)
    else:
        params = load(str(config.model), shapes.model, shapes.dtype, mesh)
    products = products_of(shapes, mesh)
    scales, told = None, shapes.pool_dtype
    if quantised and stored is not None:
        scales, told = stored.of(shapes.pool_dtype), f"{told}, scales from the checkpoint"
    elif quantised:
        plain = dataclasses.replace(products, packed=False)
        scales = calibrate(shapes.model, params, shapes.pool_dtype, mesh, plain)
        told = f"{told}, scales measured with random tokens"
    params = pack_for(shapes.model, params, products)
    return Weights(params, None if scales is None else placed(scales, mesh)), told


def _is_ready(array: Any) -> bool:
    """Whether an array is computed; jax's own type stubs do not have the method."""
    return array.is_ready()


def packers(shapes: Shapes) -> tuple[dict[int, ForwardPacker], dict[int, SamplePacker]]:
    """What packs the steps of each forward program, by token bucket, and of each sample program, by row bucket."""
    buckets, num_slots = shapes.buckets, shapes.num_slots
    forward = {size: ForwardPacker(size, buckets.rows_of(size), shapes.page_size, num_slots) for size in buckets.tokens}
    return forward, {size: SamplePacker(size, num_slots) for size in buckets.rows}


def _info(shapes: Shapes, programs: ProgramSet, mesh: Mesh, kv_cache: str, bundle: str | None) -> RunnerInfo:
    params = jax.tree.leaves(abstract_params(shapes.model, shapes.dtype, mesh))
    return RunnerInfo(
        vocab_size=shapes.model.vocab_size,
        max_model_len=shapes.max_model_len,
        eos_token_ids=shapes.model.eos_token_ids,
        page_size=shapes.page_size,
        num_pages=shapes.num_pages,
        num_parameters=sum(math.prod(leaf.shape) for leaf in params),
        architecture=shapes.model.architecture,
        dtype=shapes.dtype,
        platform=mesh.devices.flat[0].platform,
        attention=shapes.attention,
        num_executables=len(programs.executables),
        num_cached_executables=programs.num_cached,
        compile_seconds=programs.seconds,
        kv_cache=kv_cache,
        bundle=bundle,
    )
