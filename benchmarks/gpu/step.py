"""The whole decode step of Llama-3.1-8B beside its byte limit, and where its time goes."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu import device, engine_step, llama
from benchmarks.gpu.engine_step import Engine
from benchmarks.gpu.record import AbsentError, Record, Settings
from jaxserve.programs.step_programs import Shapes
from jaxserve.scheduler.buckets import Buckets

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
    """One case a batch and context, then a profile of one of them."""
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

    def profile_once() -> None:
        batch, context, _ = cases(settings)[0]
        record.case(
            f"profile of batch {batch} context {context}",
            lambda: on("", lambda engine: profile(engine, batch, context)),
        )

    profiled = False
    for batch, context, pool_dtype in cases(settings):
        if pool_dtype and not profiled:  # should the profiler hang, little is left to lose
            profile_once()
            profiled = True
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
    if not profiled:
        profile_once()


def cases(settings: Settings) -> list[tuple[int, int, str]]:
    """(batch, context, dtype of the pages or "" for the model's), the most telling first."""
    if not settings.gpu:
        return [(4, 64, "")]
    chosen = [(64, 1024), (1, 1024), (256, 1024), (8, 1024), (64, 4096), (256, 2048), (1, 32768), (8, 32768)]
    plain = [(batch, context, "") for batch, context in chosen[: 4 if settings.quick else None]]
    return plain if settings.quick else [*plain, (64, 4096, "float8_e4m3fn"), (256, 2048, "float8_e4m3fn")]


def make_shapes(settings: Settings, name: str, pool_dtype: str = "") -> Shapes:
    """The shapes of the programs; as many pages as the largest case needs, or as memory has room for."""
    model = llama.LLAMA_8B if settings.gpu else llama.TINY
    sizes = (8, 64, 256) if settings.gpu else (8,)
    shapes = Shapes(
        model=model,
        dtype=model.dtype,
        buckets=Buckets(sizes, sizes),
        num_slots=llama.NUM_SLOTS if settings.gpu else 8,
        max_model_len=model.max_position_embeddings,
        page_size=llama.PAGE_SIZE if settings.gpu else 16,
        num_pages=2,
        attention=name,
        kv_cache_dtype=pool_dtype or None,
    )
    wanted = max(batch * -(-context // shapes.page_size) for batch, context, _ in cases(settings)) + 64
    room = device.device_memory() - engine_step.weight_bytes(model, model.dtype) - SPARE_BYTES
    pages = min(wanted, room // engine_step.page_bytes(shapes)) if settings.gpu else wanted
    if pages < 128 and settings.gpu:
        raise AbsentError(f"{device.device_memory() / 2**30:.0f} GiB of memory do not hold the model")
    return dataclasses.replace(shapes, num_pages=pages // 64 * 64)


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
            for _ in range(steps):
                done = step()
            jax.block_until_ready(done)
        kernels = device_events(pathlib.Path(folder))
    if not kernels:
        raise AbsentError("the profile has no events of a device: is CUPTI there?")
    kinds: dict[str, float] = {}
    for name, (seconds, _) in kernels.items():
        kind = next((kind for kind, words in KINDS if any(word in name.lower() for word in words)), "other")
        kinds[kind] = kinds.get(kind, 0.0) + seconds * 1e3 / steps
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:25]
    return {
        "ms_per_step": kinds,
        "kernels": [
            {"name": name, "ms_per_step": seconds * 1e3 / steps, "launches_per_step": count / steps}
            for name, (seconds, count) in longest
        ],
    }


def device_events(folder: pathlib.Path) -> dict[str, tuple[float, int]]:
    """Seconds and launches of each kernel on the GPU's streams in the traces under `folder`."""
    found: dict[str, tuple[float, int]] = {}
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
    return found
