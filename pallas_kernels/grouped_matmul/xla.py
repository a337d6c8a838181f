"""Computes grouped products with XLA's dots, on any platform and on meshes whose devices hold parts of every matrix.

All rows are multiplied by the matrix of each expert that has rows, and those of the expert are kept: the arithmetic
grows with the number of experts, so it serves where no kernel does. `jax.lax.ragged_dot` does the same on GPUs, from
rows that are spread out in memory first.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def multiply(x: jax.Array, weights: jax.Array, offsets: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Computes `api.grouped_matmul`; arguments are checked there."""
    row = jnp.arange(x.shape[0])

    def one(expert: jax.Array, out: jax.Array) -> jax.Array:
        begin, end = offsets[expert], offsets[expert + 1]

        def add(out: jax.Array) -> jax.Array:
            product = jax.lax.dot_general(
                x, weights[expert], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
            return jnp.where(((row >= begin) & (row < end))[:, None], product, out)

        return jax.lax.cond(end > begin, add, lambda out: out, out)

    out = jnp.zeros((x.shape[0], weights.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, weights.shape[0], one, out).astype(dtype)
