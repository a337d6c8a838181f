"""Holds weights in quantized forms and multiplies by them.

A weight of shape [out..., in...] is a matrix [N, K] of numbers; groups of them along K share a scale, and a weight is
(number - zero) * scale. Two numbers of int4 share a byte, the first in its lower half, and count from 0 to 15 with a
zero at 8 unless the groups have zeros of their own.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxserve.models.layers.parameter import Parameter
from jaxserve.models.quantization import Scheme
from jaxserve.pallas_kernels.cpu import panel_weights, row_products

DTYPES = {"fp8": jnp.float8_e4m3fn, "int8": jnp.int8, "int4": jnp.uint8}
"""Dtype that holds the numbers of each kind."""

MIDDLE = 8
"""The zero of int4 without zeros of its own."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """Holds a weight.

    Attributes:
        values: the numbers, in the weight's shape; the last axis of int4 is half as long.
        scales: float32 [out..., groups].
        zeros: int16 [out..., groups], or None.
        order: int32 [K], the element of the contracted axes that each number along K is for; None for all in order.
        shape: of the weight.
        contracted: how many trailing axes a dot sums over.
        scheme: of the numbers.
    """

    values: Any
    scales: Any
    zeros: Any
    order: Any
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    contracted: int = dataclasses.field(metadata={"static": True})
    scheme: Scheme = dataclasses.field(metadata={"static": True})

    def __getitem__(self, index: Any) -> Quantized:
        """Returns the weight itself: variables of modules are read by `[...]`."""
        assert index is ...
        return self

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def lengths(self) -> tuple[int, int, int]:
        """Returns (N, K, groups)."""
        k = math.prod(self.shape[len(self.shape) - self.contracted :])
        return self.size // k, k, 1 if self.scheme.group is None else k // self.scheme.group

    @property
    def packs(self) -> bool:
        """Whether the CPU kernels for quantized weights can read it."""
        n, k, groups = self.lengths
        return panel_weights.fits(n, k, k // groups, self.scheme.kind)

    def dequantized(self) -> jax.Array:
        """Computes the weights, float32 in their shape; not for one in packed order."""
        n, k, groups = self.lengths
        numbers = _numbers(self.values.reshape(n, -1), self.scheme).astype(jnp.float32).reshape(n, groups, -1)
        if self.zeros is not None:
            numbers -= self.zeros.reshape(n, groups, 1).astype(jnp.float32)
        weights = (numbers * self.scales.reshape(n, groups, 1)).reshape(n, k)
        if self.order is not None:
            weights = jnp.zeros_like(weights).at[:, self.order].set(weights)
        return weights.reshape(self.shape)


def abstract(parameter: Parameter, partition: P, sharding: Any) -> Quantized:
    """Returns a parameter's arrays as ShapeDtypeStructs.

    Args:
        parameter: one with a scheme.
        partition: of its weights.
        sharding: returns the sharding of a partition.
    """
    scheme = parameter.scheme
    assert scheme is not None
    outs = len(parameter.shape) - parameter.contracted
    groups = 1 if scheme.group is None else parameter.dot_length // scheme.group
    scales = (*parameter.shape[:outs], groups)

    def make(shape: tuple[int, ...], dtype: Any, *axes: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(P(*axes)))

    # Every device holds the scales of all groups of its outputs: a group may lie across two devices' numbers.
    beside = (*partition[:outs], None)
    return Quantized(
        make(stored_shape(parameter.shape, scheme), DTYPES[scheme.kind], *partition),
        make(scales, jnp.float32, *beside),
        make(scales, jnp.int16, *beside) if scheme.zeros else None,
        make((parameter.dot_length,), jnp.int32, None) if scheme.ordered else None,
        parameter.shape,
        parameter.contracted,
        scheme,
    )


def stored_shape(shape: tuple[int, ...], scheme: Scheme) -> tuple[int, ...]:
    """Returns the shape of the array that holds so many numbers."""
    return (*shape[:-1], shape[-1] // 2) if scheme.kind == "int4" else shape


def check(name: str, parameter: Parameter, scheme: Scheme) -> None:
    """Raises ValueError where a parameter cannot be held as a scheme says."""
    length = parameter.dot_length
    if scheme.group is not None and length % scheme.group:
        raise ValueError(
            f"weights {name} have {length} numbers in a row; quantization in groups of {scheme.group} needs a multiple"
        )
    if scheme.kind == "int4" and (parameter.shape[-1] % 2 or (scheme.group or 2) % 2):
        raise ValueError(
            f"weights {name} have rows of {parameter.shape[-1]} numbers of int4, in groups of {scheme.group}; "
            "both must be even"
        )


def packed(weight: Quantized) -> Quantized:
    """Returns the weight in the order that the CPU's kernels read, each array in its own shape."""
    return _packed(weight)


@jax.jit
def _packed(weight: Quantized) -> Quantized:
    n, _, groups = weight.lengths

    def reordered(each: jax.Array) -> jax.Array:
        return each.reshape(n, groups).T.reshape(each.shape)

    matrix = weight.values.reshape(n, -1)
    return dataclasses.replace(
        weight,
        values=panel_weights.pack(matrix).reshape(weight.values.shape),
        scales=reordered(weight.scales),
        zeros=None if weight.zeros is None else reordered(weight.zeros),
    )


def multiply_packed(x: jax.Array, weight: Quantized) -> jax.Array:
    """x [T, K] times a weight in packed order: float32 [T, N]."""
    n, _, groups = weight.lengths
    x, factors = _entering(x.astype(jnp.float32), weight)
    y = panel_weights.multiply(
        x,
        weight.values.reshape(n, -1),
        weight.scales.reshape(groups, n),
        None if weight.zeros is None else weight.zeros.reshape(groups, n),
        weight.scheme.kind,
        weight.scheme.group,
    )
    return y if factors is None else y * factors


def multiply_rows(x: jax.Array, weight: Quantized) -> jax.Array:
    """x [T, K] times a weight that no packed kernel can read, on a CPU, each row by itself: float32 [T, N]."""
    n, k, _ = weight.lengths
    quantized, factors = _rounded(x.astype(jnp.float32), weight.scheme)
    y = row_products.multiply(quantized, weight.dequantized().reshape(n, k))
    return y if factors is None else y * factors


def multiply(x: jax.Array, weight: Quantized, product: jax.typing.DTypeLike) -> jax.Array:
    """x [T, K] times a weight by XLA's dot, [T, N] as `product`.

    Numbers with one scale a row enter the dot as they are, which x's dtype holds exactly, and the scales multiply its
    float32 sums; fp8 with quantized activations is a dot of fp8 operands. With groups or zeros the weights are
    dequantized and rounded to x's dtype first.
    """
    n, k, groups = weight.lengths
    dtype = x.dtype
    x, factors = _entering(x, weight)
    if groups > 1 or weight.zeros is not None:
        plain = dataclasses.replace(weight, order=None)
        matrix, scales = plain.dequantized().reshape(n, k).astype(dtype), None
    else:
        matrix, scales = _numbers(weight.values.reshape(n, -1), weight.scheme), weight.scales.reshape(n)
    if factors is not None and weight.scheme.kind == "fp8" and scales is not None:
        x, matrix = x.astype(jnp.float8_e4m3fn), matrix.astype(jnp.float8_e4m3fn)
    else:
        x, matrix = x.astype(dtype), matrix.astype(dtype)
    y = jax.lax.dot_general(x, matrix, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    y = y if scales is None else y * scales
    return (y if factors is None else y * factors).astype(product)


def _numbers(stored: jax.Array, scheme: Scheme) -> jax.Array:
    """Returns the numbers of rows [N, K], a zero that all have in common subtracted."""
    if scheme.kind != "int4":
        return stored
    pairs = jnp.stack([stored & 15, stored >> 4], axis=-1).reshape(stored.shape[0], -1).astype(jnp.int8)
    return pairs if scheme.zeros else pairs - MIDDLE


def _entering(x: jax.Array, weight: Quantized) -> tuple[jax.Array, jax.Array | None]:
    """Returns what is multiplied by a weight's numbers, [T, K] in their order, and factors [T, 1] of the results."""
    x = x if weight.order is None else jnp.take(x, weight.order, axis=1)
    return _rounded(x, weight.scheme)


def _rounded(x: jax.Array, scheme: Scheme) -> tuple[jax.Array, jax.Array | None]:
    """Quantizes activations, each row by a scale of its own, where the scheme does: numbers in float32, scales [T, 1].

    As compressed-tensors' calculate_qparams and quantize: symmetric, and the largest magnitude of int8 is 127.5.
    """
    if not scheme.activations:
        return x, None
    x = x.astype(jnp.float32)
    integers = scheme.activations == "int8"
    scales = jnp.max(jnp.abs(x), axis=1, keepdims=True) / np.float32(127.5 if integers else 448.0)
    scales = jnp.where(scales == 0, np.finfo(np.float32).eps, scales)
    # The largest of a row is halfway between two integers but for the rounding of the scale: it goes away from 0, as
    # it does where its division is exact.
    numbers = x / scales * np.float32(1 + 2**-22 if integers else 1)
    if integers:
        return jnp.clip(jnp.round(numbers), -128, 127), scales
    return jnp.clip(numbers, -448, 448).astype(jnp.float8_e4m3fn).astype(jnp.float32), scales


_SPREADS = {"fp8": 1.46, "int8": 73.9, "int4": 4.64}
"""Roots of the mean squares of the numbers that `random_weight` draws."""


def random_weight(leaf: Quantized, key: jax.Array) -> Quantized:
    """Draws a weight for measuring speed: mean squares are 1 / K, the numbers of a kind are about as likely."""
    _, k, _ = leaf.lengths
    kind = leaf.scheme.kind

    def draw() -> Quantized:
        bits = jax.random.bits(key, leaf.values.shape, jnp.uint8)
        if kind == "fp8":
            bits = 0x38 | (bits & 0x87)  # magnitudes from 1 to below 2
        values = bits if kind == "int4" else jax.lax.bitcast_convert_type(bits, leaf.values.dtype)
        middle = MIDDLE if kind == "int4" else 0
        return dataclasses.replace(
            leaf,
            values=values,
            scales=jnp.full(leaf.scales.shape, 1 / (_SPREADS[kind] * math.sqrt(k)), jnp.float32),
            zeros=None if leaf.zeros is None else jnp.full(leaf.zeros.shape, middle, jnp.int16),
            order=None if leaf.order is None else jnp.arange(k, dtype=jnp.int32),
        )

    return jax.jit(draw, out_shardings=jax.tree.map(lambda one: one.sharding, leaf))()
