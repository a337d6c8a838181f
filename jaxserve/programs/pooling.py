"""Pools hidden states: sums of runs of a step's tokens, from which the host makes embeddings.

Every kind of pooling is such a sum: of all tokens for the mean, of one token for the last or the first. A prompt's sum
is that of its chunks, which the host adds up.

The sums are of whole numbers, so that they do not depend on the order of their terms: neither how a prompt was split
into chunks nor what else a step computes changes a bit of an embedding. A value x below LIMIT is split into
high = round(x * H) and low = round((x - high / H) * L), of at most `_bits` bits each, whose sums over all tokens of a
step fit an int32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.programs.layout import pooling_layout

LIMIT = 2**13
"""Magnitude from which a hidden state cannot be pooled. After the final norm values are three orders below."""


def _bits(tokens: int) -> int:
    """Returns the bits of the terms of which an int32 holds the sum of `tokens`, one bit to spare."""
    return 30 - (tokens - 1).bit_length()


def _scales(tokens: int) -> tuple[float, float]:
    """Returns the factors H and L of the high and low parts for a hidden buffer of `tokens` tokens.

    A float64 holds the sum of a step exactly: 13 bits of the values, those of the number of tokens, and L's.
    """
    bits = _bits(tokens)
    high = 2.0 ** (bits - LIMIT.bit_length() + 1)
    return high, min(2.0 * high * 2**bits, 2.0 ** (39 - (tokens - 1).bit_length()))


def pool(hidden: jax.Array, vector: jax.Array, *, rows: int) -> jax.Array:
    """Sums runs of hidden states.

    Args:
        hidden: the hidden buffer [T, H].
        vector: host inputs, see `layout.pooling_layout`.
        rows: R, number of runs.

    Returns:
        int32 [R, 2 H + 1]: sums of the high parts, sums of the low parts, and the number of tokens that cannot be
        pooled. `sums` reads it.
    """
    fields = pooling_layout(rows).read(vector)
    tokens = hidden.shape[0]
    high_scale, low_scale = _scales(tokens)
    token = jnp.arange(tokens, dtype=jnp.int32)
    within = (token >= fields["first"][:, None]) & (token < (fields["first"] + fields["count"])[:, None])
    row = jnp.where(within.any(axis=0), jnp.argmax(within, axis=0).astype(jnp.int32), rows)
    x = hidden.astype(jnp.float32)
    bad = ~(jnp.abs(x) < LIMIT)  # NaN is no such number
    x = jnp.where(bad, 0.0, x)
    high = jnp.round(x * high_scale)
    low = jnp.round((x - high / high_scale) * low_scale)
    parts = jnp.concatenate([high, low, bad.any(axis=1, keepdims=True)], axis=1).astype(jnp.int32)
    # Additions of whole numbers may take place in any order, on a GPU too.
    return jnp.zeros((rows, parts.shape[1]), jnp.int32).at[row].add(parts, mode="drop")


def sums(pooled: np.ndarray, tokens: int) -> np.ndarray:
    """Returns the sums that `pool` computed, float64 [R, H]; NaN for rows with tokens that cannot be pooled.

    Args:
        pooled: int32 [R, 2 H + 1], on the host.
        tokens: T, of the hidden buffer.
    """
    size = pooled.shape[1] // 2
    high_scale, low_scale = _scales(tokens)
    values = pooled[:, :size] / high_scale + pooled[:, size : 2 * size] / low_scale
    values[pooled[:, -1] > 0] = np.nan
    return values
