"""Between keys and values as the model computes them and what a pool stores."""

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.pool import is_quantised, largest, value_dtype


def encode(x: jax.Array, storage: jax.typing.DTypeLike, scale: jax.Array | None) -> jax.Array:
    """Casts keys or values to what the pool stores.

    Args:
        x: [..., K, D], a floating-point dtype.
        storage: the pool's dtype.
        scale: float32 [K] for a quantised pool, else None.

    Returns:
        [..., K, D] in `storage`. Quantised: x times the reciprocal of its head's scale, rounded to the nearest (ties to
        even) and saturated at the greatest magnitude, `largest(storage)`.
    """
    dtype = value_dtype(storage)
    if is_quantised(storage):
        assert scale is not None
        limit = largest(storage)
        x = jnp.clip(x.astype(jnp.float32) * (1.0 / scale)[:, None], -limit, limit)
        if dtype == jnp.int8:
            x = jnp.round(x)
    x = x.astype(dtype)
    return x if dtype == storage else jax.lax.bitcast_convert_type(x, storage)


def decode(stored: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """What a pool stores as numbers of `dtype`; those of a quantised pool are not multiplied by their scale."""
    held = value_dtype(stored.dtype)
    if held != stored.dtype:
        stored = jax.lax.bitcast_convert_type(stored, held)
    return stored.astype(dtype)
