"""Attention of rows that compute more than one token: tiles of queries packed on one token axis."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.paged_attention.spec import AttentionSpec
from jaxserve.pallas_kernels.paged_attention.triton import kernel_plan as plans
from jaxserve.pallas_kernels.paged_attention.triton.attend import Pages, Queries, Tile, addressed, attend, initial_state
from jaxserve.pallas_kernels.paged_attention.triton.backend import pl, triton
from jaxserve.pallas_kernels.paged_attention.triton.tuning import PrefillConfig

# The fewest positions that a tensor core multiplies.
MIN_BLOCK = 16


def prefill(
    q: jax.Array,
    pool: jax.Array,
    page_table: jax.Array,
    plan: plans.PrefillPlan,
    spec: AttentionSpec,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    sinks: jax.Array | None,
    config: PrefillConfig,
    interpret: bool,
) -> jax.Array:
    """Attends for each tile of the plan; the tokens of a tile see their row's positions up to their own.

    Args:
        q: [T, K, G, D].
        pool: [num_pages, 2, K, page_size, D].
        page_table: int32 [R, max_pages].
        plan: the tiles.
        spec: scale, sliding window, soft cap.
        k_scale: float32 [K] or None.
        v_scale: float32 [K] or None.
        sinks: float32 [K, G] or None.
        config: tuning.
        interpret: run in Pallas' interpret mode.

    Returns:
        [T, K, G, D] in q's dtype: results of the tokens in tiles, zeros for padding tokens, the rest undefined.
    """
    _, kv_heads, _, head_dim = q.shape
    pool, pair = addressed(pool, pairs=False)
    # Two parts of a head take more registers.
    block = config.block if pair is None else max(MIN_BLOCK, config.block // 2)
    tile = Tile(rows=config.tile, block=block, head_dim=head_dim, pair=pair)
    scales = [] if k_scale is None else [k_scale, v_scale]
    optional = [*scales, *([] if sinks is None else [sinks])]
    kernel = functools.partial(_prefill_kernel, spec=spec, tile=tile, quantized=bool(scales), sinks=sinks is not None)
    return pl.pallas_call(
        kernel,
        grid=(plan.tiles.shape[0], kv_heads),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=triton.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="paged_attention_prefill",
    )(plan.tiles, q, pool, page_table, *optional)


def _prefill_kernel(
    tiles_ref: Any,
    q_ref: Any,
    pool_ref: Any,
    table_ref: Any,
    *refs: Any,
    spec: AttentionSpec,
    tile: Tile,
    quantized: bool,
    sinks: bool,
) -> None:
    out_ref = refs[-1]
    _, _, group_heads, head_dim = q_ref.shape
    number, head = pl.program_id(0), pl.program_id(1)
    row, first_token, count, first_position = (tiles_ref[number, column] for column in range(4))
    index = jnp.arange(tile.rows, dtype=jnp.int32)
    ahead, member = index // group_heads, index % group_heads
    places = tile.places()
    used = ahead < count

    def load() -> tuple[jax.Array, ...]:
        token = (first_token + ahead)[:, None]
        parts = []
        for place in places:
            inside = used[:, None] & (place < head_dim)[None, :]
            parts.append(triton.load(q_ref.at[token, head, member[:, None], place[None, :]], mask=inside, other=0))
        return tuple(parts)

    def store(outputs: Sequence[jax.Array]) -> None:
        # Read anew, so that the places of queries and results have nothing in common: else the compiler keeps them in
        # registers throughout. (Interpret mode takes no scalar index here.)
        first_token, count = (
            triton.load(tiles_ref.at[number, jnp.full((1,), column, jnp.int32)], volatile=True)
            for column in (plans.TILE_TOKEN, plans.TILE_COUNT)
        )
        token = (first_token + ahead)[:, None]
        for output, place in zip(outputs, places, strict=True):
            inside = (ahead < count)[:, None] & (place < head_dim)[None, :]
            where = out_ref.at[token, head, member[:, None], place[None, :]]
            triton.store(where, output.astype(out_ref.dtype), mask=inside)

    @pl.when((count > 0) & (first_position >= 0))
    def _() -> None:
        newest = first_position + ahead
        window = spec.sliding_window
        queries = Queries(
            values=load(),
            newest=newest,
            oldest=None if window is None else newest - (window - 1),
            scale=spec.scale * refs[0][head] if quantized else spec.scale,
        )
        end = first_position + count
        oldest = None if window is None else first_position - (window - 1)
        pages = Pages(pool_ref, table_ref, row, head, oldest, end)
        sink = None
        if sinks:
            sink = triton.load(refs[-2].at[head, member], mask=used, other=0)
        state = initial_state(tile, sink)
        begin = 0
        if window is None:
            # Blocks that lie wholly before the tile's first token need no mask.
            begin = (first_position + 1) // tile.block
            state = attend(state, 0, begin, queries, pages, spec, tile, masked=False)
        else:
            begin = jnp.maximum(first_position - (window - 1), 0) // tile.block
        state = attend(state, begin, (end + tile.block - 1) // tile.block, queries, pages, spec, tile)
        factor = 1 / jnp.where(used, state.total, 1)
        if quantized:
            factor *= refs[1][head]
        store([output * factor[:, None] for output in state.output])

    @pl.when((count > 0) & (first_position < 0))
    def _() -> None:
        store([jnp.zeros((tile.rows, tile.lanes), out_ref.dtype) for _ in places])
