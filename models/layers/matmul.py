"""Multiplies by weights: through XLA's dots, or on CPUs through kernels whose results depend on their row alone."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxserve.models.layers import quantized as quantized_weights
from jaxserve.models.layers.parameter import Packing, Parameter
from jaxserve.models.layers.quantized import Quantized
from jaxserve.models.quantization import Scheme
from jaxserve.pallas_kernels import grouped_matmul
from jaxserve.pallas_kernels.cpu import linear, panel_products, panel_weights, row_products
from jaxserve.pallas_kernels.grouped_matmul import cpu_packed


@dataclasses.dataclass(frozen=True)
class Products:
    """Selects the matrix products of a model's layers; sums are always float32.

    Attributes:
        dtype: dtype to which products are rounded.
        packed: name of the CPU kernels in whose order weights are packed, `linear.kernels()` for bfloat16 on CPUs with
            instructions for it or `panel_products.kernels()`; their results are float32. "" for unpacked weights.
        rows: name of the dtype of weights that are not packed where `pallas_kernels.cpu.row_products` multiplies by
            them, with float32 results; "" for XLA's dots, whose bits depend on the number of rows and of threads.
        experts: name of the implementation of `pallas_kernels.grouped_matmul` that multiplies by the matrices of
            experts.
        mesh: devices that hold parts of these matrices, where there are several and the implementation is told which;
            None lets XLA partition.
        quantized: name of the CPU kernels that multiply by quantized weights in packed order; "" for weights that are
            held in the order of their declaration.
        schemes: those of quantized weights.
    """

    dtype: np.dtype = dataclasses.field(default_factory=lambda: np.dtype(np.float32))
    packed: str = ""
    rows: str = ""
    experts: str = "xla"
    mesh: Mesh | None = None
    quantized: str = ""
    schemes: tuple[Scheme, ...] = ()

    def prepare(self) -> None:
        """Registers the kernels that programs with these products call; must precede loading or running one."""
        if self.in_pairs:
            linear.prepare()
        elif self.packed:
            panel_products.prepare(self.rows)
        if self.rows:
            row_products.prepare(self.rows)
            grouped_matmul.prepare(self.experts, self.rows)
        if self.rows and self.schemes:
            row_products.prepare("float32")
        for scheme in self.schemes if self.quantized else ():
            panel_weights.prepare(scheme.kind, scheme.group, zeros=scheme.zeros)

    @property
    def unpacked(self) -> Products:
        """The same products of weights that are not packed."""
        experts = "cpu" if self.experts == "cpu_packed" else self.experts
        return dataclasses.replace(self, packed="", quantized="", experts=experts)

    @property
    def in_pairs(self) -> bool:
        """Whether weights are packed for `pallas_kernels.cpu.linear`."""
        return bool(self.packed) and self.packed != panel_products.kernels()

    def contract(self, x: jax.Array, weight: jax.Array | Quantized, axes: int = 1) -> jax.Array:
        """Contracts the last `axes` axes of x and a weight that may be packed or quantized: [..., out...]."""
        if isinstance(weight, Quantized):
            return self._contract_quantized(x, weight, axes)
        if not self.packed:
            return self.contract_unpacked(x, weight, axes)
        return _by_matrix(linear.linear if self.in_pairs else panel_products.multiply, x, weight, axes)

    def _contract_quantized(self, x: jax.Array, weight: Quantized, axes: int) -> jax.Array:
        lead = x.shape[: x.ndim - axes]
        rows = x.reshape(math.prod(lead), -1)
        if self.quantized and weight.packs:
            y = quantized_weights.multiply_packed(rows, weight)
        elif self.rows:
            y = quantized_weights.multiply_rows(rows, weight)
        else:
            y = quantized_weights.multiply(rows, weight, self.dtype)
        return y.reshape(*lead, *weight.shape[: len(weight.shape) - axes])

    def contract_unpacked(self, x: jax.Array, weight: jax.Array, axes: int = 1) -> jax.Array:
        """Contracts the last `axes` axes of x and a weight that is never packed: [..., out...]."""
        if not self.rows:
            return contract(x, weight, axes, self.dtype)
        return _by_matrix(row_products.multiply, x, weight, axes)

    def contract_pair(self, x: jax.Array, weights: jax.Array | Quantized) -> tuple[jax.Array, jax.Array]:
        """Contracts x with both of weights [2, out, in], packed as one matrix: [..., out] each."""
        if self.packed or self.rows or isinstance(weights, Quantized):
            y = self.contract(x, weights)
            return y[..., 0, :], y[..., 1, :]
        first, second = contract_each(x, weights, self.dtype)
        return first, second

    def grouped_matmul(self, x: jax.Array, weights: jax.Array, offsets: jax.Array) -> jax.Array:
        """Multiplies rows [M, K], sorted by expert, by their experts' matrices [E, N, K]: [M, N]."""
        dtype = jnp.float32 if self.rows else self.dtype
        form = grouped_matmul.IMPLEMENTATIONS[self.experts].forms[0]
        return grouped_matmul.grouped_matmul(x, weights, offsets, implementation=self.experts, form=form, dtype=dtype)

    def swiglu(self, x: jax.Array, gate_up: jax.Array | Quantized) -> jax.Array:
        """Computes silu(x gate^T) * (x up^T) for gate_up [2, I, H]: [..., I] in x's dtype."""
        if self.in_pairs and not isinstance(gate_up, Quantized):
            y = linear.swiglu(x.reshape(-1, x.shape[-1]), gate_up)
            return y.reshape(*x.shape[:-1], -1)
        gate, up = self.contract_pair(x, gate_up)
        return (jax.nn.silu(gate.astype(jnp.float32)) * up.astype(jnp.float32)).astype(x.dtype)


def contract(x: jax.Array, weight: jax.Array, axes: int = 1, product: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Contracts the last `axes` axes of x and weight, accumulated in float32 and returned as `product`: [..., out...].

    The operands keep their dtype. The precision of a float32 dot (a GPU may use TF32, training uses bfloat16) is the
    caller's `jax.default_matmul_precision`. The weight enters the dot as a matrix: of a weight with more axes XLA's CPU
    backend makes a transposed copy, every time.
    """
    matrix = _matrix(weight, axes)
    x = x.reshape(*x.shape[: x.ndim - axes], -1)
    y = jax.lax.dot_general(x, matrix, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=product)
    return y.reshape(*y.shape[:-1], *weight.shape[: weight.ndim - axes])


def contract_each(x: jax.Array, weights: jax.Array, product: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Contracts x with each of weights [N, out, in]: [N, ..., out].

    N is a batch axis and not part of the rows, so that `out` can be split over devices as it is stored.
    """
    axis = x.ndim
    each = jnp.broadcast_to(x, (weights.shape[0], *x.shape))
    return jax.lax.dot_general(each, weights, (((axis,), (2,)), ((0,), (0,))), preferred_element_type=product)


def packed_kernels(dtype: np.dtype, declared: Iterable[Parameter]) -> str:
    """Returns the name of this CPU's kernels for all packable ones of these parameters in `dtype`; "" without any."""
    packable = [each for each in declared if each.packing is not Packing.NONE and each.scheme is None]
    sizes = [_size(each) for each in packable]
    if dtype.name == "bfloat16" and linear.runs_here() and all(linear.fits(*size) for size in sizes):
        return linear.kernels()
    # Matrices of experts then stay as they are stored.
    if all(panel_products.fits(_size(each)[0]) for each in packable if each.packing is not Packing.EXPERTS):
        return panel_products.kernels()
    return ""


def _size(parameter: Parameter) -> tuple[int, int]:
    """Returns (out, in) of the matrix that a kernel reads; gate and up have the same, and so have experts."""
    out = math.prod(parameter.shape) // parameter.dot_length
    if parameter.packing is Packing.EXPERTS:
        out //= parameter.shape[0]
    return (out // 2 if parameter.packing is Packing.GATE_UP else out), parameter.dot_length


def packed(weight: jax.Array, parameter: Parameter, products: Products) -> jax.Array:
    """Returns a weight in the order that `products` reads, in its own shape."""
    return _packed(weight.sharding, parameter.packing, parameter.contracted, products.in_pairs)(weight)


@functools.lru_cache(maxsize=16)
def _packed(sharding: jax.sharding.Sharding, packing: Packing, axes: int, in_pairs: bool) -> Any:
    def pack(weight: jax.Array) -> jax.Array:
        if packing is Packing.EXPERTS:
            return cpu_packed.pack(weight)
        if not in_pairs:
            matrix = weight.reshape(-1, weight.shape[-1]) if packing is Packing.GATE_UP else _matrix(weight, axes)
            return panel_products.pack(matrix).reshape(weight.shape)
        if packing is Packing.GATE_UP:
            return linear.pack_gate_up(weight)
        return linear.pack(_matrix(weight, axes)).reshape(weight.shape)

    return jax.jit(pack, out_shardings=sharding)


def _by_matrix(multiply: Any, x: jax.Array, weight: jax.Array, axes: int) -> jax.Array:
    """Contracts the last `axes` axes by multiply(rows, matrix)."""
    lead = x.shape[: x.ndim - axes]
    y = multiply(x.reshape(math.prod(lead), -1), _matrix(weight, axes))
    return y.reshape(*lead, *weight.shape[: weight.ndim - axes])


def _matrix(weight: jax.Array, axes: int) -> jax.Array:
    return weight.reshape(-1, math.prod(weight.shape[-axes:]))
