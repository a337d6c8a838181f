"""What the parts that use torch share. torch and jax never meet in one process: each wants the device's memory."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.counts import SMALL, Heads
from benchmarks.gpu.peers import Shape
from benchmarks.gpu.record import AbsentError, Record, Settings

ROUNDS = 5
ROUND_SECONDS = 0.02
CACHE_BYTES = 64 * 2**20


def load(name: str) -> Any:
    """A package; AbsentError where it is not installed or does not load."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a package that does not fit the machine fails with whatever it likes
        raise AbsentError(f"{name} is not here: {type(error).__name__}: {str(error)[:200]}") from error


def prepare(settings: Settings, record: Record) -> Any:
    """torch, ready for the device of the suite."""
    torch = load("torch")
    if settings.gpu and not torch.cuda.is_available():
        raise AbsentError(f"torch {torch.__version__} is built without this machine's CUDA")
    record.after_failure(lambda: recover(torch, settings.gpu))
    record.summary |= {"torch": torch.__version__}
    return torch


def recover(torch: Any, gpu: bool) -> bool:
    """Frees what a failed case left; False where the device does not work any more."""
    if not gpu:
        return True
    try:
        torch.cuda.empty_cache()
        return int((torch.ones((), device="cuda") + 41).item()) == 42
    except Exception as error:
        print(f"the device fails: {type(error).__name__}: {error}", flush=True)
        return False


def heads_of(settings: Settings) -> Heads:
    """As in the parts that use jax."""
    return Heads() if settings.gpu else SMALL


def random(torch: Any, settings: Settings, seed: int, *shape: int) -> Any:
    """Normal values in bfloat16 on the GPU, in float32 on a CPU."""
    place, dtype = ("cuda", torch.bfloat16) if settings.gpu else ("cpu", torch.float32)
    generator = torch.Generator(place).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype, device=place)


def seconds_a_call(torch: Any, settings: Settings, calls: list[Callable[[], Any]]) -> dict[str, Any]:
    """Median seconds of one of `calls`, which run one after another; as a CUDA graph where that can be captured."""
    if not settings.gpu:
        return _timed(lambda: [call() for call in calls], len(calls), lambda: None) | {"graph": False}
    for _ in range(3):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        launch: Callable[[], Any] = graph.replay
        captured = True
    except Exception as error:
        print(f"no CUDA graph: {type(error).__name__}: {str(error)[:200]}", flush=True)
        torch.cuda.synchronize()
        launch = lambda: [call() for call in calls]  # noqa: E731
        captured = False
    return _timed(launch, len(calls), torch.cuda.synchronize) | {"graph": captured}


def _timed(launch: Callable[[], Any], calls: int, wait: Callable[[], None]) -> dict[str, Any]:
    launch()
    wait()
    start = time.perf_counter()
    launch()
    wait()
    launches = max(1, min(100, round(ROUND_SECONDS / max(1e-6, time.perf_counter() - start))))
    rounds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(launches):
            launch()
        wait()
        rounds.append((time.perf_counter() - start) / (launches * calls))
    return {"seconds": statistics.median(rounds), "best": min(rounds), "worst": max(rounds)}


def finish(settings: Settings, shape: Shape, timed: dict[str, Any]) -> dict[str, Any]:
    """The fields of a case."""
    found = settings.load("environment").get("summary", {})
    rates = shape.rates(
        heads_of(settings), timed["seconds"], found.get("copy_bytes_per_s"), found.get("bf16_flop_per_s")
    )
    return {
        "microseconds": timed["seconds"] * 1e6,
        "microseconds_best": timed["best"] * 1e6,
        "microseconds_worst": timed["worst"] * 1e6,
        "graph": timed["graph"],
        **rates,
    }
