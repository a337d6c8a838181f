"""Implements norms of the residual stream and of single heads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxserve.models.layers.parameter import Initial, Parameter, Source


class RMSNorm(nnx.Module):
    """Normalizes the last axis by its root mean square, computed in float32.

    Attributes:
        name: name of its scale in a checkpoint, without ".weight".
    """

    def __init__(self, name: str, size: int, eps: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.eps = eps
        source = Source(f"{name}.weight", (size,))
        self.scale = Parameter((size,), P(None), (source,), initial=Initial.ONES).make(rngs, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return (normed * self.scale[...].astype(jnp.float32)).astype(x.dtype)
