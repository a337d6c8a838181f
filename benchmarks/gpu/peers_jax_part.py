"""What jax itself brings for the same shapes: upstream's Pallas kernels and `jax.nn.dot_product_attention`.

Only upstream's paged kernel reads pages; the others have keys and values in one piece, which is easier.
"""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu import device, paged
from benchmarks.gpu.counts import kv_bytes
from benchmarks.gpu.peers import Shape, decode_shapes, prefill_shapes
from benchmarks.gpu.record import AbsentError, Record, Settings
from jaxserve.pallas_kernels.paged_attention import paged_attention

OPS = "jax.experimental.pallas.ops.gpu"


def run(settings: Settings, record: Record) -> None:
    """The peers in turn, each over its shapes."""
    name = device.prepare(settings, record)
    dense = "cudnn" if settings.gpu else "xla"
    peers: tuple[tuple[str, Callable[..., dict[str, Any]], list[Shape]], ...] = (
        ("Pallas paged_attention (upstream)", upstream_paged, decode_shapes(settings)),
        (f"jax.nn {dense}, not paged", dense_attention, prefill_shapes(settings) + decode_shapes(settings)),
        ("Pallas mha (upstream), not paged", upstream_mha, prefill_shapes(settings)),
    )
    record.case("upstream paged_attention against this one", lambda: check_upstream(settings, name))
    turns = itertools.zip_longest(*([(peer, measure, shape) for shape in shapes] for peer, measure, shapes in peers))
    for peer, measure, shape in (one for turn in turns for one in turn if one is not None):
        record.case(
            f"{peer}: {shape.label}",
            lambda measure=measure, shape=shape: measure(settings, shape),
            **shape.fields(peer),
        )


def upstream(module: str) -> Any:
    """A module of upstream's GPU kernels; AbsentError where this jax has none."""
    try:
        return importlib.import_module(f"{OPS}.{module}")
    except ImportError as error:
        raise AbsentError(f"this jax has no {OPS}.{module}: {error}") from error


def finish(settings: Settings, shape: Shape, timing: device.Timing) -> dict[str, Any]:
    """The fields of a case."""
    ceilings = device.copy_bandwidth(settings), device.matmul_rate(settings)
    return timing.fields() | shape.rates(paged.heads_of(settings), timing.seconds, *ceilings)


def random(settings: Settings, seed: int, *shape: int) -> jax.Array:
    """Normal values in the dtype of the queries."""
    return device.random_array(jax.random.key(seed), shape, paged.query_dtype(settings))


def paged_kernel(settings: Settings, splits: int, block: int) -> Callable[..., jax.Array]:
    """Upstream's kernel with a number of splits and pages a block: (q [R, H, D], k, v, table, lens) -> [R, H, D]."""
    kernel = upstream("paged_attention").paged_attention
    options = {"k_splits": splits, "pages_per_compute_block": block, "interpret": not settings.gpu}

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, table: jax.Array, lens: jax.Array) -> jax.Array:
        return kernel(q * q.shape[-1] ** -0.5, k, v, table, lens, **options)

    return attend


def upstream_paged(settings: Settings, shape: Shape) -> dict[str, Any]:
    """The best of several splits; keys and values are [K, pages, P, D]."""
    heads = paged.heads_of(settings)
    pages_a_row = -(-shape.context // shape.page_size)
    positions = 393_216 if settings.gpu else 512
    size = (heads.kv_heads, positions // shape.page_size, shape.page_size, heads.head_dim)
    k, v = random(settings, 1, *size), random(settings, 2, *size)
    q = random(settings, 3, shape.batch, heads.query_heads, heads.head_dim)
    lens = jnp.full((shape.batch,), shape.context, jnp.int32)
    read = kv_bytes(heads, shape.batch * shape.context, 2)
    count = max(1, min(16, 4 * device.CACHE_BYTES // read)) if settings.gpu else 1
    tables = [jnp.asarray(one) for one in device.page_tables(count, shape.batch, pages_a_row, size[1], settings.seed)]
    best: tuple[device.Timing, str] | None = None
    refused: list[str] = []
    for splits, block in itertools.product((1, 4, 16, 64), (64, 128)) if settings.gpu else ((1, 64),):
        block //= shape.page_size  # from positions to pages
        if pages_a_row % splits or pages_a_row // splits < block or (pages_a_row // splits) % block:
            continue
        attend = jax.jit(paged_kernel(settings, splits, block))

        def chain(q: jax.Array, tables: list[jax.Array], *rest: jax.Array, attend: Any = attend) -> jax.Array:
            for table in tables:
                q = attend(q, *rest[:2], table, rest[2])
            return q

        arguments = (q, tables, k, v, lens)
        try:
            program = device.compile_program(chain, *arguments)
        except jax.errors.JaxRuntimeError as error:
            refused.append(f"k_splits {splits}, {block} pages: {str(error)[:120]}")  # too much shared memory, mostly
            continue
        timing = device.time_function(program, [arguments], count, rounds=5)
        if best is None or timing.seconds < best[0].seconds:
            best = timing, f"k_splits {splits}, pages_per_compute_block {block}"
    if best is None:
        raise AbsentError(f"no configuration works for {pages_a_row} pages: {refused}")
    return finish(settings, shape, best[0]) | {"best": best[1], "refused": refused}


def check_upstream(settings: Settings, name: str) -> dict[str, Any]:
    """Upstream's result beside that of the implementation under test, on the same pages."""
    heads = paged.heads_of(settings)
    pool = random(settings, 4, 64, 2, heads.kv_heads, 16, heads.head_dim)
    q = random(settings, 5, 4, heads.kv_heads, heads.group, heads.head_dim)
    table = jnp.asarray(device.page_tables(1, 4, 8, 64, settings.seed)[0])
    lens = jnp.array([128, 77, 16, 1], jnp.int32)
    k, v = pool.transpose(1, 2, 0, 3, 4)
    theirs = jax.jit(paged_kernel(settings, 1, 8))(q.reshape(4, -1, heads.head_dim), k, v, table, lens)
    ours = jax.jit(
        functools.partial(paged_attention, scale=heads.head_dim**-0.5, decode_only=True, implementation=name)
    )(q, pool, table, lens, jnp.arange(5, dtype=jnp.int32))
    ours, theirs = ours.reshape(theirs.shape).astype(jnp.float32), theirs.astype(jnp.float32)
    error = float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs))
    result: dict[str, Any] = {"relative_error": error, "of": "the two results"}
    return result if error < 0.02 else result | {"reason": f"the results differ by {error:.3g}"}


def dense_attention(settings: Settings, shape: Shape) -> dict[str, Any]:
    """`jax.nn.dot_product_attention` over keys and values [B, S, K, D]."""
    lens = jnp.full((shape.batch,), shape.context, jnp.int32)
    options: dict[str, Any] = {"implementation": "cudnn" if settings.gpu else "xla"}
    if shape.kind == "prefill":
        options["is_causal"] = True

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, lens: jax.Array) -> jax.Array:
        more: dict[str, Any] = {} if shape.kind == "prefill" else {"key_value_seq_lengths": lens}
        return jax.nn.dot_product_attention(q, k, v, **options, **more)

    return unpaged(settings, shape, attend, lens, repeat=1)


def upstream_mha(settings: Settings, shape: Shape) -> dict[str, Any]:
    """Upstream's flash attention; it has no groups, so keys and values are repeated for every query head."""
    kernel = upstream("attention").mha
    scale = paged.heads_of(settings).head_dim ** -0.5

    def attend(q: jax.Array, k: jax.Array, v: jax.Array, lens: jax.Array) -> jax.Array:
        return kernel(q, k, v, None, sm_scale=scale, causal=True, interpret=not settings.gpu)

    lens = jnp.zeros((shape.batch,), jnp.int32)
    return unpaged(settings, shape, attend, lens, repeat=paged.heads_of(settings).group)


def unpaged(
    settings: Settings, shape: Shape, attend: Callable[..., jax.Array], lens: jax.Array, repeat: int
) -> dict[str, Any]:
    """Times `attend` on q [B, n, H, D] and k, v [B, S, K * repeat, D]; launches take several of those in turn."""
    heads = paged.heads_of(settings)
    read = kv_bytes(heads, shape.batch * shape.context, 2) * repeat
    count = max(1, min(8, 4 * device.CACHE_BYTES // read)) if settings.gpu else 1
    q = random(settings, 6, shape.batch, shape.new, heads.query_heads, heads.head_dim)
    size = (shape.batch, shape.context, heads.kv_heads * repeat, heads.head_dim)
    pairs = [(random(settings, 7 + 2 * n, *size), random(settings, 8 + 2 * n, *size)) for n in range(count)]
    once = jax.jit(attend)

    def chain(q: jax.Array, pairs: list[tuple[jax.Array, jax.Array]], lens: jax.Array) -> jax.Array:
        for k, v in pairs:
            q = once(q, k, v, lens)
        return q

    arguments = (q, pairs, lens)
    try:
        program = device.compile_program(chain, *arguments)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        if "cudnn" in str(error).lower():
            raise AbsentError(f"cuDNN does not do this here: {str(error)[:200]}") from error
        raise AbsentError(f"it refuses this shape: {type(error).__name__}: {str(error)[:200]}") from error
    most = device.most_launches(q.size * q.dtype.itemsize)
    return finish(settings, shape, device.time_function(program, [arguments], count, rounds=5, most=most))
