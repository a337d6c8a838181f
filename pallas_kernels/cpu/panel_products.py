"""Matrix products on any CPU from weights packed once, whose bits depend on a row and a column alone.

Packed, a matrix [N, K] keeps its shape and its bytes take another order: panels of PANEL columns of the result, in each
the columns side by side, [N / PANEL, K, PANEL]. Lanes are columns then, so that nothing has to be added across lanes as
in `row_products`: every result is one chain of products over each PIECE of the contracted axis, from the first to the
last, and pieces are added in their order, whatever the vectors' length and however many rows are computed together.
"""

# The builder is llvmlite's, which has no types.
# pyright: basic, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
import platform
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from llvmlite import ir

from jaxserve.pallas_kernels.cpu import native_calls
from jaxserve.pallas_kernels.cpu.emitter import SINGLE, WORD
from jaxserve.pallas_kernels.cpu.native_calls import Call, add_copy
from jaxserve.pallas_kernels.cpu.panel_elements import Elements
from jaxserve.pallas_kernels.cpu.product_blocks import LargestBlock, add_num_items, block_of, memory_for_rows, sizes_of

PANEL = 32
"""Columns of a panel: two cache lines of float32."""

PIECE = 256
"""Elements of the contracted axis that are summed before others: a panel's share stays in the first cache."""

_LARGEST_BLOCK = LargestBlock(rows=192, columns=4 * PANEL, few_columns=2 * PANEL)
_LINE = 64

_AHEAD = 8192
"""Bytes ahead of which memory is asked for weights where few rows leave it no time."""

_UNROLLED = 4
"""Elements of the contracted axis of one turn of a loop; the lanes of every tile are a multiple."""

_VERSION = 1
"""Changes with what is computed or how weights are packed: a program that was kept from an earlier release must not
meet another function."""


class Tile(NamedTuple):
    """What is computed in registers. lanes: float32 numbers of a vector; vectors: of a row; heights: rows of the tiles
    that a block is divided into, the tallest first, 1 last; fused: one instruction multiplies and adds."""

    lanes: int
    vectors: int
    heights: tuple[int, ...]
    fused: bool


@functools.cache
def tile() -> Tile:
    """The tile for this CPU: as many sums as its registers hold beside what is multiplied."""
    has = native_calls.features()
    if "avx512f" in has:
        return Tile(16, 2, (12, 8, 4, 1), True)
    if {"avx2", "fma"} <= has:
        return Tile(8, 2, (6, 2, 1), True)
    if platform.machine() in ("aarch64", "arm64"):
        return Tile(4, 4, (6, 2, 1), True)
    return Tile(4, 2, (4, 1), False)


def kernels() -> str:
    """The kernels that run here, by name; a program compiled with others cannot call them."""
    return f"panels_{_VERSION}_{'fused' if tile().fused else 'rounded'}"


def fits(out_features: int) -> bool:
    """Whether a matrix [N, K] can be packed: whole panels."""
    return out_features % PANEL == 0


def prepare(dtype: jax.typing.DTypeLike) -> None:
    """Compiles the function for weights of a dtype and makes it known to XLA, once a process; before a program that
    calls it is loaded or run."""
    name = jnp.dtype(dtype).name
    native_calls.register(_name(name), functools.partial(build, elements=Elements(name, PIECE)))


def pack(matrix: jax.Array) -> jax.Array:
    """[N, K] in the order that `multiply` reads."""
    n, k = matrix.shape
    return matrix.reshape(n // PANEL, PANEL, k).swapaxes(1, 2).reshape(n, k)


def multiply(x: jax.Array, packed: jax.Array) -> jax.Array:
    """x [T, K] times the transposed matrix [N, K] that `pack` packed, of any dtype of FLOATING: float32 [T, N]."""
    prepare(packed.dtype)
    result = jax.ShapeDtypeStruct((x.shape[0], packed.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(_name(packed.dtype.name), result)(x.astype(jnp.float32), packed)


def _name(dtype: str) -> str:
    return f"jaxserve_{dtype}_{kernels()}"


def build(module: Any, name: str, elements: Elements) -> None:
    """Adds the function that multiplies by panels of such numbers; its arguments are x, the numbers and, where they are
    scaled, scales and zeros [groups, N]."""
    native_calls.add_handler(module, name, add_num_items(module, _LARGEST_BLOCK), _add_work(module, elements))


def _add_work(module: Any, elements: Elements) -> Any:
    """The function that computes a work item."""
    lanes, _, heights, _ = tile()
    bands = [_add_band(module, elements, height) for height in heights]
    made, emit = native_calls.function(module, "work", ir.VoidType(), [WORD, WORD])
    builder, (frame, item) = emit.builder, made.args
    sizes = sizes_of(emit, frame, _LARGEST_BLOCK)
    x, weight, out = (
        emit.data(buffer) for buffer in (emit.argument(frame, 0), emit.argument(frame, 1), emit.result(frame, 0))
    )
    first_row, end_row, *columns = block_of(emit, sizes, item)
    scales = emit.argument(frame, 2) if elements.scaled else None
    scaling = [WORD(0)] * 3
    if scales is not None:
        zeros = emit.data(emit.argument(frame, 3)) if elements.zeros else WORD(0)
        scaling = [emit.data(scales), zeros, emit.dim(scales, 0)]
    copy = memory_for_rows(emit, lanes, elements.piece, heights[0])
    begin, shape = [x, copy, weight, out], [sizes.columns, sizes.length]

    def one_piece(piece: Any) -> None:
        first, row = builder.mul(piece, WORD(elements.piece)), first_row
        for number, (height, band) in enumerate(zip(heights, bands, strict=True)):
            # What is left of the last height's rows is computed by tiles of it, however few they are.
            left = builder.sub(end_row, row)
            least = heights[number + 1] + 1 if number + 1 < len(heights) else 1
            count = builder.sdiv(builder.add(left, WORD(height - least)), WORD(height))
            count = builder.select(builder.icmp_signed(">", count, WORD(0)), count, WORD(0))

            def one_tile(index: Any, row: Any = row, height: int = height, band: Any = band) -> None:
                place = builder.add(row, builder.mul(index, WORD(height)))
                builder.call(band, [*begin, *shape, place, end_row, *columns, first, *scaling])

            emit.times(count, one_tile)
            row = emit.smaller(builder.add(row, builder.mul(count, WORD(height))), end_row)

    emit.times(emit.parts(sizes.length, WORD(elements.piece)), one_piece)
    builder.ret_void()
    return made


def _add_band(module: Any, elements: Elements, height: int) -> Any:
    """The function that adds a piece of the products of so many rows to the result, for the panels of a work item.

    Rows past the end stand for the last one: they are computed again and stored in its place.
    """
    lanes, vectors, *_ = tile()
    copy_rows = add_copy(module, lanes, height, elements.piece)
    # One row has so few sums that they wait for each other's instructions; numbers that are read fast have two panels.
    panels = 2 if height == 1 and elements.scaled else 1
    tiles = {each: _add_tile(module, elements, height, each) for each in {1, panels}}
    made, emit = native_calls.function(module, f"band_{height}", ir.VoidType(), [WORD] * 14)
    builder = emit.builder
    x, copy, weight, out, columns, length, row, end_row, first_column, end_column, first, *scaling = made.args
    builder.call(copy_rows, [x, copy, length, row, end_row, first])
    wide = lanes * vectors

    def multiply_tile(column: Any, each: int) -> None:
        builder.call(tiles[each], [copy, weight, out, columns, length, row, end_row, column, first, *scaling])

    def some_panels(number: Any) -> None:
        column = builder.add(first_column, builder.mul(number, WORD(panels * PANEL)))
        for part in range(PANEL // wide):
            multiply_tile(builder.add(column, WORD(wide * part)), panels)

    if panels > 1:
        count = builder.sdiv(builder.sub(end_column, first_column), WORD(panels * PANEL))
        emit.times(count, some_panels)
        first_column = builder.add(first_column, builder.mul(count, WORD(panels * PANEL)))
    left = builder.sdiv(builder.sub(end_column, first_column), WORD(wide))
    emit.times(left, lambda part: multiply_tile(builder.add(first_column, builder.mul(part, WORD(wide))), 1))
    builder.ret_void()
    return made


def _add_tile(module: Any, elements: Elements, height: int, panels: int) -> Any:
    """The function that does so for the columns of one tile, which has the same places of one panel or of some that
    follow each other."""
    lanes, vectors, heights, fused = tile()
    together, line_bytes = elements.together, elements.row_bytes(PANEL)
    beside = [PANEL * panel + lanes * part for panel in range(panels) for part in range(vectors)]
    made, emit = native_calls.function(module, f"tile_{height}_{panels}", ir.VoidType(), [WORD] * 12)
    builder = emit.builder
    copy, weight, out, columns, length, row, end_row, column, first, *scaling = made.args
    # Of a panel [K / together, PANEL]: its begin, and the columns before this tile's.
    inside = builder.urem(column, WORD(PANEL))
    begin = builder.mul(builder.sub(column, inside), builder.udiv(length, WORD(together)))
    begin = builder.add(begin, builder.mul(builder.udiv(first, WORD(together)), WORD(PANEL)))
    base = emit.at(weight, builder.mul(builder.add(begin, inside), WORD(elements.row_bytes(1))))
    count = emit.smaller(builder.sub(length, first), WORD(elements.piece))
    panel_bytes = builder.mul(builder.udiv(length, WORD(together)), WORD(line_bytes))
    bases = [emit.at(base, builder.mul(panel_bytes, WORD(panel))) for panel in range(panels)]
    scales, zeros = _scaling(emit, elements, scaling, columns, length, column, first, beside)

    def add_elements(line: Any, left: Any, totals: list[Any]) -> list[Any]:
        """Adds the products of the elements of each row, at `left`, and the columns' of a line of the panel."""
        read = []
        for each in bases:
            right = emit.at(each, builder.mul(line, WORD(line_bytes)))
            for part in range(line_bytes // _LINE if height < heights[0] else 0):
                emit.prefetch(emit.at(right, _AHEAD + _LINE * part))
            step = elements.row_bytes(lanes)
            read += [elements.read(emit, emit.at(right, step * part), lanes) for part in range(vectors)]
        for number in range(together):
            columns_of = [each[number] for each in read]
            if zeros:
                columns_of = [builder.fsub(each, zero) for each, zero in zip(columns_of, zeros, strict=True)]
            new = []
            for tall in range(height):
                one = emit.splat(emit.load(emit.at(left, 4 * (lanes * tall + number)), SINGLE, 4), lanes)
                before = totals[tall * len(beside) :]
                new += [
                    emit.add_product(total, one, each, fused) for total, each in zip(before, columns_of, strict=False)
                ]
            totals = new
        return totals

    def copied(element: Any) -> Any:
        """Where an element of the copied rows lies: their vectors are side by side."""
        vector = builder.mul(builder.udiv(element, WORD(lanes)), WORD(4 * lanes * height))
        return emit.at(emit.at(copy, vector), builder.shl(builder.urem(element, WORD(lanes)), WORD(2)))

    def add_some(index: Any, totals: list[Any]) -> list[Any]:
        first_element = builder.mul(index, WORD(_UNROLLED))
        left = copied(first_element)
        first_line = builder.mul(index, WORD(_UNROLLED // together))
        if line_bytes < _LINE and height < heights[0]:
            ahead = builder.add(builder.mul(first_line, WORD(line_bytes)), WORD(_AHEAD))
            for each in bases:
                for part in range(_UNROLLED // together * line_bytes // _LINE):
                    emit.prefetch(emit.at(emit.at(each, ahead), _LINE * part))
        for number in range(_UNROLLED // together):
            line = builder.add(first_line, WORD(number))
            totals = add_elements(line, emit.at(left, 4 * number * together), totals)
        return totals

    totals = [ir.Constant(ir.VectorType(SINGLE, lanes), [0.0] * lanes)] * (height * len(beside))
    totals = emit.loop_any(builder.udiv(count, WORD(_UNROLLED)), totals, add_some)
    if together == 1:  # several together are whole turns of the loop
        rest = builder.urem(count, WORD(_UNROLLED))
        last = builder.sub(count, rest)

        def add_one(index: Any, totals: list[Any]) -> list[Any]:
            element = builder.add(last, index)
            return add_elements(element, copied(element), totals)

        totals = emit.loop_any(rest, totals, add_one)
    if scales:
        totals = [builder.fmul(total, scales[number % len(beside)]) for number, total in enumerate(totals)]
    places = emit.places(out, emit.numbers(row, end_row, height), columns, column, 4)
    _add_to_result(emit, totals, [emit.at(place, 4 * one) for place in places for one in beside], first)
    return made


def _scaling(
    emit: Call,
    elements: Elements,
    scaling: list[Any],
    columns: Any,
    length: Any,
    column: Any,
    first: Any,
    beside: list[int],
) -> tuple[list[Any], list[Any]]:
    """Returns the scales and the zeros of a tile's columns for the group of element `first`; [] without.

    beside: where its vectors begin, in columns from the first.
    """
    if not elements.scaled:
        return [], []
    lanes = tile().lanes
    builder, (scales, zeros, groups) = emit.builder, scaling
    group = builder.udiv(builder.mul(first, groups), length)
    place = builder.add(builder.mul(group, columns), column)
    factor = ir.Constant(ir.VectorType(SINGLE, lanes), [elements.factor] * lanes)
    at = emit.at(scales, builder.shl(place, WORD(2)))
    factors = [builder.fmul(emit.read(emit.at(at, 4 * one), "float32", lanes), factor) for one in beside]
    if not elements.zeros:
        return factors, []
    shorts, floats = ir.VectorType(ir.IntType(16), lanes), ir.VectorType(SINGLE, lanes)
    at = emit.at(zeros, builder.shl(place, WORD(1)))
    stored = [emit.load(emit.at(at, 2 * one), shorts, 2) for one in beside]
    return factors, [builder.sitofp(each, floats) for each in stored]


def _add_to_result(emit: Call, totals: list[Any], cells: list[Any], first: Any) -> None:
    """Stores a tile's sums, added to those of earlier pieces where there are any, and returns.

    All is read before anything is stored: two rows may stand for one.
    """
    builder = emit.builder
    before = builder.block
    added, after = builder.append_basic_block("added"), builder.append_basic_block("store")
    builder.cbranch(builder.icmp_signed(">", first, WORD(0)), added, after)
    builder.position_at_end(added)
    sums = [builder.fadd(emit.load(cell, total.type, 4), total) for cell, total in zip(cells, totals, strict=True)]
    builder.branch(after)
    builder.position_at_end(after)
    results = [emit.merged((total, before), (summed, added)) for total, summed in zip(totals, sums, strict=True)]
    for cell, result in zip(cells, results, strict=True):
        emit.store(result, cell, 4)
    builder.ret_void()
