"""Grouped products on the Triton backend: a flat list of work items, each a block of rows of one expert.

    plan       XLA: the items, as many as the rows could need at most
    multiply   item x block of columns -> a tile of the result; what is past the last item ends at once

A row's sum goes over the contracted axis in steps of one size from the first to the last, whatever other rows are in
its tile. The size of a tile follows from the number of rows of the program, so rows of two programs may differ in
rounding, as those of XLA's own products do.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.paged_attention.triton.backend import pl, triton

_EXPERT, _BEGIN, _END = range(3)
"""Columns of a work item."""


@dataclasses.dataclass(frozen=True)
class Tile:
    """Static sizes of a tile and of its launch.

    Attributes:
        rows: of x.
        columns: of the result.
        step: elements of the contracted axis that a step of the loop takes.
    """

    rows: int
    columns: int
    step: int
    num_warps: int
    num_stages: int


# The fewest rows that a tensor core multiplies.
_LEAST_ROWS = 16

FEW = Tile(rows=_LEAST_ROWS, columns=64, step=64, num_warps=4, num_stages=5)
MANY = Tile(rows=128, columns=128, step=64, num_warps=8, num_stages=3)
"""Tiles for experts with a few rows each, whose time is that of reading matrices, and with many. Compiled for an H200
without spills; no device has measured them."""


def choose_tile(rows: int, experts: int, dtype: jax.typing.DTypeLike) -> Tile:
    """Returns the tile of a program with so many rows."""
    tile = FEW if rows <= 2 * _LEAST_ROWS * experts else MANY
    if jnp.dtype(dtype).itemsize == 4:  # as many bytes
        return dataclasses.replace(tile, columns=tile.columns // 2, step=tile.step // 2)
    return tile


def plan(offsets: jax.Array, rows: int, block: int) -> jax.Array:
    """Lists the work items: int32 [items, 3] of expert, first row and the row past the last; those past the last item
    have no rows.

    Args:
        offsets: int32 [E + 1] of the rows.
        rows: M.
        block: the most rows of an item.
    """
    experts = offsets.shape[0] - 1
    begin, end = offsets[:-1], offsets[1:]
    blocks = (end - begin + block - 1) // block
    ends = jnp.cumsum(blocks)
    item = jnp.arange(min(rows, experts) + rows // block, dtype=jnp.int32)
    # Every comparison at once: a binary search is a loop, which cannot join the rest of the step in one CUDA graph.
    expert = jnp.sum(item[:, None] >= ends[None, :], axis=1, dtype=jnp.int32)
    found = jnp.minimum(expert, experts - 1)
    first = begin[found] + (item - (ends - blocks)[found]) * block
    last = jnp.minimum(first + block, end[found])
    return jnp.stack([found, first, jnp.where(expert < experts, last, first)], axis=1).astype(jnp.int32)


def multiply(
    x: jax.Array,
    weights: jax.Array,
    offsets: jax.Array,
    dtype: jax.typing.DTypeLike,
    *,
    interpret: bool = False,
    tile: Tile | None = None,
) -> jax.Array:
    """Computes `api.grouped_matmul`; arguments are checked there.

    interpret: run in Pallas' interpret mode, on any platform. tile: None for that of `choose_tile`.
    """
    rows, length = x.shape
    experts, columns, _ = weights.shape
    tile = tile or choose_tile(rows, experts, weights.dtype)
    items = plan(offsets, rows, tile.rows)
    out = pl.pallas_call(
        functools.partial(_kernel, tile=tile, columns=columns, length=length),
        # Items are the fast axis: those of one expert follow each other and find its matrix in the second cache.
        grid=(items.shape[0], pl.cdiv(columns, tile.columns)),
        out_shape=jax.ShapeDtypeStruct((rows, columns), dtype),
        compiler_params=triton.CompilerParams(num_warps=tile.num_warps, num_stages=tile.num_stages),
        interpret=interpret,
        name="grouped_matmul",
    )(items, x.astype(weights.dtype), weights)
    # The kernel leaves the rows of no expert as they are.
    return jnp.where((jnp.arange(rows) < offsets[-1])[:, None], out, 0)


def _kernel(
    items_ref: Any, x_ref: Any, weights_ref: Any, out_ref: Any, *, tile: Tile, columns: int, length: int
) -> None:
    item = pl.program_id(0)
    expert, begin, end = (items_ref[item, column] for column in (_EXPERT, _BEGIN, _END))
    row = begin + jnp.arange(tile.rows, dtype=jnp.int32)
    column = pl.program_id(1) * tile.columns + jnp.arange(tile.columns, dtype=jnp.int32)
    used, inside = row < end, column < columns
    whole = columns % tile.columns == 0

    def step(number: jax.Array, total: jax.Array) -> jax.Array:
        place = number * tile.step + jnp.arange(tile.step, dtype=jnp.int32)
        reached = jnp.broadcast_to((place < length)[None, :], (tile.rows, tile.step))
        of_x = used[:, None] & reached
        x = triton.load(x_ref.at[row[:, None], place[None, :]], mask=of_x, other=0)
        mask = None
        if not whole or length % tile.step:
            mask = inside[:, None] & (place < length)[None, :]
        other = None if mask is None else 0
        weight = triton.load(weights_ref.at[expert, column[:, None], place[None, :]], mask=mask, other=other)
        return total + _dot(x, weight)

    @pl.when(end > begin)
    def _() -> None:
        steps = pl.cdiv(length, tile.step)
        total = jax.lax.fori_loop(0, steps, step, jnp.zeros((tile.rows, tile.columns), jnp.float32))
        where = out_ref.at[row[:, None], column[None, :]]
        triton.store(where, total.astype(out_ref.dtype), mask=used[:, None] & inside[None, :])


def _dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [M, C] times weight [N, C] transposed in float32; float32 operands at full precision."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, weight, (((1,), (1,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )
