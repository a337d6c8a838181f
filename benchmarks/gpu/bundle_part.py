"""Programs that were compiled without a device: does the runtime load them, do they run, do they compute the same?

The bundle is the one that the command line names, made by `python -m benchmarks.gpu.kit`. Where there is none that fits
this machine's versions and this code, one is compiled here and now, in a process that sees no GPU.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import sys
import time
from typing import Any

import jax
import numpy as np

from benchmarks.gpu import device
from benchmarks.gpu import llama_shape as llama
from benchmarks.gpu import suite_process as process
from benchmarks.gpu.engine_step import Engine
from benchmarks.gpu.record import AbsentError, NoTimeError, Record, Settings
from jaxserve.models.params import make_mesh
from jaxserve.programs.aot.bundle import Bundle, BundleError, BundleWriter
from jaxserve.programs.compiler import ProgramSet, compile_program, fresh_compilations
from jaxserve.programs.step_programs import ProgramKey, Shapes, program_keys
from jaxserve.programs.target_devices import LOCAL, known_targets, load_target, target_mesh, use_cpu_only

COMPILE_SECONDS = 120.0
CONTEXT = 100
TOLERANCE = 1e-2


def run(settings: Settings, record: Record) -> None:
    """The bundle that was brought along, or else one that is made here; then its programs."""
    device.prepare(settings, record)
    label, directory = "brought along", usable(settings, record)
    if directory is None:
        label, made = "made here", pathlib.Path(settings.scratch) / "bundle"
        if record.case("compile here, without a device", lambda: make(settings, record, made)) is None:
            return
        directory = str(made)
    try_bundle(record, settings, pathlib.Path(directory), label)


def shapes_for(platform: str) -> Shapes:
    """The shapes of the bundle's programs."""
    return llama.engine_shapes(platform)


def usable(settings: Settings, record: Record) -> str | None:
    """The directory of the bundle that was brought along; None where it does not fit, and the summary says why."""
    if settings.bundle is None:
        record.summary["bundle"] = "none was brought along"
        return None
    mesh = make_mesh()
    try:
        Bundle.open(settings.bundle).check(shapes_for(mesh.devices.flat[0].platform), mesh)
    except BundleError as error:
        record.summary["bundle"] = f"refused: {error}"
        return None
    record.summary["bundle"] = "fits"
    return settings.bundle


def make(settings: Settings, record: Record, directory: pathlib.Path) -> dict[str, Any]:
    """Compiles a bundle for this machine's kind of device in a process that sees no GPU."""
    kind = jax.devices()[0].device_kind
    names = [name for name in known_targets() if name != LOCAL and load_target(name).device_kind == kind]
    if settings.gpu and not names:
        raise AbsentError(f"no file in configs/targets describes {kind!r}")
    shutil.rmtree(directory, ignore_errors=True)  # of a try for which there was not time enough
    log = directory.parent / "make_bundle.log"
    hidden = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = process.python("benchmarks.gpu.bundle_part", str(directory), names[0] if settings.gpu else LOCAL)
    ended = process.run(
        command,
        log,
        min(COMPILE_SECONDS, max(1.0, record.seconds_left)),
        env=process.environment(gpu=False, extra=hidden) | hidden,
    )
    if ended.status is None:
        raise NoTimeError
    if ended.status != 0:
        raise RuntimeError(f"{ended.text}: {process.tail(log, 1500)}")
    files = list((directory / "programs").iterdir())
    return {"load_ms": None, "programs": len(files), "bytes": sum(os.path.getsize(file) for file in files)}


def try_bundle(record: Record, settings: Settings, directory: pathlib.Path, label: str) -> None:
    """Loads a bundle as the engine does; then runs its programs."""
    mesh = make_mesh()
    loaded: list[tuple[Shapes, ProgramSet]] = []

    def load() -> dict[str, Any]:
        start = time.perf_counter()
        try:
            bundle = Bundle.open(directory)
            shapes = shapes_for(mesh.devices.flat[0].platform)
            loaded.append((shapes, bundle.load(shapes, mesh)))
        except BundleError as error:
            raise AbsentError(f"refused: {error}") from error
        return {"load_ms": (time.perf_counter() - start) * 1e3, "programs": len(bundle.manifest["programs"])}

    if record.case(f"{label}: load", load) is None or not loaded:
        return
    shapes, programs = loaded[0]
    engine = Engine(shapes, settings.seed)
    sizes = [size for size in shapes.buckets.rows if size >= 64][:2] or shapes.buckets.rows[:1]
    for kind, size in (*(("decode", size) for size in sizes), ("forward", sizes[0])):
        key = ProgramKey(kind, size)
        if key in programs.executables:
            record.case(f"{label}: {kind} {size}", lambda key=key: compare(settings, engine, programs, key))


def compare(settings: Settings, engine: Engine, programs: ProgramSet, key: ProgramKey) -> dict[str, Any]:
    """Runs a step by programs compiled on the device and by the bundle's, from the same state; times both."""
    results, timings = [], []
    sample = ProgramKey("sample", engine.shapes.buckets.row_bucket(key.size))
    for bundled in (False, True):
        engine.use(programs.executables if bundled else {})
        engine.set_tables(key.size, CONTEXT, settings.seed)
        vectors = engine.vectors(engine.plan(key.size, CONTEXT))
        hidden = np.asarray(engine.forward(key, vectors.forward))
        results.append((hidden, np.asarray(engine.sample(sample.size, vectors.sample))))
        timings.append(device.time_launches(lambda: engine.forward(key, vectors.forward), 1, rounds=3))  # noqa: B023
    (fresh, fresh_ids), (loaded, loaded_ids) = results
    wide, other = fresh.astype(np.float64), loaded.astype(np.float64)
    error = float(np.linalg.norm(other - wide) / max(float(np.linalg.norm(wide)), 1e-30))
    result: dict[str, Any] = {
        **timings[1].fields(),
        "microseconds_compiled_here": timings[0].seconds * 1e6,
        "relative_error": error,
        "same_bits": fresh.tobytes() == loaded.tobytes(),
        "same_ids": float(np.mean(fresh_ids == loaded_ids)),
        "agrees": error <= TOLERANCE,
    }
    return result if error <= TOLERANCE else result | {"reason": f"hidden states differ by {error:.3g}"}


def write_bundle(directory: pathlib.Path, name: str) -> int:
    """Compiles the programs for a target, without it; returns the bytes of their files.

    What `python -m jaxserve.compile` does for a configuration, without gin, so that the suite can do it anywhere.
    """
    target = load_target(name)
    mesh = target_mesh(target)
    shapes = shapes_for(target.platform)
    writer = BundleWriter(directory, shapes, mesh, target)
    total = 0
    with fresh_compilations():
        for key in program_keys(shapes):
            size = writer.add(key, compile_program(key, shapes, mesh))
            print(f"{key.kind} {key.size}: {size} bytes", flush=True)
            total += size
    writer.finish()
    return total


if __name__ == "__main__":
    use_cpu_only()
    write_bundle(pathlib.Path(sys.argv[1]), sys.argv[2])
