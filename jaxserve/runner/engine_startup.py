"""Starts a runner: one object owns mesh, shapes and device memory until everything that the runner needs exists.

    devices -> shapes -> kernels -> plan -> programs, with the weights beside them -> pool

Cheap checks come first: a configuration that contradicts its checkpoint is refused before anything is compiled, and a
pool that cannot fit before the weights are read.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import tempfile
import weakref
from collections.abc import Callable, Iterator

from jax.sharding import Mesh

from jaxserve.config.settings import EngineConfig
from jaxserve.models.loading.checkpoint import load, load_kv_scales, read_ahead
from jaxserve.models.loading.kv_scales import calibrate, placed
from jaxserve.models.params import make_mesh, num_parameters, pack_for, random_params
from jaxserve.pallas_kernels.paged_attention import is_quantized
from jaxserve.planning.memory_plan import MemoryPlan, MemoryPlanner, claim_memory, local_memory, pages_in_transit
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.programs.aot.bundle import Bundle, bundled_cache
from jaxserve.programs.aot.program_cache import CacheRefusedError, ProgramCache, default_directory
from jaxserve.programs.build_set import SetBuilder
from jaxserve.programs.compiler import ProgramSet
from jaxserve.programs.program_needs import ProgramNeeds, largest_keys, loaded
from jaxserve.programs.step_programs import Shapes, Weights, products_of
from jaxserve.runner.device_arrays import DeviceArrays
from jaxserve.runner.freed_memory import keep_freed_memory
from jaxserve.runner.host_pages import HostPages
from jaxserve.runner.late_programs import LatePrograms
from jaxserve.runner.protocol import RunnerInfo
from jaxserve.scheduler.preemption_costs import PreemptionCosts
from jaxserve.telemetry.startup_spans import StartupSpans

_log = logging.getLogger(__name__)

_NOTHING = ProgramNeeds(0, 0)


@dataclasses.dataclass(frozen=True)
class Started:
    """Holds what a start has created.

    shapes: include the pool's number of pages. kv_cache: the start-up log's description of the pages' dtype and scales.
    plan: of the device's whole memory.
    """

    mesh: Mesh
    shapes: Shapes
    programs: ProgramSet
    weights: Weights
    kv_cache: str
    plan: MemoryPlan
    arrays: DeviceArrays
    host_pages: HostPages


class Startup:
    """Performs one start: `make` creates everything, then `info` describes the result."""

    def __init__(self, config: EngineConfig, *, progress: bool, phases: StartupSpans, server: bool):
        """Finds the devices and resolves the shapes.

        Args:
            config: the engine's settings.
            progress: shows the progress of compilation.
            phases: startup spans of this process so far; those of this start are added.
            server: the engine belongs to a server, so that `ready_when` "auto" may be "servable".

        Raises:
            ValueError: configuration, checkpoint and devices contradict each other.
        """
        self._config, self._progress, self._phases = config, progress, phases
        self._program_cache: ProgramCache | None = None
        with phases.phase("devices"):
            claim_memory(config.cache)
            self._mesh = make_mesh()
            memory = local_memory(self._mesh, config.cache.gpu_memory_utilization)
        with phases.phase("shapes"):
            self._shapes = resolve_shapes(config, self._platform)
            self._servable = ready_when_servable(config, self._platform, server)
        with phases.phase("kernels"):
            products_of(self._shapes, self._mesh).prepare()
        self._planner = MemoryPlanner(self._shapes, config.cache, self._mesh, memory)

    @property
    def _platform(self) -> str:
        return self._mesh.devices.flat[0].platform

    def make(self) -> Started:
        """Creates programs, weights and arrays.

        Raises:
            ValueError: the memory plan does not fit, or a checkpoint or a bundle cannot be used.
        """
        weights, kv_cache = self._build() if self._config.bundle is None else self._load_bundle(self._config.bundle)
        if self._platform == "cpu":
            keep_freed_memory()
        self._planner.check_available(self._plan)
        with self._phases.phase("pool"):
            arrays = DeviceArrays(self._shapes, self._mesh)
        host_pages = HostPages(self._shapes, self._mesh, self._plan.page)
        return Started(self._mesh, self._shapes, self._programs, weights, kv_cache, self._plan, arrays, host_pages)

    def info(self, started: Started, costs: PreemptionCosts | None) -> RunnerInfo:
        """Describes the runner.

        Args:
            started: what `make` returned.
            costs: of a preemption, as measured at warm-up.
        """
        shapes, programs = started.shapes, started.programs
        return RunnerInfo(
            vocab_size=shapes.model.vocab_size,
            max_model_len=shapes.max_model_len,
            eos_token_ids=shapes.model.eos_token_ids,
            page_size=shapes.page_size,
            group_windows=shapes.groups.windows,
            num_pages=shapes.num_pages,
            num_parameters=num_parameters(shapes.model),
            architecture=shapes.model.architecture,
            dtype=shapes.dtype,
            platform=self._platform,
            attention=shapes.attention,
            num_executables=len(programs.executables) + len(programs.missing),
            num_missing_executables=len(programs.missing),
            num_cached_executables=programs.num_cached,
            compile_seconds=programs.seconds,
            kv_cache=started.kv_cache,
            bundle=self._config.bundle,
            phases=self._phases.all(),
            memory=tuple(started.plan.parts().items()),
            num_host_pages=shapes.num_host_pages,
            preemption_costs=costs,
            page_bytes=started.plan.page * self._mesh.size,
            pages_in_transit=None if self._platform == "cpu" else pages_in_transit(shapes, started.plan.page),
            max_logprobs=shapes.max_logprobs,
            logprobs_mode=shapes.logprobs_mode,
            hidden_size=shapes.model.hidden_size,
        )

    def finish(self, started: Started) -> None:
        """Starts the compilation of missing programs in the background, while the engine serves; call it last."""
        programs = started.programs
        if not programs.missing:
            return
        total = len(programs.executables) + len(programs.missing)
        _log.info(
            "ready with %d of %d programs; the others are compiled in the background", len(programs.executables), total
        )
        cache = self._program_cache
        if cache is None:
            scratch = tempfile.TemporaryDirectory(prefix="jaxserve-programs-")
            weakref.finalize(programs, scratch.cleanup)
            cache = ProgramCache.open(scratch.name, self._config.compilation_cache_max_bytes, self._mesh)
        LatePrograms(self._config, started.shapes, programs, cache)

    def log_allocator(self) -> None:
        """Logs how much of the planned memory a GPU's allocator has in use, and its largest free block."""
        stats = self._mesh.devices.flat[0].memory_stats() or {}
        if self._platform != "cpu" and "bytes_in_use" in stats:
            programs = self._plan.programs
            _log.info(
                "device memory: %d bytes in use, planned %d beside temporaries of %d; largest free block %d of %d",
                stats["bytes_in_use"],
                self._plan.total - programs.temporaries - programs.code,
                programs.temporaries,
                stats.get("largest_free_block_bytes", 0),
                stats["bytes_limit"],
            )

    def _build(self) -> tuple[Weights, str]:
        """Sizes the pool and compiles the programs, or finds them in the cache, while the weights load."""
        cache, planner = self._config.cache, self._planner
        explicit = cache.num_pages is not None or cache.kv_cache_memory_bytes is not None
        self._program_cache = self._cache()
        with SetBuilder(self._mesh, self._program_cache, progress=self._progress) as builder:
            with self._phases.phase("plan"):
                plan = planner.pool(lambda: _NOTHING) if explicit else planner.roomy()
            with self._weights_meanwhile() as weights:
                if plan is None:
                    with self._phases.phase("largest programs"):
                        plan = planner.pool(lambda: builder.needs(self._shapes))
                while True:
                    self._take(plan)
                    with self._phases.phase("programs"):
                        self._programs = builder.build(self._shapes, servable=self._servable)
                    found = self._found()
                    if found.fits or explicit:
                        break
                    plan = planner.pool(lambda needs=found.programs: needs)  # they need more than was foreseen
                found.check()
                return weights()

    def _load_bundle(self, directory: str) -> tuple[Weights, str]:
        """Does what `_build` does, with the bundle's programs."""
        with self._phases.phase("plan"):
            bundle = Bundle.open(directory)
            planner = dataclasses.replace(self._planner, cache=bundled_cache(self._config.cache, bundle))
            self._take(planner.pool(lambda: _NOTHING))
            bundle.check(self._shapes, self._mesh)  # before the weights take their time
        with concurrent.futures.ThreadPoolExecutor(1) as loader:
            loading = loader.submit(self._weights)
            with self._phases.phase("programs"):
                self._programs = bundle.load(self._shapes, self._mesh, checked=True)
            self._found().check()
            return loading.result()

    def _take(self, plan: MemoryPlan) -> None:
        """Adopts the plan's number of pages as that of the programs' shapes."""
        self._plan = plan
        self._shapes = dataclasses.replace(self._shapes, num_pages=plan.num_pages)

    def _found(self) -> MemoryPlan:
        """Updates and returns the plan with the memory that the programs turned out to need.

        A missing program counts as needing no more than the largest of its kind.
        """
        memory = self._programs.memory
        largest = {key.kind: memory[key] for key in largest_keys(self._shapes)}
        needs = ProgramNeeds.of([*memory.values(), *(largest[key.kind] for key in self._programs.missing)])
        self._plan = self._planner.plan(self._shapes.num_pages, loaded(needs, self._mesh))
        return self._plan

    def _cache(self) -> ProgramCache | None:
        """Opens the program cache, which keeps programs between starts.

        Returns None without one: none is configured, or the default directory is refused. A configured directory that
        is refused raises CacheRefusedError.
        """
        directory = self._config.compilation_cache_dir
        if directory is None:
            return None
        size = self._config.compilation_cache_max_bytes
        if directory != "auto":
            return ProgramCache.open(directory, size, self._mesh)
        try:
            return ProgramCache.open(default_directory(), size, self._mesh)
        except CacheRefusedError as error:
            _log.warning("compiled programs are not kept for the next start: %s", error)
            return None

    @contextlib.contextmanager
    def _weights_meanwhile(self) -> Iterator[Callable[[], tuple[Weights, str]]]:
        """Overlaps weight loading with compilation; yields a function that returns the weights, to be called once the
        programs exist.

        On a CPU a thread loads the weights meanwhile. For a GPU it only reads the checkpoint, so that the host has it
        in its file cache: a GPU's compiler autotunes kernels on the device, and weights placed between its allocations
        leave holes that no pool of pages fills. An 8B model lost 2.3 GB to them on an H200, far more than the plan's
        margin.
        """
        with concurrent.futures.ThreadPoolExecutor(1) as loader:
            if self._platform == "cpu":
                yield loader.submit(self._weights).result
            else:
                reading = loader.submit(self._read_ahead)

                def place() -> tuple[Weights, str]:
                    reading.result()
                    return self._weights()

                yield place

    def _read_ahead(self) -> None:
        """Checks the checkpoint and reads it once into the host's file cache."""
        if self._config.load_format != "dummy":
            with self._phases.phase("read ahead"):
                read_ahead(str(self._config.model), self._shapes.model)

    def _weights(self) -> tuple[Weights, str]:
        """Loads the weights; also returns the start-up log's description of the pages' dtype and scales."""
        with self._phases.phase("weights"):
            return _read_weights(self._config, self._shapes, self._mesh)


def ready_when_servable(config: EngineConfig, platform: str, server: bool) -> bool:
    """Tells whether the start waits only for the programs that can serve every request.

    Raises:
        ValueError: the configuration asks for it on a platform that cannot do it.
    """
    if config.ready_when == "servable" and platform != "cpu":
        raise ValueError(
            f"ready_when is 'servable' on a {platform}, whose compiler measures kernels on the device beside the steps "
            "that serve; set it to 'complete' (a bundle or the compilation cache makes such a start fast)"
        )
    if config.scheduler.max_decode_gap is not None and config.ready_when == "auto":
        return False  # the steps of every bucket are measured before the first request
    return config.ready_when == "servable" or (config.ready_when == "auto" and server and platform == "cpu")


def _read_weights(config: EngineConfig, shapes: Shapes, mesh: Mesh) -> tuple[Weights, str]:
    dummy = config.load_format == "dummy"
    stored = None
    quantized = is_quantized(shapes.pool_dtype)
    if quantized and not dummy:
        stored = load_kv_scales(str(config.model), shapes.model)  # malformed ones fail before the weights are read
    if dummy:
        params = random_params(shapes.model, shapes.dtype, mesh, config.seed)
    else:
        params = load(str(config.model), shapes.model, shapes.dtype, mesh)
    products = products_of(shapes, mesh)
    scales, told = None, shapes.pool_dtype
    if quantized and stored is not None:
        scales, told = stored.of(shapes.pool_dtype), f"{told}, scales from the checkpoint"
    elif quantized:
        scales = calibrate(shapes.model, params, shapes.pool_dtype, mesh, products.unpacked)
        told = f"{told}, scales measured with random tokens"
    params = pack_for(shapes.model, params, products)
    return Weights(params, None if scales is None else placed(scales, mesh)), told
