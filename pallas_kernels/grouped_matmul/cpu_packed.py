"""Grouped products of bfloat16 on CPUs with AVX512_BF16, from matrices in the order of `pallas_kernels.cpu.linear`.

Rows of an expert are multiplied by panels of its matrix as `linear` multiplies them, so their bits depend on the row
and the expert alone. The rows that fill up a block are those of the next expert: they are computed beside the others,
and left out when results are copied to their places. Experts without rows have no work items.
"""

# numba reads the functions itself; pyright knows neither its types nor its intrinsics.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from numba import njit

from jaxserve.pallas_kernels.cpu import ffi, linear, tiles
from jaxserve.pallas_kernels.cpu.linear import PANEL, ROWS

_VERSION = 1
"""Changes with what is computed: a program that was kept from an earlier release must not meet another function."""

_PANELS = 4
"""Panels of a work item: they are read one after the other."""

_ROW_BYTES = 4 * PANEL
"""Bytes of a row's sums of a panel."""


def fits(out_features: int, in_features: int) -> bool:
    """Whether matrices [N, K] can be packed."""
    return linear.fits(out_features, in_features)


def prepare(dtype: jax.typing.DTypeLike) -> None:
    """Compiles the function and makes it known to XLA, once a process; before a program that calls it is loaded or
    run. Matrices are bfloat16, whatever the dtype is that other implementations are told."""
    ffi.register(_name(), *_works(linear.kernels()))


def pack(weights: jax.Array) -> jax.Array:
    """[E, N, K] in the order that `multiply` reads."""
    return jax.vmap(linear.pack)(weights)


def multiply(x: jax.Array, weights: jax.Array, offsets: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Computes `api.grouped_matmul` for the form "packed"; arguments are checked there."""
    prepare(weights.dtype)
    rows, (experts, columns, length) = x.shape[0], weights.shape
    # What fills up the last block of rows is read, too.
    x = jnp.pad(x.astype(jnp.bfloat16), ((0, tiles.ROWS), (0, 0)))
    result = jax.ShapeDtypeStruct((rows, columns), jnp.float32)
    sizes = np.array([experts, columns, length], np.int32)
    product = jax.ffi.ffi_call(_name(), result)(sizes, x, weights, offsets)
    # The function leaves the rows of no expert as they are.
    return jnp.where((jnp.arange(rows) < offsets[-1])[:, None], product, 0).astype(dtype)


def _name() -> str:
    return f"jaxserve_grouped_packed_{_VERSION}_{linear.kernels()}"


@njit
def _sizes(frame):
    """Experts, columns of the result, length of the contracted axis, and the offsets of the experts' rows."""
    sizes = ffi.argument(frame, 0, 3, np.int32)
    experts = np.int64(sizes[0])
    return experts, np.int64(sizes[1]), np.int64(sizes[2]), ffi.argument(frame, 3, experts + 1, np.int32)


@njit
def _runs(columns):
    """Work items of an expert that has rows."""
    return (columns // PANEL + _PANELS - 1) // _PANELS


@njit
def _num_items(frame):
    experts, columns, _, offsets = _sizes(frame)
    used = 0
    for expert in range(experts):
        used += offsets[expert + 1] > offsets[expert]
    return used * _runs(columns)


@njit
def _expert(offsets, experts, number):
    """The expert with that number among those that have rows."""
    for expert in range(experts):
        if offsets[expert + 1] > offsets[expert]:
            if number == 0:
                return expert
            number -= 1
    return 0


@functools.cache
def _works(chosen):
    """The work items of a call, and what is done for one, with the vectors or tiles of `linear`."""
    begin, multiply_panel, end, group = linear.panel_products(chosen)
    in_tiles = begin is tiles.begin
    block = tiles.ROWS if in_tiles else ROWS

    @njit
    def run(frame, item):
        """Some panels of an expert for all its rows."""
        experts, columns, length, offsets = _sizes(frame)
        runs = _runs(columns)
        expert = _expert(offsets, experts, item // runs)
        first_row, rows = np.int64(offsets[expert]), np.int64(offsets[expert + 1] - offsets[expert])
        filled = (rows + ROWS - 1) // ROWS * ROWS if rows <= ROWS else (rows + block - 1) // block * block
        x = ffi.address_of(ffi.argument(frame, 1, 1, np.uint16)) + 2 * first_row * length
        weights = ffi.address_of(ffi.argument(frame, 2, 1, np.uint16)) + 2 * expert * columns * length
        out = ffi.result(frame, 0, (first_row + rows) * columns, np.float32)
        together = min(filled, group)
        scratch = ffi.allocate(together * _ROW_BYTES + tiles.CONFIGURATION_BYTES + 64)
        sums = (scratch + 63) // 64 * 64
        found = ffi.array_at(sums, together * PANEL, np.float32)
        begin(filled, sums + together * _ROW_BYTES)
        panel = item % runs * _PANELS
        for first in range(0, filled, group):
            count = min(group, filled - first)
            for number in range(panel, min(panel + _PANELS, columns // PANEL)):
                multiply_panel(
                    x + 2 * first * length, count, length, weights + number * PANEL * length * 2, sums, _ROW_BYTES, sums
                )
                for row in range(min(count, rows - first)):
                    place = (first_row + first + row) * columns + number * PANEL
                    out[place : place + PANEL] = found[row * PANEL : row * PANEL + PANEL]
        end()
        ffi.release(scratch)

    return _num_items, run
