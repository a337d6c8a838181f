"""Attention of rows that compute one token: chunks of context in parallel, then their combination (flash decoding)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.paged_attention.spec import AttentionSpec
from jaxserve.pallas_kernels.paged_attention.triton import kernel_plan as plans
from jaxserve.pallas_kernels.paged_attention.triton.attend import (
    LOG2_E,
    LOWEST_EXPONENT,
    Pages,
    Queries,
    Tile,
    addressed,
    attend,
    initial_state,
)
from jaxserve.pallas_kernels.paged_attention.triton.backend import pl, triton
from jaxserve.pallas_kernels.paged_attention.triton.tuning import DecodeConfig

# The fewest rows of a tile that a tensor core multiplies.
MIN_TILE_ROWS = 16


def decode(
    q: jax.Array,
    pool: jax.Array,
    page_table: jax.Array,
    plan: plans.DecodePlan,
    spec: AttentionSpec,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    config: DecodeConfig,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attends to each chunk of the plan.

    A persistent grid: a fixed number of programs, each of which takes every programs-th pair of an item of the plan and
    a key-value head. So items that do not exist cost nothing, whatever the bucket.

    Args:
        q: [T, K, G, D].
        pool: [num_pages, 2, K, page_size, D].
        page_table: int32 [R, max_pages].
        plan: the chunks.
        spec: scale, sliding window, soft cap.
        k_scale: float32 [K] or None.
        v_scale: float32 [K] or None.
        config: tuning.
        interpret: run in Pallas' interpret mode.

    Returns:
        Partial softmaxes in the slots that the plan names, the rest undefined: exponents float32 [R * splits, K, G],
        sums of weights float32 [R * splits, K, G], weighted values float32 [R * splits, K, G, D].
    """
    _, kv_heads, group_heads, head_dim = q.shape
    # In pairs, loads of one-byte elements are of 16 bytes; single ones are too many to a thread for that.
    pool, pair = addressed(pool, pairs=True)
    queries = group_heads * config.together
    rows = max(MIN_TILE_ROWS, 1 << (queries - 1).bit_length())
    tile = Tile(rows=rows, block=config.block, head_dim=head_dim, pair=pair)
    slots = plan.items.shape[0]
    scales = [] if k_scale is None else [k_scale, v_scale]
    members = [] if plan.members is None else [plan.members]
    kernel = functools.partial(
        _decode_kernel,
        spec=spec,
        tile=tile,
        programs=config.programs,
        together=None if plan.members is None else config.together,
        quantized=bool(scales),
    )
    partial = jax.ShapeDtypeStruct((slots, kv_heads, group_heads), jnp.float32)
    return pl.pallas_call(
        kernel,
        grid=(config.programs,),
        out_shape=(partial, partial, jax.ShapeDtypeStruct((*partial.shape, head_dim), jnp.float32)),
        compiler_params=triton.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name="paged_attention_decode",
    )(plan.items, plan.ends, q, pool, page_table, *members, *scales)


def _decode_kernel(
    items_ref: Any,
    ends_ref: Any,
    q_ref: Any,
    pool_ref: Any,
    table_ref: Any,
    *refs: Any,
    spec: AttentionSpec,
    tile: Tile,
    programs: int,
    together: int | None,
    quantized: bool,
) -> None:
    # Members of items, scales and outputs; the former two only where there are some.
    scale_refs, (exponent_ref, sum_ref, output_ref) = refs[-5:-3], refs[-3:]
    _, kv_heads, group_heads, head_dim = q_ref.shape
    member = jnp.arange(tile.rows, dtype=jnp.int32)
    used, of_row = member < group_heads, member // group_heads
    if together is not None:
        # Query q of the tile is head q % G of the item's row q // G.
        member = member % group_heads
    places = tile.places()
    inside = [used[:, None] & (place < head_dim)[None, :] for place in places]
    program = pl.program_id(0)

    def one(number: jax.Array, carry: None) -> None:
        unit = number * programs + program
        item, head = unit // kv_heads, unit % kv_heads
        row, token, begin, end, oldest, slot = (items_ref[item, column] for column in range(6))
        rows, counts, masks = slot, used, inside
        if together is not None:
            token, slot = (
                triton.load(refs[0].at[item, side, of_row], mask=of_row < together, other=-1) for side in range(2)
            )
            counts, token = token >= 0, token[:, None]
            # Interpret mode writes back what is masked: not to a slot that another query of the tile has.
            slot = jnp.where(counts, slot, exponent_ref.shape[0])
            rows = slot[:, None]
            masks = [counts[:, None] & (place < head_dim)[None, :] for place in places]
        queries = Queries(
            values=tuple(
                triton.load(q_ref.at[token, head, member[:, None], place[None, :]], mask=mask, other=0)
                for place, mask in zip(places, masks, strict=True)
            ),
            newest=end - 1,
            oldest=None if spec.sliding_window is None else oldest,
            scale=spec.scale * scale_refs[0][head] if quantized else spec.scale,
        )
        pages = Pages(pool_ref, table_ref, row, head, queries.oldest, end)
        blocks = (end + tile.block - 1) // tile.block
        state = attend(initial_state(tile), begin // tile.block, blocks, queries, pages, spec, tile)
        triton.store(exponent_ref.at[slot, head, member], state.exponent, mask=counts)
        triton.store(sum_ref.at[slot, head, member], state.total, mask=counts)
        for output, place, mask in zip(state.output, places, masks, strict=True):
            value = output * scale_refs[1][head] if quantized else output
            triton.store(output_ref.at[rows, head, member[:, None], place[None, :]], value, mask=mask)
        return carry

    units = ends_ref[ends_ref.shape[0] - 1] * kv_heads
    jax.lax.fori_loop(0, (units - program + programs - 1) // programs, one, None)


def combine(
    partials: tuple[jax.Array, jax.Array, jax.Array],
    plan: plans.DecodePlan,
    starts: jax.Array,
    out: jax.Array | jax.ShapeDtypeStruct,
    sinks: jax.Array | None,
    interpret: bool,
) -> jax.Array:
    """Combines the chunks of each row, all at once and in one fixed order.

    Args:
        partials: what `decode` returned.
        plan: the chunks.
        starts: int32 [R], each row's token.
        out: [T, K, G, D], updated in place at the tokens of rows that decode; or its shape and dtype, when row r's
            token is token r and nothing else has tokens: zeros are then written everywhere else.
        sinks: float32 [K, G] or None.
        interpret: run in Pallas' interpret mode.

    Returns:
        The updated `out`.
    """
    num_tokens, kv_heads, group_heads, _ = out.shape
    fresh = isinstance(out, jax.ShapeDtypeStruct)
    chunks = plan.chunks
    if fresh:
        # One program a token, those past the last row included.
        chunks = jnp.pad(chunks, (0, max(0, num_tokens - chunks.shape[0])))[:num_tokens]
    kernel = functools.partial(_combine_kernel, splits=plan.splits, fresh=fresh, sinks=sinks is not None)
    arguments = (chunks, *partials, *([] if sinks is None else [sinks]), *([] if fresh else [starts, out]))
    return pl.pallas_call(
        kernel,
        grid=(chunks.shape[0], kv_heads * group_heads),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        input_output_aliases={} if fresh else {len(arguments) - 1: 0},
        # Not in the tuning table: a program reads one tile, in no loop, and there are enough of them to fill a GPU. The
        # largest tile, 32 chunks by a head of 256, takes 64 registers of each of 128 threads.
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="paged_attention_combine",
    )(*arguments)


def _combine_kernel(
    chunks_ref: Any,
    exponent_ref: Any,
    sum_ref: Any,
    output_ref: Any,
    *refs: Any,
    splits: int,
    fresh: bool,
    sinks: bool,
) -> None:
    out_ref = refs[-1]
    _, _, group_heads, head_dim = out_ref.shape
    row = pl.program_id(0)
    head, member = pl.program_id(1) // group_heads, pl.program_id(1) % group_heads
    token = row if fresh else refs[-3][row]
    chunk = jnp.arange(1 << (splits - 1).bit_length(), dtype=jnp.int32)
    lane = jnp.arange(1 << (head_dim - 1).bit_length(), dtype=jnp.int32)
    count = chunks_ref[row]
    slot = row * splits + chunk

    @pl.when(count > 0)
    def _() -> None:
        used = chunk < count
        exponent = triton.load(exponent_ref.at[slot, head, member], mask=used, other=LOWEST_EXPONENT)
        total = triton.load(sum_ref.at[slot, head, member], mask=used, other=0)
        inside = used[:, None] & (lane < head_dim)[None, :]
        output = triton.load(output_ref.at[slot[:, None], head, member, lane[None, :]], mask=inside, other=0)
        greatest = jnp.max(exponent)
        sink = refs[0][head, member] * LOG2_E if sinks else None
        if sink is not None:
            greatest = jnp.maximum(greatest, jnp.ceil(sink))
        weight = jnp.exp2(exponent - greatest)
        divisor = jnp.sum(total * weight)
        if sink is not None:
            divisor += jnp.exp2(sink - greatest)
        value = jnp.sum(output * weight[:, None], axis=0) / divisor
        triton.store(out_ref.at[token, head, member, lane], value.astype(out_ref.dtype), mask=lane < head_dim)

    if fresh:

        @pl.when(count == 0)
        def _() -> None:
            zeros = jnp.zeros(lane.shape, out_ref.dtype)
            triton.store(out_ref.at[token, head, member, lane], zeros, mask=lane < head_dim)
