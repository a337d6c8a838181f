"""Paged attention for CPUs, in plain XLA: fast, and the same to the bit however tokens are batched.

The queries are cut into tiles of a few consecutive tokens of one sequence, so that every dot has 2 to 32 rows: in that
range XLA's CPU dots give a row the same bits whatever its companions. Every tile walks key-value blocks of one fixed
size, counted from position 0, with the online softmax of Milakov and Gimelshein (arXiv 1805.02867), so that a token
sums in the same order in a decode step and in any prefill chunk. Tiles are sorted by the length they read and worked
off in groups by loops whose trip counts are data: a step costs what its sequences need, not what its bucket allows.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.paged_attention.cast import decode, encode
from jaxserve.pallas_kernels.paged_attention.pool import is_quantized, value_dtype
from jaxserve.pallas_kernels.paged_attention.spec import AttentionSpec
from jaxserve.pallas_kernels.paged_attention.xla_plan import TilePass, Tiling, plan_tiles, tiling_for

LOG2_E = math.log2(math.e)

# The exponent that a query starts with, below that of any score. Finite, so that differences are never NaN.
LOWEST_EXPONENT = -(2.0**126)


def _gather_pages(pool: jax.Array, pages: jax.Array, side: int) -> jax.Array:
    """Reads keys (side 0) or values (1) of `pages` [W, n] as [W, K, n, page_size * D]: one row a head of a page."""
    num_pages, _, num_kv_heads, page_size, head_dim = pool.shape
    flat = pool.reshape(num_pages * 2 * num_kv_heads, page_size * head_dim)
    heads = jnp.arange(num_kv_heads, dtype=jnp.int32) + side * num_kv_heads
    index = pages[:, None, :] * (2 * num_kv_heads) + heads[None, :, None]
    return _take(flat, index)


def _gather_block(
    pool: jax.Array, page_table: jax.Array, group: "_Group", index: jax.Array, block: int
) -> tuple[jax.Array, jax.Array]:
    """Reads key-value block `index` of each tile as keys and values [W, K, block, D], values that no query sees zero.

    Zero, because a weight of 0 would not silence a NaN in memory that no one wrote. Only the last block of a sequence
    and the first of a sliding window have such positions, so only groups that are there pay for the masking. The
    branches also serve to keep the reshape out of the gather's loop: as rows of page_size * D numbers it is vectorised
    and runs twice as fast (a barrier has that effect from jax 0.11 on; before, it is gone when loops are fused).
    """
    num_pages, _, num_kv_heads, page_size, head_dim = pool.shape
    column = index * (block // page_size) + jnp.arange(block // page_size, dtype=jnp.int32)
    pages = page_table.at[group.row[:, None], jnp.minimum(column, page_table.shape[1] - 1)[None, :]].get(
        mode="promise_in_bounds", wrap_negative_indices=False
    )
    # Entries past a sequence's length may hold anything: they read the null page instead.
    pages = jnp.where(column[None, :] * page_size < group.length[:, None], jnp.clip(pages, 0, num_pages - 1), 0)

    def whole() -> tuple[jax.Array, jax.Array]:
        return _gather_pages(pool, pages, 0), _gather_pages(pool, pages, 1)

    def masked() -> tuple[jax.Array, jax.Array]:
        key, value = whole()
        position = column[:, None] * page_size + jnp.arange(page_size * head_dim, dtype=jnp.int32) // head_dim
        seen = (position < group.length[:, None, None]) & (position >= group.oldest[:, None, None])
        return key, jnp.where(seen[:, None], value, jnp.zeros((), value.dtype))

    partly = (group.length < (index + 1) * block) | (group.oldest > index * block)
    read = jax.lax.cond(jnp.any(partly), masked, whole)
    key, value = (decode(part, group.query.dtype) for part in jax.lax.optimization_barrier(read))
    shape = (pages.shape[0], num_kv_heads, block, head_dim)
    return key.reshape(shape), value.reshape(shape)


def _take(array: jax.Array, index: jax.Array) -> jax.Array:
    """array[index] for indices known to be in range."""
    return array.at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


class _Group(NamedTuple):
    """One group's tiles: queries [W, K, M, D], rows [W], lengths [W], the oldest positions that their queries see [W]
    and the queries' positions [W, M] (-1: none)."""

    query: jax.Array
    row: jax.Array
    length: jax.Array
    oldest: jax.Array
    position: jax.Array


def _attend_block(
    index: jax.Array,
    state: tuple[jax.Array, jax.Array, jax.Array],
    group: _Group,
    pool: jax.Array,
    page_table: jax.Array,
    settings: "_Settings",
    block: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Takes key-value block `index` into the running (exponent [W,K,M], sum [W,K,M], output [W,K,M,D]).

    Weights are 2^(score - exponent), where the exponent is the greatest score so far, rounded up to an integer. So
    rescaling multiplies by a power of two, which is exact: it cannot matter whether a compiler fuses it with an
    addition, nor how it vectorises an exponential. A block that is masked for a query leaves its state unchanged.
    """
    exponent, total, output = state
    key, value = _gather_block(pool, page_table, group, index, block)
    position = index * block + jnp.arange(block, dtype=jnp.int32)
    score = jnp.einsum("wkmd,wkcd->wkmc", group.query, key, preferred_element_type=jnp.float32)
    spec = settings.spec
    if settings.k_scale is not None:
        score = score * settings.k_scale[:, None, None]
    if spec.soft_cap is None:
        score = score * (spec.scale * LOG2_E)
    else:
        score = (spec.soft_cap * LOG2_E) * jnp.tanh(score * (spec.scale / spec.soft_cap))
    seen = position <= group.position[:, :, None]
    if spec.sliding_window is not None:
        seen &= position > group.position[:, :, None] - spec.sliding_window
    score = jnp.where(seen[:, None], score, -jnp.inf)
    new_exponent = jnp.maximum(exponent, jnp.ceil(score.max(axis=-1)))
    weight = jnp.exp2(score - new_exponent[..., None])
    if value.dtype != jnp.float32:
        # The sum must see the weights as the dot does, so that their rounding cancels.
        kept = jnp.finfo(value.dtype)
        weight = jax.lax.reduce_precision(weight, exponent_bits=kept.nexp, mantissa_bits=kept.nmant)
    decay = _power_of_two(exponent - new_exponent)
    update = jnp.einsum("wkmc,wkcd->wkmd", weight.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return new_exponent, total * decay + weight.sum(axis=-1), output * decay[..., None] + update


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """2^exponent for integers of at most 0 held as float32; 0 below the range of normal numbers."""
    biased = jnp.maximum(exponent, -127.0).astype(jnp.int32) + 127
    return jax.lax.bitcast_convert_type(biased << 23, jnp.float32)


class _Settings(NamedTuple):
    """What holds for all tiles; k_scale, v_scale [K] and sinks [K, G] are float32 or None."""

    spec: AttentionSpec
    k_scale: jax.Array | None
    v_scale: jax.Array | None
    sinks: jax.Array | None


def _finish(state: tuple[jax.Array, jax.Array, jax.Array], settings: _Settings, tile: int) -> jax.Array:
    """The output [W, K, M, D] of the running state; zeros for queries that have seen nothing."""
    exponent, total, output = state
    if settings.sinks is not None:
        sink = jnp.tile(settings.sinks * LOG2_E, (1, tile))
        new_exponent = jnp.maximum(exponent, jnp.ceil(sink))
        decay = _power_of_two(exponent - new_exponent)
        total = total * decay + jnp.exp2(sink - new_exponent)
        output = output * decay[..., None]
    output = output / jnp.where(total > 0, total, 1.0)[..., None]
    return output if settings.v_scale is None else output * settings.v_scale[:, None, None]


def _run_pass(
    rows: jax.Array,
    first_row: int,
    tile_pass: TilePass,
    q: jax.Array,
    pool: jax.Array,
    page_table: jax.Array,
    settings: _Settings,
    tile: int,
    block: int,
) -> jax.Array:
    """Works off the groups of a pass and writes their outputs to `rows` [N_total, K, G, D] from `first_row` on."""
    num_tokens, num_kv_heads, group_heads, head_dim = q.shape
    size = tile_pass.row.shape[0] // tile_pass.block_end.shape[0]
    window = settings.spec.sliding_window
    lane = jnp.arange(tile, dtype=jnp.int32)

    def one_group(number: jax.Array, rows: jax.Array) -> jax.Array:
        row, first_token, first_position, count = (
            jax.lax.dynamic_slice_in_dim(field, number * size, size) for field in tile_pass[:4]
        )
        token = jnp.minimum(first_token[:, None] + lane, num_tokens - 1)
        query = _take(q, token).transpose(0, 2, 1, 3, 4)
        position = jnp.where(lane < count[:, None], first_position[:, None] + lane, -1)
        group = _Group(
            query=query.reshape(size, num_kv_heads, tile * group_heads, head_dim),
            row=row,
            length=first_position + count,
            oldest=jnp.zeros_like(first_position) if window is None else first_position - window + 1,
            position=jnp.repeat(position, group_heads, axis=1),
        )
        shape = (size, num_kv_heads, tile * group_heads)
        state = (
            jnp.full(shape, LOWEST_EXPONENT, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((*shape, head_dim), jnp.float32),
        )
        state = jax.lax.fori_loop(
            tile_pass.block_begin[number],
            tile_pass.block_end[number],
            lambda index, state: _attend_block(index, state, group, pool, page_table, settings, block),
            state,
        )
        output = _finish(state, settings, tile)
        output = output.reshape(size, num_kv_heads, tile, group_heads, head_dim).transpose(0, 2, 1, 3, 4)
        output = output.reshape(size * tile, num_kv_heads, group_heads, head_dim)
        return jax.lax.dynamic_update_slice_in_dim(rows, output, first_row + number * size * tile, axis=0)

    return jax.lax.fori_loop(0, tile_pass.num_groups, one_group, rows)


def paged_attention(
    q: jax.Array,
    pool: jax.Array,
    page_table: jax.Array,
    kv_lens: jax.Array,
    query_start_loc: jax.Array,
    spec: AttentionSpec,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    sinks: jax.Array | None = None,
    decode_only: bool = False,
    cascade: str = "auto",
    tiling: Tiling | None = None,
) -> jax.Array:
    """Computes `api.paged_attention`; arguments are checked there.

    Args:
        q: [T, K, G, D], G <= 32.
        pool: [num_pages, 2, K, page_size, D].
        page_table: int32 [R, max_pages].
        kv_lens: int32 [R].
        query_start_loc: int32 [R + 1].
        spec: scale, sliding window, soft cap.
        k_scale: float32 [K] or None.
        v_scale: float32 [K] or None.
        sinks: float32 [K, G] or None.
        decode_only: leaves out the tiles of more than one token.
        cascade: has no effect here: each row gathers its own pages.
        tiling: static sizes, None for the tuned ones.

    Returns:
        [T, K, G, D] in q's dtype.
    """
    num_tokens, num_kv_heads, group_heads, head_dim = q.shape
    dtype = q.dtype
    if not is_quantized(pool.dtype):
        # Dots of queries and keys in the wider of their dtypes; what a quantized pool holds is exact in any.
        q = q.astype(jnp.promote_types(dtype, value_dtype(pool.dtype)))
    tiling = tiling or tiling_for(group_heads)
    settings = _Settings(spec, k_scale, v_scale, sinks)
    plan = plan_tiles(kv_lens, query_start_loc, num_tokens, tiling, spec.sliding_window, decode_only)
    decode_rows = plan.decode.row.shape[0] * tiling.decode_tile
    prefill_rows = 0 if plan.prefill is None else plan.prefill.row.shape[0] * tiling.prefill_tile
    rows = jnp.zeros((decode_rows + prefill_rows + 1, num_kv_heads, group_heads, head_dim), jnp.float32)
    rows = _run_pass(rows, 0, plan.decode, q, pool, page_table, settings, tiling.decode_tile, tiling.block)
    if plan.prefill is not None:
        rows = _run_pass(
            rows, decode_rows, plan.prefill, q, pool, page_table, settings, tiling.prefill_tile, tiling.block
        )
    return _take(rows, plan.output_row).astype(dtype)


def kv_write(
    pool: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot_mapping: jax.Array,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> jax.Array:
    """Computes `api.kv_write` as one scatter of [2, K, D] windows, in place when the pool is donated."""
    page_size = pool.shape[3]
    window = jnp.stack([encode(k, pool.dtype, k_scale), encode(v, pool.dtype, v_scale)], axis=1)
    # Not `//` and `%`, which round down: a negative slot must not become a place in the pool.
    page, offset = jax.lax.div(slot_mapping, page_size), jax.lax.rem(slot_mapping, page_size)
    return pool.at[page, :, :, offset].set(window, mode="drop", wrap_negative_indices=False)
