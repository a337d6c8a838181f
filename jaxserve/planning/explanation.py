"""Explains a configuration on a device without starting it: programs, memory, concurrency, speed, start time.

The memory plan is the one that start-up makes. Only the largest program of each kind is compiled, for the target; where
the target's compiler is not installed, their temporaries are bounded by `estimate` and marked so.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax

from jaxserve.config.settings import CacheConfig, EngineConfig
from jaxserve.kv_cache.page_groups import PageGroups
from jaxserve.kv_cache.page_pool import greatest_concurrency
from jaxserve.models.params import make_mesh, num_parameters
from jaxserve.planning.decode_roofline import DecodeStep, decode_step
from jaxserve.planning.estimate import temporary_bytes
from jaxserve.planning.gap_explanation import GapExplanation, explain_gap
from jaxserve.planning.memory_plan import DeviceMemory, MemoryPlan, MemoryPlanner
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.planning.roofline import RooflineCosts
from jaxserve.planning.step_cost_models import CostModel, read_costs
from jaxserve.programs.aot.plugin import PluginMissingError
from jaxserve.programs.compiler import ProgramMemory, compile_program, program_memory
from jaxserve.programs.program_needs import ProgramNeeds, largest_keys, loaded
from jaxserve.programs.step_programs import Shapes, program_keys, trace
from jaxserve.programs.target_devices import LOCAL, Target, known_targets, load_target, target_mesh

LOAD_RATE = 0.8e9
"""Bytes/s: a 306 MB safetensors checkpoint from the page cache, with two cores of a 2 GHz server processor."""

COMPILE_SECONDS = 6.0
"""Seconds to compile one program, where nothing was compiled here: the largest of an 8B model for an H200 took 2.5 to
10 s each."""

LENGTHS = (1024, 4096, 16384, 65536)
"""Lengths of requests, in tokens, whose maximum concurrency is reported besides that of max_model_len."""

BATCHES = (1, 8, 64, 256)
CONTEXTS = (1024, 8192)


@dataclasses.dataclass(frozen=True)
class Concurrency:
    """Maximum number of concurrent requests of `length` tokens each, limited by pages and max_num_seqs."""

    length: int
    requests: float


@dataclasses.dataclass(frozen=True)
class Start:
    """Estimates a start: the weights are loaded while the programs are compiled, on `workers` cores.

    Attributes:
        load_bytes: of weights.
        load_rate: bytes/s.
        compile_seconds: for all programs with an empty cache.
        compile_source: source of that figure.
    """

    load_bytes: int
    load_rate: float
    compile_seconds: float
    compile_source: str
    workers: int

    @property
    def load_seconds(self) -> float:
        return self.load_bytes / self.load_rate

    @property
    def seconds(self) -> float:
        """Seconds with an empty compilation cache and no bundle."""
        return max(self.load_seconds, self.compile_seconds)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Result of `explain`.

    Attributes:
        cache: as configured.
        programs: bucket sizes by kind, ascending.
        estimated: why temporaries are an estimate; "" where they are the compiler's figures.
        decode_steps: those that fit into the pages.
        gap: what max_decode_gap costs; None without one.
    """

    shapes: Shapes
    target: Target
    cache: CacheConfig
    num_parameters: int
    programs: dict[str, tuple[int, ...]]
    plan: MemoryPlan
    estimated: str
    concurrency: tuple[Concurrency, ...]
    start: Start
    decode_steps: tuple[DecodeStep, ...]
    gap: GapExplanation | None = None

    @property
    def pool_tokens(self) -> int:
        """Tokens of the longest request that the pages hold, or where all layers are alike, of all requests."""
        return _page_groups(self.shapes).pool_tokens(self.plan.num_pages - 1, self.shapes.max_model_len)


@dataclasses.dataclass(frozen=True)
class _Needs:
    programs: ProgramNeeds
    compile_seconds: float
    compile_source: str
    estimated: str


def explain(
    config: EngineConfig,
    target: Target,
    *,
    load_rate: float = LOAD_RATE,
    report: pathlib.Path | None = None,
    compiles: bool = True,
    model_cost: pathlib.Path | None = None,
) -> Explanation:
    """Explains a configuration on one device of the target.

    Args:
        load_rate: bytes/s at which weights reach the device.
        report: report.json of `jaxserve.compile` for the same target, whose compile times are used.
        compiles: False estimates what programs need, from above, instead of compiling the largest ones.
        model_cost: measured steps, as `benchmarks.step_costs` writes them, by which max_decode_gap is explained;
            otherwise it is explained by the target's roofline.

    Raises:
        ValueError: the configuration does not fit the model or the device, or the report is another target's.
    """
    shapes = resolve_shapes(config, target.platform, planning=True)
    workers = os.cpu_count() or 1
    needs = _compile(shapes, target, workers) if compiles else _estimate(shapes, 0.0, "nothing was compiled")
    mesh = make_mesh(jax.devices("cpu")[:1])
    device = DeviceMemory.share(
        target.device_memory_bytes, config.cache.gpu_memory_utilization, host=target.platform == "cpu"
    )
    with jax.sharding.use_abstract_mesh(_described(target)):  # the kernels' limits depend on the device
        plan = MemoryPlanner(shapes, config.cache, mesh, device).pool(lambda: needs.programs)
    plan = dataclasses.replace(plan, programs=needs.programs)
    plan.check()
    start = Start(plan.weights, load_rate, needs.compile_seconds, needs.compile_source, workers)
    if report is not None:
        seconds, source = _reported(report, target, _sizes(shapes))
        start = dataclasses.replace(start, compile_seconds=seconds / workers, compile_source=source)
    cases = [
        (batch, context)
        for context in CONTEXTS
        for batch in BATCHES
        if context <= shapes.max_model_len and batch <= _concurrency(shapes, plan, context).requests
    ]
    return Explanation(
        shapes=dataclasses.replace(shapes, num_pages=plan.num_pages),
        target=target,
        cache=config.cache,
        num_parameters=num_parameters(shapes.model),
        programs=_sizes(shapes),
        plan=plan,
        estimated=needs.estimated,
        concurrency=tuple(_concurrency(shapes, plan, length) for length in _lengths(shapes.max_model_len)),
        start=start,
        decode_steps=tuple(decode_step(shapes, target, batch, context) for batch, context in cases),
        gap=_gap(config, shapes, target, model_cost, cases),
    )


def _gap(
    config: EngineConfig,
    shapes: Shapes,
    target: Target,
    model_cost: pathlib.Path | None,
    cases: Sequence[tuple[int, int]],
) -> GapExplanation | None:
    """Explains the configured max_decode_gap, if there is one."""
    bound = config.scheduler.max_decode_gap
    if bound is None:
        return None
    if model_cost is not None:
        costs: CostModel = read_costs(model_cost)
    elif target.memory_bandwidth and target.peak_flops.get(shapes.dtype):
        costs = RooflineCosts(
            shapes.model,
            target,
            dtype=shapes.dtype,
            pool_dtype=shapes.pool_dtype,
            page_size=shapes.page_size,
            max_model_len=shapes.max_model_len,
        )
    else:
        unknown = f"target {target.name} states no rates; measure its steps (benchmarks.step_costs), give --model-cost"
        return GapExplanation(bound, "", unknown=unknown)
    most_tokens = config.scheduler.max_num_batched_tokens
    return explain_gap(costs.seconds, costs.name, bound, shapes.buckets, most_tokens, cases)


def local_target() -> Target:
    """Returns the target that describes this machine's first device.

    Raises ValueError where it is a GPU that no target describes.
    """
    # A look at the device must not take its memory from the server that may run on it.
    jax.config.update("jax_pjrt_client_create_options", {"preallocate": False})
    device = jax.devices()[0]
    if device.platform == "cpu":
        return load_target(LOCAL)
    for name in known_targets():
        if (target := load_target(name)).device_kind == device.device_kind:
            return target
    raise ValueError(
        f"target is not given, and none of {', '.join(known_targets())} is this machine's {device.device_kind!r}: "
        "describe it in a .txtpb file"
    )


def _described(target: Target) -> jax.sharding.AbstractMesh:
    """Returns an abstract mesh of one such device, which need not exist nor be compiled for."""
    platform = "cpu" if target.is_local else "cuda"
    device = jax.sharding.AbstractDevice(target.device_kind, target.sm_count or None, platform)
    return jax.sharding.AbstractMesh((1,), ("tensor",), abstract_device=device)


def _compile(shapes: Shapes, target: Target, workers: int) -> _Needs:
    """Compiles the largest program of each kind, or estimates their needs where their compiler is missing."""
    counts = collections.Counter(key.kind for key in program_keys(shapes))
    try:
        mesh = target_mesh(target)
    except PluginMissingError as error:
        return _estimate(shapes, sum(counts.values()) * COMPILE_SECONDS / workers, str(error))
    found: dict[Any, ProgramMemory] = {}
    seconds = 0.0
    for key in largest_keys(shapes):
        start = time.perf_counter()
        found[key] = program_memory(compile_program(key, shapes, mesh))
        seconds += (time.perf_counter() - start) * counts[key.kind]
    source = f"{seconds / sum(counts.values()):.1f} s for each program, measured now with the largest of each kind"
    needs = loaded(ProgramNeeds.from_largest(found, shapes), mesh)
    return _Needs(needs, seconds / workers, source, "")


def _estimate(shapes: Shapes, seconds: float, reason: str) -> _Needs:
    mesh = make_mesh(jax.devices("cpu")[:1])
    found = {
        key: ProgramMemory(temporaries=temporary_bytes(trace(key, shapes, mesh, "gpu")), outputs=0, aliased=0, code=0)
        for key in largest_keys(shapes)
    }
    source = f"{COMPILE_SECONDS:g} s for each program, stated: measured for an 8B model"
    return _Needs(ProgramNeeds.from_largest(found, shapes), seconds, source, reason)


def _reported(report: pathlib.Path, target: Target, sizes: dict[str, tuple[int, ...]]) -> tuple[float, str]:
    """Returns the total compile seconds of a report's programs, and a name for the report."""
    try:
        told = json.loads(report.read_text(encoding="utf-8"))
        name = told["target"]["name"]
        seconds = {(program["kind"], program["size"]): float(program["seconds"]) for program in told["programs"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"report {report} is not one of jaxserve.compile: {error!r}") from error
    if name != target.name:
        raise ValueError(f"report {report} is for the target {name}; the target is {target.name}")
    wanted = {(kind, size) for kind, of_kind in sizes.items() for size in of_kind}
    if seconds.keys() != wanted:
        differing = sorted(wanted ^ seconds.keys())
        raise ValueError(f"report {report} is for other programs: {differing} are in one of both")
    return sum(seconds.values()), f"{sum(seconds.values()) / len(seconds):.1f} s for each program, from {report}"


def _sizes(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    keys = program_keys(shapes)
    return {
        kind: tuple(sorted(key.size for key in keys if key.kind == kind))
        for kind in dict.fromkeys(key.kind for key in keys)
    }


def _lengths(max_model_len: int) -> list[int]:
    return [*(length for length in LENGTHS if length < max_model_len), max_model_len]


def _concurrency(shapes: Shapes, plan: MemoryPlan, length: int) -> Concurrency:
    pages = shapes.groups.pages(length, shapes.page_size)
    return Concurrency(length, greatest_concurrency(plan.num_pages - 1, pages, shapes.num_slots))


def _page_groups(shapes: Shapes) -> PageGroups:
    return PageGroups(shapes.page_size, shapes.groups.windows, shapes.buckets.tokens[-1])
