"""Between keys and values as the model computes them and what a pool stores."""

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.paged_attention.pool import is_quantized, largest, value_dtype


def encode(x: jax.Array, storage: jax.typing.DTypeLike, scale: jax.Array | None) -> jax.Array:
    """Casts keys or values to what the pool stores.

    Args:
        x: [..., K, D], a floating-point dtype.
        storage: the pool's dtype.
        scale: float32 [K] for a quantized pool, else None.

    Returns:
        [..., K, D] in `storage`. Quantized: x times the reciprocal of its head's scale, rounded to the nearest (ties to
        even) and saturated at the greatest magnitude, `largest(storage)`.
    """
    dtype = value_dtype(storage)
    if is_quantized(storage):
        assert scale is not None
        limit = largest(storage)
        x = jnp.clip(x.astype(jnp.float32) * (1.0 / scale)[:, None], -limit, limit)
        if dtype == jnp.int8:
            x = jnp.round(x)
    x = x.astype(dtype)
    return x if x.dtype == storage else jax.lax.bitcast_convert_type(x, storage)


def decode(stored: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """What a pool stores as numbers of `dtype`; those of a quantized pool are not multiplied by their scale."""
    return held_as_values(stored).astype(dtype)


def held_as_values(stored: jax.Array) -> jax.Array:
    """A pool, or a part of one, in its `value_dtype`; the same array unless it holds bits."""
    dtype = value_dtype(stored.dtype)
    return stored if dtype == stored.dtype else jax.lax.bitcast_convert_type(stored, dtype)


def like(values: jax.Array, stored: jax.Array) -> jax.Array:
    """Inverse of `held_as_values`: `values` as a pool of the dtype of `stored` holds them."""
    return values if values.dtype == stored.dtype else jax.lax.bitcast_convert_type(values, stored.dtype)
