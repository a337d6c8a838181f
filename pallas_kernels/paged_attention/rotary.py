"""Rotary position embedding (Su et al., arXiv 2104.09864), half-split pairing as in GPT-NeoX and Llama."""

import jax
import jax.numpy as jnp


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x[i], x[i + D / 2]) of every head by the angle of its token.

    Args:
        x: [..., heads..., D].
        cos: float32 [..., D / 2], cosines of the angles of each token.
        sin: float32 [..., D / 2].

    Returns:
        float32 [..., heads..., D].
    """
    extra = (1,) * (x.ndim - cos.ndim)
    shape = cos.shape[:-1] + extra + cos.shape[-1:]
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)


def split_and_rotate(
    qkv: jax.Array, cos: jax.Array, sin: jax.Array, dtype: jax.typing.DTypeLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Splits the projection of a layer and rotates its queries and keys, rounding once.

    Args:
        qkv: [T, K, G + 2, D]: for each key-value head its queries, its key, its value.
        cos: float32 [T, D / 2], cosines of the angles of each token.
        sin: float32 [T, D / 2].
        dtype: of the results.

    Returns:
        (q [T, K, G, D], k [T, K, D], v [T, K, D]).
    """
    rotated = rotate(qkv[:, :, :-1], cos, sin).astype(dtype)
    return rotated[:, :, :-1], rotated[:, :, -1], qkv[:, :, -1].astype(dtype)
