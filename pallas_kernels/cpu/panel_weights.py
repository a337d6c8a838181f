"""Matrix products on any CPU from quantized weights packed once: unpacked in registers, multiplied in float32.

The order of the sums is that of `panel_products`, whose kernels these are: one chain over each piece of the contracted
axis, which is a group of numbers with one scale or a part of it; a piece's sum is multiplied by the scale and added to
those before. Nothing depends on how many rows are computed together.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.cpu import native_calls, panel_products
from jaxserve.pallas_kernels.cpu.panel_elements import Elements
from jaxserve.pallas_kernels.cpu.panel_products import PANEL, PIECE

_VERSION = 1
"""Changes with what is computed or how weights are packed."""

_LEAST_GROUP = 32


def kernels() -> str:
    """The kernels that run here, by name; a program compiled with others cannot call them."""
    return f"quantized_{_VERSION}_{panel_products.kernels()}"


def fits(n: int, k: int, group: int, kind: str) -> bool:
    """Whether a matrix [n, k] whose numbers share scales in groups can be packed: whole panels, and groups that are
    pieces or consist of some."""
    if n % PANEL or (kind == "int4" and k % 4):
        return False
    divides = group == math.gcd(group, PIECE) and group >= _LEAST_GROUP
    return divides or group == k or group % PIECE == 0


def piece(group: int | None) -> int:
    """Returns the piece that is summed at a time for groups of a size; None is a whole row."""
    return PIECE if group is None else math.gcd(group, PIECE)


def prepare(kind: str, group: int | None, *, zeros: bool) -> None:
    """Compiles the function for numbers of a kind in groups of a size (None: one a row) and makes it known to XLA, once
    a process; before a program that calls it is loaded or run."""
    _prepare(Elements(kind, piece(group), zeros))


def _prepare(elements: Elements) -> str:
    name = f"jaxserve_{elements.name}_{kernels()}"
    native_calls.register(name, functools.partial(panel_products.build, elements=elements))
    return name


def pack(matrix: jax.Array) -> jax.Array:
    """The bytes of numbers [N, K], of int4 [N, K / 2], in the order that `multiply` reads."""
    return panel_products.pack(matrix)


def multiply(
    x: jax.Array, packed: jax.Array, scales: jax.Array, zeros: jax.Array | None, kind: str, group: int | None
) -> jax.Array:
    """x [T, K] times the transposed matrix [N, K] of (number - zero) * scale.

    Args:
        x: of any floating dtype; multiplied as float32.
        packed: what `pack` returned.
        scales: float32 [groups, N].
        zeros: int16 [groups, N], or None.
        kind: of the numbers.
        group: how many share a scale; None for one a row.

    Returns:
        float32 [T, N].
    """
    name = _prepare(Elements(kind, piece(group), zeros is not None))
    result = jax.ShapeDtypeStruct((x.shape[0], packed.shape[0]), jnp.float32)
    arguments = (x.astype(jnp.float32), packed, scales) if zeros is None else (
        x.astype(jnp.float32), packed, scales, zeros
    )  # fmt: skip
    return jax.ffi.ffi_call(name, result)(*arguments)
