"""The kernels' values against float64, on inputs where everything that must not be read is NaN."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import dense, device
from benchmarks.gpu.dense import Inputs, Problem
from benchmarks.gpu.record import Record, Settings
from jaxserve.pallas_kernels.paged_attention import kv_write, paged_attention, rotate_and_write

TOLERANCE = {"float32": 2e-3, "bfloat16": 1e-2, "float16": 2e-3}
"""Largest relative error ||out - ref|| / ||ref|| by dtype of the queries; float32 allows for tf32 products."""

DECODE = tuple((1, length) for length in (1, 15, 16, 17, 300, 1000, 4097))
MIXED = ((1, 300), (77, 77), (1, 1), (130, 1500), (0, 0), (33, 64), (1, 2000))
PREFILL = ((512, 512), (100, 700), (16, 16))
PLAIN = 6
"""The first problems: plain ones of every kind, checked before the writes and before the options."""


def run(settings: Settings, record: Record) -> None:
    """Attention, then what it promises beyond values, then the writes."""
    name = device.prepare(settings, record)
    record.summary |= {"implementation": name, "tolerance": TOLERANCE}
    problems = attention_problems() if settings.gpu else small_problems()
    first = problems["decode"]

    def attention(labels: Iterable[str]) -> None:
        for label in labels:
            problem = problems[label]
            record.case(
                f"attention {label}",
                lambda problem=problem, label=label: check_attention(
                    problem, name, settings.seed + list(problems).index(label)
                ),
                **{field: value for field, value in dataclasses.asdict(problem).items() if field != "rows"},
                rows=[list(row) for row in problem.rows],
            )

    record.case("batch invariance", lambda: check_invariance(first, name, settings.seed))
    attention(list(problems)[:PLAIN])
    check_writes(settings, record, name)
    attention(list(problems)[PLAIN:])
    for stored, pages in far_pools(settings):
        problem = dataclasses.replace(first, pool_dtype=stored, page_size=64)
        record.case(
            f"last pages of {pages} {stored}",
            lambda problem=problem, pages=pages: check_far_pages(problem, pages, name, settings.seed),
            dtype=problem.dtype,
            pool_dtype=stored,
        )
    worst: dict[str, float] = {}
    for case in record.cases:
        if isinstance(case.get("relative_error"), float):
            kind = f"{case['dtype']} queries, {case['pool_dtype'] or case['dtype']} pool"
            worst[kind] = max(worst.get(kind, 0.0), case["relative_error"])
    record.summary["largest_relative_error"] = worst


def check_writes(settings: Settings, record: Record, name: str) -> None:
    """Both writes into pools of each dtype."""
    for stored in ("bfloat16", "float32", "float8_e4m3fn", "int8"):
        dtype = "float32" if stored == "float32" else "bfloat16"
        for label, check in (("kv_write", check_write), ("rotate_and_write", check_rotate)):
            problem = Problem(((1, 1),), kv_heads=2 if not settings.gpu else 8, dtype=dtype, pool_dtype=stored)
            record.case(
                f"{label} {stored}",
                lambda problem=problem, check=check: check(problem, name, settings.seed),
                dtype=dtype,
                pool_dtype=stored,
            )


def attention_problems() -> dict[str, Problem]:
    """What a GPU checks: every head size, page size, group, dtype and option, the plainest first."""
    found = {
        "decode": Problem(DECODE, decode_only=True),
        "prefill": Problem(PREFILL),
        "mixed": Problem(MIXED),
        "decode as mixed": Problem(DECODE),
        "decode long": Problem(((1, 40_000), (1, 131_072), (1, 5)), kv_heads=2, decode_only=True),
        "chunk on context": Problem(((256, 9_000), (1, 4_000)), kv_heads=2),
    }
    assert len(found) == PLAIN
    variants: dict[str, dict[str, Any]] = {
        **{stored: {"pool_dtype": stored} for stored in dense.LARGEST},
        **{f"page {size}": {"page_size": size} for size in (64, 128, 32)},
        **{f"head {size}": {"head_dim": size} for size in (64, 256, 80, 96)},
        **{dtype: {"dtype": dtype, "kv_heads": 4} for dtype in ("float16", "float32")},
        **{f"group {group}": {"group": group, "kv_heads": 2} for group in (8, 1, 16)},
        "window": {"sliding_window": 100},
        "soft cap": {"soft_cap": 20.0},
        "sinks": {"sinks": True, "head_dim": 64},
    }
    bases = {"decode": Problem(DECODE, decode_only=True), "mixed": Problem(MIXED)}
    return found | {
        f"{kind} {variant}": dataclasses.replace(base, **fields)
        for variant, fields in variants.items()
        for kind, base in bases.items()
    }


def small_problems() -> dict[str, Problem]:
    """What a CPU checks in interpret mode."""
    base = Problem(((1, 1), (1, 17), (1, 40)), kv_heads=2, group=2, head_dim=64, decode_only=True)
    mixed = dataclasses.replace(base, rows=((1, 20), (9, 9), (0, 0), (5, 33)), decode_only=False)
    return {
        "decode": base,
        "mixed": mixed,
        "mixed head 80 options": dataclasses.replace(mixed, head_dim=80, soft_cap=20.0, sliding_window=8, sinks=True),
        "decode int8": dataclasses.replace(base, pool_dtype="int8"),
        "mixed float8_e4m3fn": dataclasses.replace(mixed, pool_dtype="float8_e4m3fn", dtype="float32"),
    }


def attend(problem: Problem, inputs: Inputs, name: str, runs: int = 1) -> list[np.ndarray]:
    """The implementation's results of `runs` runs, each written over freed memory that holds NaN."""
    options: dict[str, Any] = {}
    if inputs.k_scale is not None:
        options |= {"k_scale": jnp.asarray(inputs.k_scale), "v_scale": jnp.asarray(inputs.v_scale)}
    if inputs.sinks is not None:
        options["sinks"] = jnp.asarray(inputs.sinks)

    arrays = [jnp.asarray(a) for a in (inputs.q, inputs.pool, inputs.page_table, inputs.kv_lens)]
    arrays.append(jnp.asarray(inputs.query_start_loc))
    program = attention_program(dataclasses.replace(problem, rows=(), padding=0), name)
    results = []
    for _ in range(runs):
        device.poison(inputs.q.shape, inputs.q.dtype)
        results.append(np.asarray(program(*arrays, options)))
    return results


@functools.lru_cache(maxsize=4)
def attention_program(problem: Problem, name: str) -> Any:
    """The jitted call; it compiles once for each set of shapes."""

    def call(q: jax.Array, pool: jax.Array, table: jax.Array, lens: jax.Array, starts: jax.Array, given: Any) -> Any:
        return paged_attention(
            q, pool, table, lens, starts, scale=problem.scale, sliding_window=problem.sliding_window,
            soft_cap=problem.soft_cap, decode_only=problem.decode_only, implementation=name, **given,
        )  # fmt: skip

    return jax.jit(call)


def check_attention(problem: Problem, name: str, seed: int) -> dict[str, Any]:
    """Relative and largest error, padding rows, and the same bits from a second run (a difference is a race)."""
    inputs = decode_layout(problem, dense.make_inputs(problem, seed))
    out, again = attend(problem, inputs, name, runs=2)
    result = compare(out, inputs.expected, TOLERANCE[problem.dtype])
    real = int(inputs.query_start_loc[-1])
    result["padding_is_zero"] = bool(np.all(out[real:].astype(np.float32) == 0))
    result["repeats"] = same_bits(out, again)
    if "reason" not in result:
        if not result["padding_is_zero"]:
            result["reason"] = "padding rows are not zero"
        elif not result["repeats"]:
            result["reason"] = "a second run gave other bits"
    return result


def decode_layout(problem: Problem, inputs: Inputs) -> Inputs:
    """The inputs as a decode-only call wants them: row r's token is token r, so padding rows own the padding tokens."""
    if not problem.decode_only or not problem.padding:
        return inputs
    extra = problem.padding
    last = inputs.query_start_loc[-1]
    return dataclasses.replace(
        inputs,
        page_table=np.concatenate([inputs.page_table, np.full((extra, inputs.page_table.shape[1]), 2**28, np.int32)]),
        kv_lens=np.concatenate([inputs.kv_lens, np.zeros(extra, np.int32)]),
        query_start_loc=np.concatenate([inputs.query_start_loc, np.full(extra, last, np.int32)]),
    )


def check_invariance(problem: Problem, name: str, seed: int) -> dict[str, Any]:
    """A row's decode result has the same bits alone, in a batch, and without the promise of decode_only."""
    inputs = dense.make_inputs(problem, seed)
    [batch] = attend(problem, decode_layout(problem, inputs), name)
    [mixed] = attend(dataclasses.replace(problem, decode_only=False), inputs, name)
    alone = []
    for row in range(len(problem.rows)):
        part = dataclasses.replace(
            inputs,
            q=inputs.q[row : row + 1],
            page_table=inputs.page_table[row : row + 1],
            kv_lens=inputs.kv_lens[row : row + 1],
            query_start_loc=np.array([0, 1], np.int32),
        )
        [single] = attend(dataclasses.replace(problem, padding=0), part, name)
        alone.append(same_bits(single[0], batch[row]))
    count = len(problem.rows)
    result = {"rows_alone": alone, "decode_only_same_bits": same_bits(mixed[:count], batch[:count])}
    if not all(alone):
        result["reason"] = f"rows {[row for row, same in enumerate(alone) if not same]} have other bits alone"
    elif not result["decode_only_same_bits"]:
        result["reason"] = "decode_only changes the bits"
    return result


def far_pools(settings: Settings) -> tuple[tuple[str, int], ...]:
    """(dtype, pages of 131,072 elements) at the limit of 32-bit offsets and beyond it, where 64 bits begin."""
    if not settings.gpu:
        return (("bfloat16", 40),)
    return (("bfloat16", 16_384), ("bfloat16", 16_448), ("int8", 16_384), ("int8", 32_832))


def check_far_pages(problem: Problem, num_pages: int, name: str, seed: int) -> dict[str, Any]:
    """Attention over the last pages of a large pool, and a write to them."""
    inputs = decode_layout(problem, dense.make_inputs(problem, seed))

    @functools.partial(jax.jit, static_argnums=1)
    def grown(pages: jax.Array, count: int) -> jax.Array:
        return jnp.zeros((count, *pages.shape[1:]), pages.dtype).at[count - pages.shape[0] :].set(pages)

    shift = num_pages - inputs.pool.shape[0]
    table = np.where(inputs.page_table < inputs.pool.shape[0], inputs.page_table + shift, inputs.page_table)
    far = dataclasses.replace(inputs, pool=grown(jnp.asarray(inputs.pool), num_pages), page_table=table)
    [out] = attend(problem, far, name)
    del far
    result = compare(out, inputs.expected, TOLERANCE[problem.dtype])
    given = write_inputs(problem, seed)
    shift = (num_pages - given["pool"].shape[0]) * problem.page_size
    slots = given["slots"] + np.where(given["slots"] >= problem.page_size, shift, 0).astype(np.int32)
    shape = (slots.size, problem.kv_heads, problem.head_dim)
    kind = dense.numpy_dtype(problem.dtype)
    k, v = (given["random"].standard_normal(shape).astype(np.float32).astype(kind) for _ in range(2))
    write = jax.jit(functools.partial(kv_write, implementation=name), donate_argnums=0)
    pool = write(grown(jnp.asarray(given["pool"]), num_pages), k, v, slots, **given["options"])
    last = np.asarray(pool[-given["pool"].shape[0] :])
    return compare_pool(problem, given, last, np.stack([k, v], 1).astype(np.float64)) | result


def compare(out: np.ndarray, expected: np.ndarray, tolerance: float) -> dict[str, Any]:
    """||out - expected|| / ||expected|| and the largest difference; `reason` where it is above `tolerance` or NaN."""
    difference = out.astype(np.float64) - expected
    relative = float(np.linalg.norm(difference) / max(float(np.linalg.norm(expected)), 1e-30))
    result: dict[str, Any] = {"relative_error": relative, "max_error": float(np.abs(difference).max())}
    if not relative <= tolerance:
        result["reason"] = f"relative error {relative:.3g} is above {tolerance:g}"
    return result


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


def write_inputs(problem: Problem, seed: int) -> dict[str, Any]:
    """A pool of random contents, and slots of 67 tokens: real ones, padding in page 0, and some outside the pool."""
    random = np.random.default_rng(seed)
    heads, dim, size, pages, tokens = problem.kv_heads, problem.head_dim, problem.page_size, 21, 67
    filled = random.standard_normal((pages, 2, heads, size, dim)).astype(np.float32)
    slots = (random.permutation((pages - 1) * size)[:tokens] + size).astype(np.int32)
    slots[5:8], slots[8], slots[9] = 0, pages * size + 3, -1
    scales = np.full((2, heads), 0.03, np.float32) * random.uniform(0.5, 2, (2, heads)).astype(np.float32)
    return {
        "pool": dense.store(filled, problem.stored),
        "slots": slots,
        "real": (slots >= size) & (slots < pages * size),
        "scales": scales,
        "options": {"k_scale": scales[0], "v_scale": scales[1]} if problem.quantized else {},
        "random": random,
    }


def check_write(problem: Problem, name: str, seed: int) -> dict[str, Any]:
    """Every element of the pool but those of page 0 after a write of keys and values."""
    given = write_inputs(problem, seed)
    shape = (given["slots"].size, problem.kv_heads, problem.head_dim)
    kind = dense.numpy_dtype(problem.dtype)
    k, v = (given["random"].standard_normal(shape).astype(np.float32).astype(kind) for _ in range(2))

    def call(pool: jax.Array, k: jax.Array, v: jax.Array, slots: jax.Array, options: Any) -> jax.Array:
        return kv_write(pool, k, v, slots, implementation=name, **options)

    arrays = [jnp.asarray(a) for a in (given["pool"], k, v, given["slots"])]
    program = device.compile_program(call, *arrays, given["options"], donate=(0,))
    out = np.asarray(program(*arrays, given["options"]))
    return compare_pool(problem, given, out, np.stack([k, v], 1).astype(np.float64))


def check_rotate(problem: Problem, name: str, seed: int) -> dict[str, Any]:
    """The rotated queries, and the pool after the rotated keys and the values were written."""
    given = write_inputs(problem, seed)
    random, tokens, dim = given["random"], given["slots"].size, problem.head_dim
    qkv = random.standard_normal((tokens, problem.kv_heads, problem.group + 2, dim)).astype(np.float32)
    angles = random.uniform(0, 6, (tokens, dim // 2))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def call(pool: jax.Array, qkv: jax.Array, cos: jax.Array, sin: jax.Array, slots: jax.Array, options: Any) -> Any:
        return rotate_and_write(
            qkv, cos, sin, pool, slots, dtype=jnp.dtype(problem.dtype), implementation=name, **options
        )

    arrays = [jnp.asarray(a) for a in (given["pool"], qkv, cos, sin, given["slots"])]
    program = device.compile_program(call, *arrays, given["options"], donate=(0,))
    q, out = program(*arrays, given["options"])
    turned = dense.rotated(qkv[:, :, : problem.group + 1], cos, sin)
    result = compare(np.asarray(q), turned[:, :, : problem.group], TOLERANCE[problem.dtype])
    written = np.stack([turned[:, :, problem.group], qkv[:, :, problem.group + 1].astype(np.float64)], 1)
    return result | compare_pool(problem, given, np.asarray(out), written)


def compare_pool(problem: Problem, given: dict[str, Any], out: np.ndarray, written: np.ndarray) -> dict[str, Any]:
    """written: float64 [T, 2, K, D], what the tokens' slots must hold up to one rounding of the pool's dtype."""
    expected = given["pool"].copy()
    scale = given["scales"][None, :, :, None].astype(np.float64) if problem.quantized else np.ones((1, 1, 1, 1))
    size = problem.page_size
    for token in np.flatnonzero(given["real"]):
        slot = given["slots"][token]
        expected[slot // size, :, :, slot % size] = dense.store(
            written[token].astype(np.float32).astype(np.float64) / scale[0], problem.stored
        )
    out, expected = out[1:].view(expected.dtype), expected[1:]
    different = out.view(np.uint8).reshape(*out.shape, -1) != expected.view(np.uint8).reshape(*out.shape, -1)
    share = float(different.any(-1).mean())
    difference = np.abs(out.astype(np.float64) - expected.astype(np.float64))
    step = 2.0 ** {"float32": -22, "bfloat16": -7, "float8_e4m3fn": -3, "int8": -6}[problem.stored]
    allowed = np.maximum(np.abs(expected.astype(np.float64)) * step, 1.0 if problem.stored == "int8" else 1e-5)
    result: dict[str, Any] = {"pool_differs": share, "pool_max_error": float(difference.max())}
    most = 1.0 if problem.stored == "float32" else 0.02  # of elements whose rounding may fall the other way
    if not np.all(difference <= allowed) or share > most:
        result["reason"] = f"{share:.2%} of the pool's elements differ, at most by {difference.max():.3g}"
    return result
