"""Paged attention stated plainly: what every other implementation must compute. Slow, in float32 throughout."""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.paged_attention.cast import decode, encode
from jaxserve.pallas_kernels.paged_attention.spec import AttentionSpec


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
) -> jax.Array:
    """Gathers, for each token, its sequence's whole page table row and attends to it densely.

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
        decode_only: needs nothing else here.
        cascade: likewise.

    Returns:
        [T, K, G, D] in q's dtype.
    """
    num_tokens, num_kv_heads, _, head_dim = q.shape
    num_rows, max_pages = page_table.shape
    page_size = pool.shape[3]
    del decode_only, cascade

    token = jnp.arange(num_tokens)
    row = jnp.searchsorted(query_start_loc[1:], token, side="right")
    real = row < num_rows
    row = jnp.minimum(row, num_rows - 1)
    query_lens = query_start_loc[1:] - query_start_loc[:-1]
    query_position = kv_lens[row] - query_lens[row] + token - query_start_loc[row]

    key_position = jnp.arange(max_pages * page_size)
    seen = key_position <= query_position[:, None]
    if spec.sliding_window is not None:
        seen &= key_position > query_position[:, None] - spec.sliding_window
    seen &= real[:, None]

    pages = jnp.clip(page_table[row], 0, pool.shape[0] - 1)
    gathered = decode(pool[pages], jnp.float32).transpose(2, 0, 3, 1, 4, 5)
    key, value = gathered.reshape(2, num_tokens, num_kv_heads, max_pages * page_size, head_dim)
    if k_scale is not None and v_scale is not None:
        key, value = key * k_scale[:, None, None], value * v_scale[:, None, None]
    value = jnp.where(seen[:, None, :, None], value, 0.0)

    score = jnp.einsum("tkgd,tkcd->tkgc", q.astype(jnp.float32), key, precision="highest") * spec.scale
    if spec.soft_cap is not None:
        score = spec.soft_cap * jnp.tanh(score / spec.soft_cap)
    score = jnp.where(seen[:, None, None], score, -jnp.inf)
    if sinks is not None:
        # One more column, whose weight is then dropped.
        sink = jnp.broadcast_to(sinks[None, :, :, None], (*score.shape[:3], 1))
        score = jnp.concatenate([score, sink], axis=-1)
        value = jnp.pad(value, ((0, 0), (0, 0), (0, 1), (0, 0)))
    weight = jnp.where(real[:, None, None, None], jax.nn.softmax(score, axis=-1), 0.0)
    return jnp.einsum("tkgc,tkcd->tkgd", weight, value, precision="highest").astype(q.dtype)


def kv_write(
    pool: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slot_mapping: jax.Array,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> jax.Array:
    """Writes token after token; see `api.kv_write`."""
    page_size = pool.shape[3]
    k, v = encode(k, pool.dtype, k_scale), encode(v, pool.dtype, v_scale)

    def one(token: jax.Array, pool: jax.Array) -> jax.Array:
        slot = slot_mapping[token]
        page, offset = slot // page_size, slot % page_size
        written = pool.at[page, 0, :, offset].set(k[token]).at[page, 1, :, offset].set(v[token])
        return jnp.where((slot >= 0) & (page < pool.shape[0]), written, pool)

    return jax.lax.fori_loop(0, slot_mapping.shape[0], one, pool)
