"""Programs that were compiled without a device: does the runtime load them, do they run, do they compute the same?

The bundles are those under the directory that the command line names (or benchmarks/bundles). One more is compiled
here and now, in a process that sees no GPU, so that it fits this machine's versions and this code.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import time
import types
import typing
from typing import Any

import jax
import numpy as np

from benchmarks.gpu import device, process
from benchmarks.gpu.engine_step import Engine
from benchmarks.gpu.record import AbsentError, Record, Settings
from jaxserve.models.params import make_mesh
from jaxserve.programs.aot.bundle import MANIFEST, Bundle, BundleError
from jaxserve.programs.step_programs import ProgramKey, Shapes
from jaxserve.programs.target_devices import LOCAL, known_targets, load_target

COMPILE_SECONDS = 120.0
CONTEXT = 100
TOLERANCE = 1e-2


def run(settings: Settings, record: Record) -> None:
    """Each bundle found, then the one made here."""
    device.prepare(settings, record)
    places = found(settings)
    if not places:
        where = settings.bundle or "benchmarks/bundles, and none was named"
        record.summary["note"] = f"There is no bundle in {where}; the one below was compiled on this machine."
    for place in places:
        try_bundle(record, settings, place, place.name)
    made = pathlib.Path(settings.output) / "bundle"
    if record.case("compile here, without a device", lambda: make(settings, record, made)) is not None:
        try_bundle(record, settings, made, "made here")


def found(settings: Settings) -> list[pathlib.Path]:
    """The bundles in the directory: itself, or those in directories in it."""
    if settings.bundle is None:
        return []
    root = pathlib.Path(settings.bundle)
    return [path.parent for path in sorted([*root.glob(MANIFEST), *root.glob(f"*/{MANIFEST}")])]


def make(settings: Settings, record: Record, directory: pathlib.Path) -> dict[str, Any]:
    """Compiles a bundle for this machine's kind of device in a process that sees no GPU."""
    kind = jax.devices()[0].device_kind
    names = [name for name in known_targets() if name != LOCAL and load_target(name).device_kind == kind]
    if settings.gpu and not names:
        raise AbsentError(f"no file in configs/targets describes {kind!r}")
    log = pathlib.Path(settings.output) / "logs" / "make_bundle.log"
    hidden = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = process.python("benchmarks.gpu.make_bundle", str(directory), names[0] if settings.gpu else LOCAL)
    ended = process.run(
        command,
        log,
        min(COMPILE_SECONDS, max(1.0, record.seconds_left)),
        env=process.environment(gpu=False, extra=hidden) | hidden,
    )
    if ended.status != 0:
        raise RuntimeError(f"{ended.text}: {process.tail(log, 1500)}")
    files = list((directory / "programs").iterdir())
    return {"load_ms": None, "programs": len(files), "bytes": sum(os.path.getsize(file) for file in files)}


def try_bundle(record: Record, settings: Settings, directory: pathlib.Path, label: str) -> None:
    """Loads a bundle as the engine does; where that is refused, its bytes alone; then runs its programs."""
    mesh = make_mesh()
    opened: list[Bundle] = []
    loaded: list[Any] = []

    def load() -> dict[str, Any]:
        try:
            bundle = Bundle.open(directory)
        except BundleError as error:
            raise AbsentError(f"refused: {error}") from error
        opened.append(bundle)
        shapes = build(Shapes, bundle.manifest["shapes"])
        start = time.perf_counter()
        try:
            loaded.append((shapes, bundle.load(shapes, mesh)))
        except BundleError as error:
            raise AbsentError(f"refused: {error}") from error
        return {"load_ms": (time.perf_counter() - start) * 1e3, "programs": len(bundle.manifest["programs"])}

    def raw() -> dict[str, Any]:
        start = time.perf_counter()
        client, programs = jax.devices()[0].client, opened[0].manifest["programs"]
        for entry in programs:
            client.deserialize_executable((directory / entry["file"]).read_bytes(), jax.devices()[:1])
        return {"load_ms": (time.perf_counter() - start) * 1e3, "programs": len(programs)}

    if record.case(f"{label}: load", load) is None:
        if not opened or opened[0].manifest.get("platform") != jax.devices()[0].platform:
            return
        record.case(f"{label}: load the bytes unverified", raw)
    elif loaded:
        shapes, programs = loaded[0]
        size = shapes.buckets.tokens[-1]
        for kind in dict.fromkeys(key.kind for key in programs.executables if key.kind != "sample"):
            record.case(f"{label}: {kind} {size}", lambda kind=kind: compare(settings, shapes, programs, kind))


def compare(settings: Settings, shapes: Shapes, programs: Any, kind: str) -> dict[str, Any]:
    """Runs a step by the bundle's programs and by programs compiled on the device, from the same state."""
    batch = shapes.buckets.rows[-1]
    results = []
    timing = None
    for bundled in (False, True):
        engine = Engine(shapes, settings.seed)
        engine.set_tables(batch, CONTEXT, settings.seed)
        plan = engine.plan(batch, CONTEXT)
        key = ProgramKey(kind, plan.token_bucket)
        if bundled:
            engine.use(programs.executables)
        vectors = engine.vectors(plan)
        hidden = np.asarray(engine.forward(key, vectors.forward))
        results.append((hidden, np.asarray(engine.sample(plan.row_bucket, vectors.sample))))
        timing = device.time_launches(lambda: engine.forward(key, vectors.forward), 1, rounds=3)  # noqa: B023
    (fresh, fresh_ids), (loaded, loaded_ids) = results
    wide, other = fresh.astype(np.float64), loaded.astype(np.float64)
    error = float(np.linalg.norm(other - wide) / max(float(np.linalg.norm(wide)), 1e-30))
    assert timing is not None
    result: dict[str, Any] = {
        **timing.fields(),
        "relative_error": error,
        "same_bits": fresh.tobytes() == loaded.tobytes(),
        "same_ids": float(np.mean(fresh_ids == loaded_ids)),
        "agrees": error <= TOLERANCE,
    }
    return result if error <= TOLERANCE else result | {"reason": f"hidden states differ by {error:.3g}"}


def build(kind: Any, value: Any) -> Any:
    """A dataclass with the values that `dataclasses.asdict` and JSON left of it."""
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else build(next(k for k in typing.get_args(kind) if k is not type(None)), value)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: build(hints[name], item) for name, item in value.items()})  # type: ignore[operator]
    return tuple(value) if isinstance(value, list) else value
