"""Compiles the closed set for a target and writes the AOT bundle and a report on the programs."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from jaxserve.config.settings import EngineConfig
from jaxserve.pallas_kernels.paged_attention.pool import value_dtype
from jaxserve.pallas_kernels.paged_attention.triton.tuning import DecodeConfig, lookup
from jaxserve.planning import decode_roofline as roofline
from jaxserve.planning.memory_plan import DeviceMemory, MemoryPlan, MemoryPlanner
from jaxserve.planning.reports import thunks
from jaxserve.planning.reports.attention_traffic import Scenario, kernel_traffic
from jaxserve.planning.reports.inspection import Inspected, ProgramReport, inspect_program, roofline_seconds
from jaxserve.planning.reports.markdown import render
from jaxserve.planning.reports.traffic import program_traffic
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.programs.aot import plugin
from jaxserve.programs.aot.bundle import BundleWriter
from jaxserve.programs.compiler import compiler_options, fresh_compilations
from jaxserve.programs.program_needs import ProgramNeeds, compiled_needs, loaded
from jaxserve.programs.step_programs import ProgramKey, Shapes, abstract_pools, lower, program_keys
from jaxserve.programs.target_devices import Target, target_mesh

T = TypeVar("T")

CONTEXTS = (1024, 8192)
"""Context lengths for which a decode step's bytes are counted."""

REPORT_JSON, REPORT_MARKDOWN = "report.json", "report.md"


@dataclasses.dataclass(frozen=True)
class DecodeStepReport:
    """Describes a decode and a sample program over `rows` sequences of `context` positions.

    Attributes:
        must_bytes: weights, keys and values that the step must move (`roofline.decode_step`).
        moved_bytes: bytes that both programs move.
        ratio: of moved_bytes to must_bytes.
        roofline_seconds: of the bytes moved.
        tokens_per_second: at that time.
    """

    rows: int
    context: int
    must_bytes: int
    moved_bytes: int
    ratio: float
    roofline_seconds: float
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class Report:
    """Holds everything that one run of the compiler reported; as JSON, `report.json`."""

    versions: dict[str, str]
    target: dict[str, Any]
    shapes: dict[str, Any]
    memory: dict[str, int]
    compiler_options: dict[str, Any]
    seconds: float
    programs: tuple[ProgramReport, ...]
    decode_steps: tuple[DecodeStepReport, ...]
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))


class UntunedMatmulError(RuntimeError):
    """A program contains a matmul as an untuned Triton kernel; no bundle of it is written."""


@dataclasses.dataclass(frozen=True)
class Compiler:
    """Compiles the programs of `shapes` for the devices of `mesh`, and inspects them; within `fresh_compilations`."""

    shapes: Shapes
    mesh: Mesh
    target: Target
    context: int = CONTEXTS[0]

    @property
    def decode_config(self) -> DecodeConfig:
        pool = value_dtype(abstract_pools(self.shapes, self.mesh)[0].dtype).name
        return lookup(self.target.device_kind, "decode", self.shapes.dtype, pool, self.shapes.model.head_dim)

    def compile(self, key: ProgramKey, *, bundle: bool) -> tuple[jax.stages.Compiled, Inspected]:
        """Compiles as the server does, and inspects the result.

        Only XLA's dump shows what a GPU program launches, and the dump's path becomes part of the executable. So the
        programs of a bundle (`bundle`) are compiled without it, and once more for the report.
        """
        options = compiler_options(self.target.platform)
        lowered, lowering = _timed(lambda: lower(key, self.shapes, self.mesh))
        if self.target.platform == "gpu":
            with tempfile.TemporaryDirectory(prefix="jaxserve-dump-") as directory:
                compiled, compiling = _timed(lambda: lowered.compile(options | {"xla_dump_to": directory}))
                launched = thunks.read(pathlib.Path(directory))
            if bundle:
                compiled, compiling = _timed(lambda: lowered.compile(options))
        else:
            compiled, compiling = _timed(lambda: lowered.compile(options))
            launched = None
        inspected = inspect_program(
            key,
            self.shapes,
            self.mesh,
            self.target,
            compiled,
            seconds=lowering + compiling,
            thunks=launched,
            context=self.context,
            decode_config=self.decode_config,
        )
        return compiled, inspected


def build(
    config: EngineConfig,
    target: Target,
    output: pathlib.Path,
    *,
    report_only: bool = False,
    contexts: Sequence[int] = CONTEXTS,
    merge: Sequence[pathlib.Path] = (),
    progress: bool = False,
) -> Report:
    """Compiles every program of the closed set and writes bundle and report into `output`.

    Args:
        report_only: write no bundle.
        contexts: of the decode steps that are counted; the first one also of the decode programs.
        merge: report.json of other runs, for the same page.
        progress: shows a bar on standard error.

    Raises:
        ValueError: the configuration does not fit the target.
        UntunedMatmulError: a program contains an untuned matmul.
    """
    with fresh_compilations():
        return _build(config, target, output, report_only, contexts, merge, progress)


def _build(
    config: EngineConfig,
    target: Target,
    output: pathlib.Path,
    report_only: bool,
    contexts: Sequence[int],
    merge: Sequence[pathlib.Path],
    progress: bool,
) -> Report:
    start = time.perf_counter()
    mesh = target_mesh(target)
    shapes = resolve_shapes(config, target.platform, planning=True)
    device = DeviceMemory.share(
        target.device_memory_bytes, config.cache.gpu_memory_utilization, host=target.platform == "cpu"
    )
    planner = MemoryPlanner(shapes, config.cache, mesh, device)
    plan = planner.pool(lambda: loaded(compiled_needs(shapes, mesh), mesh))
    shapes = dataclasses.replace(shapes, num_pages=plan.num_pages)
    output.mkdir(parents=True, exist_ok=True, mode=0o755)  # see BundleWriter
    writer = None if report_only else BundleWriter(output, shapes, mesh, target)
    compiler = Compiler(shapes, mesh, target, contexts[0])
    programs = _compile_set(compiler, writer, progress)
    plan = planner.plan(shapes.num_pages, loaded(_needs(programs), mesh))
    plan.check()
    report = _report(compiler, programs, contexts, plan, time.perf_counter() - start)
    if writer is not None:
        writer.finish()
    others = [json.loads(path.read_text(encoding="utf-8")) for path in merge]
    (output / REPORT_JSON).write_text(json.dumps(report.to_json(), indent=1) + "\n", encoding="utf-8")
    (output / REPORT_MARKDOWN).write_text(render([report.to_json(), *others]), encoding="utf-8")
    return report


def _timed(call: Callable[[], T]) -> tuple[T, float]:
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def _compile_set(compiler: Compiler, writer: BundleWriter | None, progress: bool) -> dict[ProgramKey, Inspected]:
    def one(key: ProgramKey) -> Inspected:
        compiled, inspected = compiler.compile(key, bundle=writer is not None)
        if inspected.report.triton_matmuls:
            raise UntunedMatmulError("; ".join(inspected.report.problems(compiler.target)))
        if writer is not None:
            writer.add(key, compiled)
        return inspected

    keys = program_keys(compiler.shapes)
    found: dict[ProgramKey, Inspected] = {}
    with (
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as workers,
        tqdm(total=len(keys), desc="compiling", unit="program", disable=not progress) as bar,
    ):
        futures = {workers.submit(one, key): key for key in keys}
        try:
            for future in concurrent.futures.as_completed(futures):
                found[futures[future]] = future.result()
                bar.update()
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            raise
    return {key: found[key] for key in sorted(keys, key=lambda key: (key.kind, key.size))}


def _needs(programs: dict[ProgramKey, Inspected]) -> ProgramNeeds:
    return ProgramNeeds.of([one.memory for one in programs.values()])


def _report(
    compiler: Compiler,
    programs: dict[ProgramKey, Inspected],
    contexts: Sequence[int],
    plan: MemoryPlan,
    seconds: float,
) -> Report:
    target = compiler.target
    options = compiler_options(target.platform)
    options.pop(plugin.TOOLKIT_OPTION, None)
    reports = tuple(one.report for one in programs.values())
    return Report(
        versions=_versions(target),
        target={
            "name": target.name,
            "device_kind": target.device_kind,
            "compute_capability": target.compute_capability,
            "device_memory_bytes": target.device_memory_bytes,
            "memory_bandwidth": target.memory_bandwidth,
            "peak_flops": dict(target.peak_flops),
            "shared_memory_per_block": target.shared_memory_per_block,
            "source": target.source,
        },
        shapes=dataclasses.asdict(compiler.shapes),
        memory=plan.parts() | {"total": plan.device.total},
        compiler_options=dict(options),
        seconds=seconds,
        programs=reports,
        decode_steps=_decode_steps(compiler, programs, contexts),
        problems=tuple(line for report in reports for line in report.problems(target)),
    )


def _decode_steps(
    compiler: Compiler, programs: dict[ProgramKey, Inspected], contexts: Sequence[int]
) -> tuple[DecodeStepReport, ...]:
    shapes, target = compiler.shapes, compiler.target
    usable = shapes.num_pages - 1  # the null page holds none
    steps = []
    for rows in shapes.buckets.rows:
        decode, sample = (programs.get(ProgramKey(kind, rows)) for kind in ("decode", "sample"))
        for context in contexts:
            if decode is None or sample is None or rows * shapes.groups.pages(context, shapes.page_size) > usable:
                continue
            scenario = Scenario(rows=rows, context=context)
            traffic = [
                program_traffic(one.module, kernel_traffic(scenario, compiler.decode_config))
                for one in (decode, sample)
            ]
            moved = sum(one.bytes for one in traffic)
            must = roofline.decode_step(shapes, target, rows, context).bytes
            seconds = sum(roofline_seconds(one, target) for one in traffic)
            rate = rows / seconds if seconds else 0.0
            steps.append(DecodeStepReport(rows, context, must, moved, moved / must, seconds, rate))
    return tuple(steps)


def _versions(target: Target) -> dict[str, str]:
    found = {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
    }
    if target.platform == "gpu":
        name, version = plugin.find_plugin()
        found |= {name: version, "ptxas": plugin.assembler_version() or "jax's own"}
    return found
