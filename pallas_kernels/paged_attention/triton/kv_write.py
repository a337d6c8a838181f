"""Keys and values into their pages, in place; with the rotation of queries and keys in the same pass.

A program takes a few tokens of one key-value head. It reads its part of the projection once, in halves of a head, so
that the two numbers of a rotated pair lie in the same thread, and writes queries, keys and values where they belong.
Padding tokens, whose slots are in the null page or outside the pool, write nothing to the pool. Pools that the backend
addresses wrongly (see `limits`) are written by XLA.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.paged_attention import xla
from jaxserve.pallas_kernels.paged_attention.cast import held_as_values, like
from jaxserve.pallas_kernels.paged_attention.pool import largest
from jaxserve.pallas_kernels.paged_attention.rotary import split_and_rotate
from jaxserve.pallas_kernels.paged_attention.triton.backend import pl, triton
from jaxserve.pallas_kernels.paged_attention.triton.limits import addressable
from jaxserve.pallas_kernels.paged_attention.triton.tuning import INTERPRET_DEVICE, WriteConfig, device_kind, lookup

# Pairs of numbers that a thread reads before it writes any: enough to hide the latency of memory, and they fit into the
# registers of every configuration of the tuning table.
READ_AHEAD = 64
WARP = 32


class _Tile(NamedTuple):
    """What a program works on.

    Attributes:
        token: int32 [M, 1], place on the token axis.
        head: int32 scalar, key-value head.
        lane: int32 [1, N], place in half a head.
        inside: bool [M, N], which of them exist.
        half: half the head dimension.
    """

    token: jax.Array
    head: jax.Array
    lane: jax.Array
    inside: jax.Array
    half: int


def kv_write(
    pool: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot_mapping: jax.Array,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    *,
    interpret: bool = False,
    config: WriteConfig | None = None,
) -> jax.Array:
    """Computes `api.kv_write`; arguments are checked there.

    Args:
        pool: [num_pages, 2, K, page_size, D].
        k: [T, K, D].
        v: [T, K, D].
        slot_mapping: int32 [T].
        k_scale: float32 [K] or None.
        v_scale: float32 [K] or None.
        interpret: run in Pallas' interpret mode, on any platform.
        config: None for that of the tuning table.

    Returns:
        The updated pool.

    Raises:
        ValueError: D is odd.
    """
    values = held_as_values(pool)
    if not addressable(pool):
        return xla.kv_write(pool, k, v, slot_mapping, k_scale, v_scale)
    config = config or _config(k.dtype, values, interpret)
    call = _call(_write_kernel, k.shape[0], values, k_scale, v_scale, config, interpret, "kv_write", ())
    (written,) = call((k, v, slot_mapping))
    return like(written, pool)


def rotate_and_write(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    pool: jax.Array,
    slot_mapping: jax.Array,
    dtype: jax.typing.DTypeLike,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    *,
    interpret: bool = False,
    config: WriteConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes `api.rotate_and_write`; arguments are checked there.

    Args:
        qkv: [T, K, G + 2, D].
        cos: float32 [T, D / 2].
        sin: float32 [T, D / 2].
        pool: [num_pages, 2, K, page_size, D].
        slot_mapping: int32 [T].
        dtype: of queries, keys and values.
        k_scale: float32 [K] or None.
        v_scale: float32 [K] or None.
        interpret: run in Pallas' interpret mode, on any platform.
        config: None for that of the tuning table.

    Returns:
        (q [T, K, G, D] in `dtype`, the updated pool).
    """
    num_tokens, kv_heads, heads, head_dim = qkv.shape
    values = held_as_values(pool)
    if not addressable(pool):
        q, k, v = split_and_rotate(qkv, cos, sin, dtype)
        return q, xla.kv_write(pool, k, v, slot_mapping, k_scale, v_scale)
    config = config or _config(dtype, values, interpret)
    q = jax.ShapeDtypeStruct((num_tokens, kv_heads, heads - 2, head_dim), dtype)
    call = _call(_rotate_kernel, num_tokens, values, k_scale, v_scale, config, interpret, "rotate_and_write", (q,))
    rotated, written = call((qkv, cos, sin, slot_mapping))
    return rotated, like(written, pool)


def _config(dtype: jax.typing.DTypeLike, pool: jax.Array, interpret: bool) -> WriteConfig:
    device = INTERPRET_DEVICE if interpret else device_kind()
    return lookup(device, "kv_write", dtype, pool.dtype, pool.shape[4])


def _call(
    kernel: Callable[..., None],
    num_tokens: int,
    pool: jax.Array,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    config: WriteConfig,
    interpret: bool,
    name: str,
    outputs: tuple[jax.ShapeDtypeStruct, ...],
) -> Callable[[tuple[jax.Array, ...]], tuple[jax.Array, ...]]:
    """A function of the kernel's inputs that returns `outputs` and the pool, which is updated in place."""
    scales = () if k_scale is None else (k_scale, v_scale)
    kv_heads, head_dim = pool.shape[2], pool.shape[4]
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; the Triton KV write takes even ones")
    kernel = functools.partial(kernel, config=config, num_tokens=num_tokens, head_dim=head_dim)

    def call(inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return pl.pallas_call(
            kernel,
            # Tokens on the first axis: the others end at 65,535.
            grid=(-(-num_tokens // config.tokens), kv_heads),
            out_shape=(*outputs, jax.ShapeDtypeStruct(pool.shape, pool.dtype)),
            input_output_aliases={len(inputs) + len(scales): len(outputs)},
            compiler_params=triton.CompilerParams(num_warps=config.num_warps, num_stages=1),
            interpret=interpret,
            name=name,
        )(*inputs, *scales, pool)

    return call


def _tile(config: WriteConfig, num_tokens: int, head_dim: int) -> _Tile:
    half = head_dim // 2
    token = pl.program_id(0) * config.tokens + jnp.arange(config.tokens, dtype=jnp.int32)[:, None]
    lane = jnp.arange(1 << (half - 1).bit_length(), dtype=jnp.int32)[None, :]
    return _Tile(token, pl.program_id(1), lane, (token < num_tokens) & (lane < half), half)


def _write_kernel(
    k_ref: Any, v_ref: Any, slot_ref: Any, *refs: Any, config: WriteConfig, num_tokens: int, head_dim: int
) -> None:
    *scale_refs, _, pool_ref = refs
    tile = _tile(config, num_tokens, head_dim)
    place = _place(slot_ref, pool_ref, tile, num_tokens)
    parts = [_load(ref, tile) for ref in (k_ref, v_ref)]
    for side, halves in enumerate(parts):
        _store(pool_ref, scale_refs, place, tile, side, halves)


def _rotate_kernel(
    qkv_ref: Any,
    cos_ref: Any,
    sin_ref: Any,
    slot_ref: Any,
    *refs: Any,
    config: WriteConfig,
    num_tokens: int,
    head_dim: int,
) -> None:
    *scale_refs, _, q_ref, pool_ref = refs
    group_heads, dtype = q_ref.shape[2], q_ref.dtype
    tile = _tile(config, num_tokens, head_dim)
    place = _place(slot_ref, pool_ref, tile, num_tokens)
    cos = triton.load(cos_ref.at[tile.token, tile.lane], mask=tile.inside, other=0)
    sin = triton.load(sin_ref.at[tile.token, tile.lane], mask=tile.inside, other=0)
    # Loads first: the compiler moves none of them before a store, which might be to the same place.
    ahead = max(1, READ_AHEAD * WARP * config.num_warps // tile.inside.size)
    for first in range(0, group_heads + 2, ahead):
        members = range(first, min(first + ahead, group_heads + 2))
        parts = [_load(qkv_ref, tile, member) for member in members]
        for member, (low, high) in zip(members, parts, strict=True):
            low, high = low.astype(jnp.float32), high.astype(jnp.float32)
            if member <= group_heads:
                low, high = low * cos - high * sin, high * cos + low * sin
            halves = low.astype(dtype), high.astype(dtype)
            if member >= group_heads:
                _store(pool_ref, scale_refs, place, tile, member - group_heads, halves)
                continue
            for half, part in enumerate(halves):
                where = q_ref.at[tile.token, tile.head, member, tile.lane + half * tile.half]
                triton.store(where, part, mask=tile.inside)


def _load(ref: Any, tile: _Tile, *member: int) -> tuple[jax.Array, ...]:
    """The two halves [M, N] of a head of each token of the tile, from [T, K, D] or [T, K, members, D]."""
    return tuple(
        triton.load(ref.at[tile.token, tile.head, *member, tile.lane + half * tile.half], mask=tile.inside, other=0)
        for half in range(2)
    )


def _place(slot_ref: Any, pool_ref: Any, tile: _Tile, num_tokens: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Page and offset [M, 1] of each token, and which numbers [M, N] are to be written."""
    num_pages, page_size = pool_ref.shape[0], pool_ref.shape[3]
    slot = triton.load(slot_ref.at[tile.token], mask=tile.token < num_tokens, other=0)
    written = (slot >= page_size) & (slot < num_pages * page_size)
    # In interpret mode a masked place is written with what it holds: the null page, where that does no harm.
    slot = jnp.where(written, slot, 0)
    return slot // page_size, slot % page_size, tile.inside & written


def _store(
    pool_ref: Any,
    scale_refs: Sequence[Any],
    place: tuple[jax.Array, jax.Array, jax.Array],
    tile: _Tile,
    side: int,
    halves: tuple[jax.Array, ...],
) -> None:
    """Writes keys (side 0) or values (1) of the tile, two halves [M, N], as `cast.encode` casts them."""
    page, offset, written = place
    for half, part in enumerate(halves):
        if scale_refs:
            limit = largest(pool_ref.dtype)
            part = jnp.clip(part.astype(jnp.float32) * (1.0 / scale_refs[side][tile.head]), -limit, limit)
            if pool_ref.dtype == jnp.int8:
                part = _round(part)
        where = pool_ref.at[page, side, tile.head, offset, tile.lane + half * tile.half]
        triton.store(where, part.astype(pool_ref.dtype), mask=written)


def _round(x: jax.Array) -> jax.Array:
    """Nearest integer, ties to even; the backend has no instruction for it."""
    below = jnp.floor(x)
    rest = x - below
    odd = below.astype(jnp.int32) & 1
    return jnp.where((rest > 0.5) | ((rest == 0.5) & (odd == 1)), below + 1, below)
