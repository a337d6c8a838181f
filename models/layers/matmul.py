"""Multiplies by weights: through XLA's dots, or on CPUs through kernels that read packed weights."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.models.layers.parameter import Packing, Parameter
from jaxserve.pallas_kernels.cpu import linear


@dataclasses.dataclass(frozen=True)
class Products:
    """The matrix products of a model's layers; sums are float32 whatever it is.

    Attributes:
        dtype: what products are rounded to.
        packed: weights are bfloat16 in the order of `pallas_kernels.cpu.linear`, which needs a CPU where that runs;
            what it makes of a result is float32.
    """

    dtype: np.dtype = dataclasses.field(default_factory=lambda: np.dtype(np.float32))
    packed: bool = False

    def prepare(self) -> None:
        """Gets ready what programs with these products call; before one is loaded or run."""
        if self.packed:
            linear.prepare()

    def contract(self, x: jax.Array, weight: jax.Array, axes: int = 1) -> jax.Array:
        """Dot of the last `axes` axes of x and weight: [..., out...]."""
        if not self.packed:
            return contract(x, weight, axes, self.dtype)
        matrix = _matrix(weight, axes)
        lead = x.shape[: x.ndim - axes]
        y = linear.linear(x.reshape(math.prod(lead), -1), matrix)
        return y.reshape(*lead, *weight.shape[: weight.ndim - axes])

    def swiglu(self, x: jax.Array, gate_up: jax.Array, bias: jax.Array | None) -> jax.Array:
        """silu(x gate^T) * (x up^T) for gate_up [2, I, H] and bias [2, I] or None: [..., I] in x's dtype."""
        if self.packed:
            assert bias is None, "packed weights with a bias"
            y = linear.swiglu(x.reshape(-1, x.shape[-1]), gate_up)
            return y.reshape(*x.shape[:-1], -1)
        gate, up = contract_each(x, gate_up, self.dtype)
        if bias is not None:
            gate_bias, up_bias = bias.astype(gate.dtype)
            gate, up = gate + gate_bias, up + up_bias
        return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(x.dtype)


def contract(x: jax.Array, weight: jax.Array, axes: int = 1, product: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Dot of the last `axes` axes of x and weight, accumulated in float32 and returned as `product`: [..., out...].

    The operands keep their dtype. What a float32 dot multiplies in (a GPU may use TF32, training uses bfloat16) is
    the caller's `jax.default_matmul_precision`. The weight goes into the dot as a matrix: from one with more axes XLA's
    CPU backend makes a transposed copy, every time.
    """
    matrix = _matrix(weight, axes)
    x = x.reshape(*x.shape[: x.ndim - axes], -1)
    y = jax.lax.dot_general(x, matrix, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=product)
    return y.reshape(*y.shape[:-1], *weight.shape[: weight.ndim - axes])


def contract_each(x: jax.Array, weights: jax.Array, product: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """`contract` of x with each of weights [N, out, in]: [N, ..., out].

    N is a batch axis and not part of the rows, so that `out` can be split over devices as it is stored.
    """
    axis = x.ndim
    each = jnp.broadcast_to(x, (weights.shape[0], *x.shape))
    return jax.lax.dot_general(each, weights, (((axis,), (2,)), ((0,), (0,))), preferred_element_type=product)


def packable(dtype: np.dtype, declared: Iterable[Parameter]) -> bool:
    """Whether this CPU has kernels that read these parameters in `dtype`, all that can be packed."""
    return (
        dtype.name == "bfloat16"
        and linear.runs_here()
        and all(linear.fits(*_size(each)) for each in declared if each.packing is not Packing.NONE)
    )


def _size(parameter: Parameter) -> tuple[int, int]:
    """(out, in) of the matrix that a kernel reads; gate and up have the same."""
    out = math.prod(parameter.shape) // parameter.dot_length
    return (out // 2 if parameter.packing is Packing.GATE_UP else out), parameter.dot_length


def packed(weight: jax.Array, parameter: Parameter) -> jax.Array:
    """A weight in packed order, in its own shape; the argument is given up."""
    return _packed(weight.sharding, parameter.packing, parameter.contracted)(weight)


@functools.lru_cache(maxsize=16)
def _packed(sharding: jax.sharding.Sharding, packing: Packing, axes: int) -> Any:
    def pack(weight: jax.Array) -> jax.Array:
        if packing is Packing.GATE_UP:
            return linear.pack_gate_up(weight)
        return linear.pack(_matrix(weight, axes)).reshape(weight.shape)

    return jax.jit(pack, out_shardings=sharding)


def _matrix(weight: jax.Array, axes: int) -> jax.Array:
    return weight.reshape(-1, math.prod(weight.shape[-axes:]))
