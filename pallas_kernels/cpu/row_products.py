"""Matrix products on any CPU whose bits depend on a row and a column alone: for weights that are stored as they are.

XLA's dots sum in an order that depends on the number of rows, and on that of threads: a request's hidden states would
depend on what it is batched with. Here each result is the same whatever else is computed: LANES sums over the
contracted axis, of every LANES-th product each, are added in the order of a tree, and so for each PIECE of the axis;
pieces are added from the first to the last.

Row and column are both read along the contracted axis, where their elements lie side by side, so weights need no other
order: a tile of rows and columns of sums stays in registers, and each step takes LANES elements of each row and column.
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
from jaxserve.pallas_kernels.cpu.emitter import INT, SINGLE, WORD
from jaxserve.pallas_kernels.cpu.native_calls import FLOATING, add_copy
from jaxserve.pallas_kernels.cpu.product_blocks import LargestBlock, add_num_items, block_of, memory_for_rows, sizes_of

ZERO = ir.Constant(SINGLE, 0.0)

PIECE = 512
"""Elements of the contracted axis that are summed before others: what a tile reads of them stays in the first cache."""

LARGEST_BLOCK = LargestBlock(rows=256, columns=96, few_columns=48)

_VERSION = 1
"""Changes with what is computed: a program that was kept from an earlier release must not meet another function."""


class Tile(NamedTuple):
    """What is computed in registers. lanes: float32 numbers of a vector; fused: one instruction multiplies and adds."""

    lanes: int
    rows: int
    columns: int
    fused: bool


@functools.cache
def tile() -> Tile:
    """The tile for this CPU: as many sums as its registers hold beside what is multiplied."""
    has = native_calls.features()
    if "avx512f" in has:
        return Tile(16, 8, 3, True)
    if {"avx2", "fma"} <= has:
        return Tile(8, 4, 3, True)
    if platform.machine() in ("aarch64", "arm64"):
        return Tile(4, 8, 3, True)
    return Tile(4, 4, 2, False)


def kernels() -> str:
    """The kernels that run here, by name; a program compiled with others cannot call them."""
    return f"rows_{_VERSION}_{tile().lanes}{'fused' if tile().fused else ''}"


def prepare(dtype: jax.typing.DTypeLike) -> None:
    """Compiles the function for weights of a dtype and makes it known to XLA, once a process; before a program that
    calls it is loaded or run."""
    name = jnp.dtype(dtype).name
    native_calls.register(_name(name), functools.partial(_build, dtype=name))


def multiply(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x [T, K] times the transposed weight [N, K] of any supported dtype: float32 [T, N], summed in float32."""
    prepare(weight.dtype)
    result = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(_name(weight.dtype.name), result)(x.astype(jnp.float32), weight)


def _name(dtype: str) -> str:
    return f"jaxserve_{dtype}_{kernels()}"


def _build(module: Any, name: str, dtype: str) -> None:
    native_calls.add_handler(module, name, add_num_items(module, LARGEST_BLOCK), _add_work(module, dtype))


def _add_work(module: Any, dtype: str) -> Any:
    """The function that computes a work item."""
    multiply_block = add_block(module, dtype)
    made, emit = native_calls.function(module, "work", ir.VoidType(), [WORD, WORD])
    frame, item = made.args
    sizes = sizes_of(emit, frame, LARGEST_BLOCK)
    buffers = emit.argument(frame, 0), emit.argument(frame, 1), emit.result(frame, 0)
    addresses = [emit.data(buffer) for buffer in buffers]
    emit.builder.call(multiply_block, [*addresses, sizes.columns, sizes.length, *block_of(emit, sizes, item)])
    emit.builder.ret_void()
    return made


def add_block(module: Any, dtype: str) -> Any:
    """Adds the function that computes a block of the result:
    block(x, weight, out, columns, length, first_row, end_row, first_column, end_column)."""
    tall, wide = tile().rows, tile().columns
    multiply_tile, copy_rows = _add_tile(module, dtype), add_copy(module, tile().lanes, tall, PIECE)
    made, emit = native_calls.function(module, "block", ir.VoidType(), [WORD] * 9)
    builder, (x, weight, out, columns, length, first_row, end_row, first_column, end_column) = emit.builder, made.args
    copy = memory_for_rows(emit, tile().lanes, PIECE, tall)

    def one_piece(piece: Any) -> None:
        first = builder.mul(piece, WORD(PIECE))

        def one_row(row: Any) -> None:
            row = builder.add(first_row, builder.mul(row, WORD(tall)))
            builder.call(copy_rows, [x, copy, length, row, end_row, first])

            def one_column(column: Any) -> None:
                column = builder.add(first_column, builder.mul(column, WORD(wide)))
                place = [row, end_row, column, end_column, first]
                builder.call(multiply_tile, [copy, weight, out, columns, length, *place])

            emit.times(emit.parts(builder.sub(end_column, first_column), WORD(wide)), one_column)

        emit.times(emit.parts(builder.sub(end_row, first_row), WORD(tall)), one_row)

    emit.times(emit.parts(length, WORD(PIECE)), one_piece)
    builder.ret_void()
    return made


def _add_tile(module: Any, dtype: str) -> Any:
    """The function that adds a piece of the products of a tile's rows, as copied, and columns to the result.

    Rows and columns past the end stand for the last one: they are computed again and stored in its place.
    """
    made, emit = native_calls.function(module, "tile", ir.VoidType(), [WORD] * 10)
    builder, (copy, weight, out, columns, length, row, end_row, column, end_column, first) = emit.builder, made.args
    lanes, tall, wide, fused = tile()
    size = FLOATING[dtype]
    row_numbers, column_numbers = (emit.numbers(*place) for place in ((row, end_row, tall), (column, end_column, wide)))
    places = emit.places(weight, column_numbers, length, first, size)
    steps, rest = emit.vectors(length, first, PIECE, lanes)

    def add_step(index: Any, totals: list[Any], mask: Any = None) -> list[Any]:
        right = [emit.read(emit.at(at, builder.mul(index, WORD(size * lanes))), dtype, lanes, mask) for at in places]
        base, new = emit.at(copy, builder.mul(index, WORD(4 * lanes * tall))), []
        for number in range(tall):
            left = emit.load(emit.at(base, 4 * lanes * number), ir.VectorType(SINGLE, lanes), 4 * lanes)
            new += [emit.add_product(totals[number * wide + other], left, right[other], fused) for other in range(wide)]
        return new

    zeros = [ir.Constant(ir.VectorType(SINGLE, lanes), [0.0] * lanes)] * (tall * wide)
    totals = emit.loop_any(steps, zeros, add_step)
    before = builder.block
    ragged, after = builder.append_basic_block("ragged"), builder.append_basic_block("whole")
    builder.cbranch(builder.icmp_signed(">", rest, WORD(0)), ragged, after)
    builder.position_at_end(ragged)
    added = add_step(steps, totals, emit.first_lanes(rest, lanes))
    builder.branch(after)
    builder.position_at_end(after)
    totals = [emit.merged((one, before), (other, ragged)) for one, other in zip(totals, added, strict=True)]
    sums = [_tree(builder, totals[other::wide]) for other in range(wide)]
    cells = [
        emit.at(out, builder.shl(builder.add(builder.mul(row_number, columns), column_number), WORD(2)))
        for row_number in row_numbers
        for column_number in column_numbers
    ]
    # All is read before anything is stored: two rows may stand for one.
    before = builder.block
    added, after = builder.append_basic_block("added"), builder.append_basic_block("store")
    builder.cbranch(builder.icmp_signed(">", first, WORD(0)), added, after)
    builder.position_at_end(added)
    earlier = [emit.load(cell, SINGLE, 4) for cell in cells]
    builder.branch(after)
    builder.position_at_end(after)
    earlier = [emit.merged((ZERO, before), (value, added)) for value in earlier]
    for number, cell in enumerate(cells):
        emit.store(builder.fadd(earlier[number], sums[number % wide][number // wide]), cell, 4)
    builder.ret_void()
    return made


def _tree(builder: Any, vectors: list[Any]) -> list[Any]:
    """The sum of each vector's lanes: halves are added to each other, until one lane is left.

    Every vector is summed in this order, wherever it stands.
    """
    lanes = tile().lanes
    groups, width = 1, lanes  # a vector has so many groups of lanes, each to be summed
    count = len(vectors)
    while width > 1:
        half = width // 2
        starts = [group * width for group in range(groups)]
        low = [start + lane for start in starts for lane in range(half)]
        high = [lane + half for lane in low]
        if len(vectors) > 1:
            # Two vectors become one of twice as many groups.
            low, high = ([*one, *(lane + groups * width for lane in one)] for one in (low, high))
            pairs, groups = list(zip(vectors[::2], vectors[1::2], strict=True)), 2 * groups
        else:
            pairs = [(vectors[0], vectors[0])]
        vectors = [
            builder.fadd(_shuffled(builder, one, other, low), _shuffled(builder, one, other, high))
            for one, other in pairs
        ]
        width = half
    flat = [builder.extract_element(vector, INT(lane)) for vector in vectors for lane in range(groups)]
    assert len(flat) == count, f"{count} vectors have {len(flat)} sums"
    return flat


def _shuffled(builder: Any, one: Any, other: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(one, other, ir.Constant(ir.VectorType(INT, len(lanes)), lanes))
