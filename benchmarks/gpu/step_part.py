"""The whole decode step of Llama-3.1-8B beside its byte limit, and where its time goes."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu import device, engine_step
from benchmarks.gpu import llama_shape as llama
from benchmarks.gpu.engine_step import Engine
from benchmarks.gpu.record import AbsentError, Record, Settings
from jaxserve.programs.step_programs import Shapes

SPARE_BYTES = 4 * 2**30
"""Left beside weights and pages: logits, temporaries, what makes the random values."""

# Words in the names of kernels, in the order in which they are looked for.
KINDS = (
    ("attention", ("paged_attention", "attention_decode", "combine")),
    ("KV write", ("kv_write", "rotate")),
    ("matmul", ("gemm", "nvjet", "cutlass", "cublas", "xmma", "gemv", "dot")),
    ("copy", ("memcpy", "memset")),
)


def run(settings: Settings, record: Record) -> None:
    """One case a batch and context, and a profile of the first of them."""
    name = device.prepare(settings, record)
    ceiling = device.copy_bandwidth(settings)
    shapes = make_shapes(settings, name)
    record.summary |= {
        "implementation": name,
        "copy_bytes_per_s": ceiling,
        "num_pages": shapes.num_pages,
        "page_size": shapes.page_size,
        "weight_bytes": engine_step.weight_bytes(shapes.model, shapes.dtype),
    }
    held: dict[str, Engine] = {}

    def on(pool_dtype: str, measure: Callable[[Engine], dict[str, Any]]) -> dict[str, Any]:
        """`measure` on the engine with pages of this dtype; there is one engine at a time."""
        if pool_dtype not in held:
            held.clear()
            held[pool_dtype] = Engine(make_shapes(settings, name, pool_dtype), settings.seed)
        try:
            return measure(held[pool_dtype])
        except AbsentError:
            raise
        except Exception:
            held.clear()  # its donated arrays may be gone
            raise

    def measured(chosen: Iterable[tuple[int, int, str]]) -> None:
        for batch, context, pool_dtype in chosen:
            record.case(
                f"batch {batch} context {context} {pool_dtype}".rstrip(),
                lambda batch=batch, context=context, pool_dtype=pool_dtype: on(
                    pool_dtype, lambda engine: measure(engine, batch, context, ceiling, settings)
                ),
                batch=batch,
                context=context,
                pool_dtype=pool_dtype,
                model="Llama-3.1-8B" if settings.gpu else "a tiny model",
            )

    found = cases(settings)
    measured(found[:PROFILED])
    for batch, context, _ in found[:PROFILED]:  # should the profiler hang, what counts most is there already
        record.case(
            f"profile of batch {batch} context {context}",
            lambda batch=batch, context=context: on("", lambda engine: profile(engine, batch, context)),
        )
    measured(found[PROFILED:])


PROFILED = 3
"""The first cases, those that are profiled too."""


def cases(settings: Settings) -> list[tuple[int, int, str]]:
    """(batch, context, dtype of the pages or "" for the model's), the most telling first."""
    if not settings.gpu:
        return [(4, 64, ""), (1, 64, ""), (8, 64, "")]
    plain = [(64, 1024), (1, 1024), (256, 1024), (8, 1024), (64, 4096), (256, 2048), (1, 32768), (8, 32768)]
    return [*((batch, context, "") for batch, context in plain)] + [
        (64, 4096, "float8_e4m3fn"),
        (256, 2048, "float8_e4m3fn"),
    ]


def make_shapes(settings: Settings, name: str, pool_dtype: str = "") -> Shapes:
    """The shapes of the engine's programs; on a GPU with little memory fewer pages than the largest case needs."""
    fields: dict[str, Any] = {"attention": name} | ({"kv_cache_dtype": pool_dtype} if pool_dtype else {})
    shapes = llama.engine_shapes(settings.mode, **fields)
    if not settings.gpu:
        return shapes
    room = device.device_memory() - engine_step.weight_bytes(shapes.model, shapes.dtype) - SPARE_BYTES
    pages = min(shapes.num_pages, room // engine_step.page_bytes(shapes) // 64 * 64)
    if pages < 128:
        raise AbsentError(f"{device.device_memory() / 2**30:.0f} GiB of memory do not hold the model")
    return dataclasses.replace(shapes, num_pages=pages)


def measure(engine: Engine, batch: int, context: int, ceiling: float | None, settings: Settings) -> dict[str, Any]:
    """Milliseconds of the step as the engine dispatches it, and of its pieces with what the host tells in place."""
    shapes = engine.shapes
    if batch * -(-context // shapes.page_size) >= shapes.num_pages:
        raise AbsentError(f"{shapes.num_pages} pages, all that fit, do not hold it")
    engine.set_tables(batch, context, settings.seed)
    plan = engine.plan(batch, context)
    vectors, forward_key, size = engine.vectors(plan), shapes.forward_key(plan), plan.row_bucket
    placed = jax.device_put(vectors.forward), jax.device_put(vectors.sample)

    def step() -> Any:
        engine.forward(forward_key, vectors.forward)
        return engine.sample(size, vectors.sample)

    def clocked(launch: Callable[[], Any]) -> float:
        return device.time_launches(launch, 1, round_seconds=0.1, rounds=5, most=30).seconds * 1e3

    ids = step()
    dense, arguments = engine.without_attention(plan.token_bucket)
    dense_ms = clocked(lambda: dense(*arguments))
    forward_ms = clocked(lambda: engine.forward(forward_key, placed[0]))
    sample_ms = clocked(lambda: engine.sample(size, placed[1]))
    step_ms = clocked(step)
    engine.set_tables(batch, context, settings.seed, temperature=0.8, top_p=0.9)
    random_ms = clocked(lambda: engine.sample(size, placed[1]))
    moved = engine_step.step_bytes(shapes, batch, context)
    result = {
        "program": f"{forward_key.kind}_{forward_key.size}",
        "step_ms": step_ms,
        "forward_ms": forward_ms,
        "dense_ms": dense_ms,
        "attention_ms": forward_ms - dense_ms,
        "sample_ms": sample_ms,
        "sample_top_p_ms": random_ms,
        "bytes": moved,
        "limit_ms": moved / ceiling * 1e3 if ceiling else None,
        "share": moved / ceiling * 1e3 / step_ms if ceiling else None,
        "gb_per_s": moved / step_ms / 1e6,
        "tokens_per_s": batch / step_ms * 1e3,
    }
    good = bool(jnp.all(ids[:batch] >= 0)) and bool(jnp.all(jnp.isfinite(engine.hidden[:batch].astype(jnp.float32))))
    return result if good else result | {"reason": "hidden states or logits are not finite"}


def profile(engine: Engine, batch: int, context: int, steps: int = 5) -> dict[str, Any]:
    """Milliseconds a step of each kind of kernel, from jax's profiler; AbsentError where it sees no device."""
    engine.set_tables(batch, context, 0)
    plan = engine.plan(batch, context)
    vectors, key = engine.vectors(plan), engine.shapes.forward_key(plan)

    def step() -> Any:
        engine.forward(key, vectors.forward)
        return engine.sample(plan.row_bucket, vectors.sample)

    jax.block_until_ready(step())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready([step() for _ in range(steps)])
        kernels, span = device_events(pathlib.Path(folder))
    if not kernels:
        raise AbsentError("the profile has no events of a device: is CUPTI there?")
    kinds: dict[str, float] = {}
    for name, (seconds, _) in kernels.items():
        kind = next((kind for kind, words in KINDS if any(word in name.lower() for word in words)), "other")
        kinds[kind] = kinds.get(kind, 0.0) + seconds * 1e3 / steps
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])
    return {
        "ms_per_step": kinds | {"nothing runs": span * 1e3 / steps - sum(kinds.values())},
        "kernels": [
            {"name": name, "ms_per_step": seconds * 1e3 / steps, "launches_per_step": count / steps}
            for name, (seconds, count) in longest
        ],
    }


def device_events(folder: pathlib.Path) -> tuple[dict[str, tuple[float, int]], float]:
    """Seconds and launches of each kernel on the GPU's streams in the traces under `folder`, and the seconds from the
    begin of the first to the end of the last.
    """
    found: dict[str, tuple[float, int]] = {}
    begins, ends = [], []
    for path in sorted(folder.rglob("*.xplane.pb")):
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            if not plane.name.startswith("/device:GPU"):
                continue
            for line in plane.lines:
                if not line.name.startswith("Stream"):
                    continue  # lines derived from the streams would count everything twice
                for event in line.events:
                    seconds, count = found.get(event.name, (0.0, 0))
                    found[event.name] = seconds + event.duration_ns * 1e-9, count + 1
                    begins.append(event.start_ns)
                    ends.append(event.start_ns + event.duration_ns)
    return found, (max(ends) - min(begins)) * 1e-9 if begins else 0.0
