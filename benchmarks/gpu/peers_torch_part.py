"""torch's scaled-dot-product attention over the same shapes, with keys and values in one piece [B, K, S, D].

torch and jax never meet in one process: each wants the device's memory.
"""

from __future__ import annotations

import functools
import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.counts import SMALL, Heads, kv_bytes
from benchmarks.gpu.peers import Shape, decode_shapes, prefill_shapes
from benchmarks.gpu.record import AbsentError, Record, Settings

PEER = "torch SDPA, not paged"
ROUNDS = 5
ROUND_SECONDS = 0.02
CACHE_BYTES = 64 * 2**20


def run(settings: Settings, record: Record) -> None:
    """One case a shape; torch chooses the backend."""
    torch = prepare(settings, record)
    for shape in prefill_shapes(settings) + decode_shapes(settings):
        record.case(
            f"{PEER}: {shape.label}",
            lambda shape=shape: measure(torch, settings, shape),
            **shape.fields(PEER),
        )


def measure(torch: Any, settings: Settings, shape: Shape) -> dict[str, Any]:
    """Time of one call; the calls take several sets of keys and values in turn."""
    heads = heads_of(settings)
    drawn = functools.partial(random, torch, settings)
    read = kv_bytes(heads, shape.batch * shape.context, 2)
    count = max(1, min(8, 4 * CACHE_BYTES // read)) if settings.gpu else 1
    q = drawn(1, shape.batch, heads.query_heads, shape.new, heads.head_dim)
    size = (shape.batch, heads.kv_heads, shape.context, heads.head_dim)
    pairs = [(drawn(2 + 2 * n, *size), drawn(3 + 2 * n, *size)) for n in range(count)]
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention, is_causal=shape.kind == "prefill", enable_gqa=True
    )
    calls = [functools.partial(attend, q, k, v) for k, v in pairs]
    with torch.inference_mode():
        return finish(settings, shape, seconds_a_call(torch, settings, calls))


def prepare(settings: Settings, record: Record) -> Any:
    """torch, ready for the device of the suite."""
    try:
        torch: Any = importlib.import_module("torch")
    except Exception as error:  # a package that does not fit the machine fails with whatever it likes
        raise AbsentError(f"torch is not here: {type(error).__name__}: {str(error)[:200]}") from error
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
