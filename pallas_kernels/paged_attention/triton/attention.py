"""Paged attention on the Triton backend.

    plan       XLA: lists of chunks (rows with one token) and of query tiles (rows with more, padding)
    prefill    tiles -> out, zeros for padding tokens          left out when a step only decodes
    decode     chunks -> partial softmaxes
    combine    partial softmaxes -> out, in place

A row with one token takes the same way in either kind of step, so its result has the same bits.
"""

import dataclasses
import functools

import jax

from jaxserve.pallas_kernels.paged_attention.cast import held_as_values
from jaxserve.pallas_kernels.paged_attention.spec import AttentionSpec
from jaxserve.pallas_kernels.paged_attention.triton.decode import MIN_TILE_ROWS, combine, decode
from jaxserve.pallas_kernels.paged_attention.triton.kernel_plan import plan_decode, plan_prefill
from jaxserve.pallas_kernels.paged_attention.triton.prefill import prefill
from jaxserve.pallas_kernels.paged_attention.triton.tuning import (
    INTERPRET_DEVICE,
    DecodeConfig,
    PrefillConfig,
    device_kind,
    lookup,
)


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
    *,
    interpret: bool = False,
    decode_config: DecodeConfig | None = None,
    prefill_config: PrefillConfig | None = None,
) -> jax.Array:
    """Computes `api.paged_attention`; arguments are checked there.

    Args:
        q: [T, K, G, D].
        pool: [num_pages, 2, K, page_size, D].
        page_table: int32 [R, max_pages].
        kv_lens: int32 [R].
        query_start_loc: int32 [R + 1].
        spec: scale, sliding window, soft cap.
        k_scale: float32 [K] or None.
        v_scale: float32 [K] or None.
        sinks: float32 [K, G] or None.
        decode_only: row r has one token, which is token r, or none.
        cascade: rows of a work item over shared pages: "off" is one, "auto" what the configuration says, and "on" as
            many as the tile of one row holds at no cost.
        interpret: run in Pallas' interpret mode, on any platform.
        decode_config: None for that of the tuning table.
        prefill_config: None for that of the tuning table.

    Returns:
        [T, K, G, D] in q's dtype.
    """
    num_tokens, _, group_heads, head_dim = q.shape
    pool = held_as_values(pool)
    device = INTERPRET_DEVICE if interpret else device_kind()
    choose = functools.partial(lookup, device, dtype=q.dtype, pool_dtype=pool.dtype, head_dim=head_dim)
    for_decode: DecodeConfig = decode_config or choose("decode")
    for_decode = dataclasses.replace(for_decode, together=_rows_together(for_decode, group_heads, cascade))
    chunks = plan_decode(kv_lens, query_start_loc, page_table, pool.shape[3], spec.sliding_window, for_decode)
    out: jax.Array | jax.ShapeDtypeStruct = jax.ShapeDtypeStruct(q.shape, q.dtype)
    if not decode_only:
        for_prefill: PrefillConfig = prefill_config or choose("prefill")
        tiles = plan_prefill(kv_lens, query_start_loc, num_tokens, group_heads, for_prefill)
        out = prefill(q, pool, page_table, tiles, spec, k_scale, v_scale, sinks, for_prefill, interpret)
    partials = decode(q, pool, page_table, chunks, spec, k_scale, v_scale, for_decode, interpret)
    return combine(partials, chunks, query_start_loc[:-1], out, sinks, interpret)


def _rows_together(config: DecodeConfig, group_heads: int, cascade: str) -> int:
    match cascade:
        case "off":
            return 1
        case "on":
            return max(config.together, MIN_TILE_ROWS // group_heads)
        case _:
            return config.together
