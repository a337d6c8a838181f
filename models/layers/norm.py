"""Implements norms of the residual stream, of single heads and of whole projections."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxserve.models.layers.parameter import Initial, Parameter, Source

_FEW = 8
"""So many numbers, one vector register of float32, are added one by one."""


class RMSNorm(nnx.Module):
    """Normalizes the last axes by their root mean square, computed in float32.

    Attributes:
        offset: added to the scale.
    """

    def __init__(
        self,
        name: str,
        size: int | tuple[int, ...],
        eps: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        *,
        offset: float = 0.0,
        partition: P | None = None,
    ):
        """Initializes the norm.

        Args:
            name: of its scale in a checkpoint, without ".weight".
            size: of the normalized axes; a checkpoint has them as one.
            eps: added to the mean square.
            dtype: of the scale.
            rngs: of the model.
            offset: see above.
            partition: of the scale; None holds all of it on every device.
        """
        shape = size if isinstance(size, tuple) else (size,)
        self.eps = eps
        self.offset = offset
        self.axes = tuple(range(-len(shape), 0))
        source = Source(f"{name}.weight", (math.prod(shape),))
        initial = Initial.ZEROS if offset else Initial.ONES
        whole = P(*(None for _ in shape))
        self.scale = Parameter(shape, partition or whole, (source,), initial=initial, neutral=True).make(rngs, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(_mean(wide * wide, self.axes) + self.eps)
        scale = self.scale[...].astype(jnp.float32)
        return (normed * (scale + self.offset if self.offset else scale)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Normalizes the last axis by its mean and variance, computed in float32, with a scale and a bias.

    Arguments are those of `RMSNorm`.
    """

    def __init__(self, name: str, size: int, eps: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.eps = eps
        scale, bias = (Source(f"{name}.{kind}", (size,)) for kind in ("weight", "bias"))
        self.scale = Parameter((size,), P(None), (scale,), initial=Initial.ONES, neutral=True).make(rngs, dtype)
        self.bias = Parameter((size,), P(None), (bias,), initial=Initial.ZEROS, neutral=True).make(rngs, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        centered = wide - _mean(wide, (-1,))
        normed = centered * jax.lax.rsqrt(_mean(centered * centered, (-1,)) + self.eps)
        scale, bias = self.scale[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        return (normed * scale + bias).astype(x.dtype)


def make_norm(kind: str, name: str, size: int, eps: float, dtype: jnp.dtype, rngs: nnx.Rngs) -> RMSNorm | LayerNorm:
    """Makes a norm of the residual stream; kind: of `jaxserve.models.layer_specs.NORM_KINDS`."""
    if kind == "layer":
        return LayerNorm(name, size, eps, dtype, rngs)
    return RMSNorm(name, size, eps, dtype, rngs, offset=1.0 if kind == "rms_offset" else 0.0)


def _mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns the mean over the last axes, which are kept with size 1.

    XLA's CPU backend computes a reduction in a loop of scalars, and stores what it reads first. There, the halves of
    the last axis are added until few numbers are left, which becomes one loop of vectors that reads `x` as it is
    computed. The order of the additions depends on the size of the axes alone.
    """

    def by_halves(x: jax.Array) -> jax.Array:
        count = math.prod(x.shape[axis] for axis in axes)
        while (size := x.shape[-1]) > _FEW and size % 2 == 0:
            x = x[..., : size // 2] + x[..., size // 2 :]
        return jnp.sum(x, axis=axes, keepdims=True) / count

    return jax.lax.platform_dependent(x, cpu=by_halves, default=lambda x: jnp.mean(x, axis=axes, keepdims=True))
