"""The work items of a matrix product on CPUs: blocks of rows and columns of the result.

Which thread computes a block, and how large it is, changes no bit of what is in it.
"""

# The builder is llvmlite's, which has no types.
# pyright: basic, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

from llvmlite import ir

from jaxserve.pallas_kernels.cpu import native_calls
from jaxserve.pallas_kernels.cpu.emitter import SINGLE, WORD
from jaxserve.pallas_kernels.cpu.native_calls import Call

FEW_ROWS = 64
"""Rows up to which a block has fewer columns, for threads to share."""

LEAST_WORK = 2**18
"""Products below which a call is left to the calling thread."""

_LINE = 64


class LargestBlock(NamedTuple):
    """The largest block, in rows and columns: so many that the second cache holds a piece of them. few_columns: columns
    where there are at most FEW_ROWS rows."""

    rows: int
    columns: int
    few_columns: int


class Sizes(NamedTuple):
    """Of a call, as words: rows, columns, length of the contracted axis; and rows and columns of a block."""

    rows: Any
    columns: Any
    length: Any
    block_rows: Any
    block_columns: Any


class Block(NamedTuple):
    """Of a work item, as words: its first row and the one past its last, and its columns likewise."""

    first_row: Any
    end_row: Any
    first_column: Any
    end_column: Any


def sizes_of(emit: Call, frame: Any, largest: LargestBlock) -> Sizes:
    """The sizes of a call whose first arguments are rows [T, K] and a matrix [N, K]."""
    x, weight = (emit.argument(frame, number) for number in range(2))
    rows, columns, length = emit.dim(x, 0), emit.dim(weight, 0), emit.dim(x, 1)
    builder = emit.builder
    few = builder.icmp_signed("<=", rows, WORD(FEW_ROWS))
    block_columns = builder.select(few, WORD(largest.few_columns), WORD(largest.columns))
    little = builder.icmp_signed("<", builder.mul(builder.mul(rows, columns), length), WORD(LEAST_WORK))
    block_rows = builder.select(little, rows, WORD(largest.rows))
    return Sizes(rows, columns, length, block_rows, builder.select(little, columns, block_columns))


def add_num_items(module: Any, largest: LargestBlock) -> Any:
    """Adds the function that tells the work items of a call: its blocks, or one for all of little work."""
    made, emit = native_calls.function(module, "num_items", WORD, [WORD])
    sizes = sizes_of(emit, made.args[0], largest)
    blocks = emit.parts(sizes.columns, sizes.block_columns), emit.parts(sizes.rows, sizes.block_rows)
    emit.builder.ret(emit.builder.mul(*blocks))
    return made


def block_of(emit: Call, sizes: Sizes, item: Any) -> Block:
    """The block of a work item; those that follow each other are columns of the same rows."""
    builder = emit.builder
    blocks = emit.parts(sizes.columns, sizes.block_columns)
    first_row = builder.mul(builder.sdiv(item, blocks), sizes.block_rows)
    first_column = builder.mul(builder.srem(item, blocks), sizes.block_columns)
    end_row = emit.smaller(builder.add(first_row, sizes.block_rows), sizes.rows)
    end_column = emit.smaller(builder.add(first_column, sizes.block_columns), sizes.columns)
    return Block(first_row, end_row, first_column, end_column)


def memory_for_rows(emit: Call, lanes: int, piece: int, tall: int) -> Any:
    """Memory of a function for what `add_copy`'s function copies, from a cache line on."""
    copy = emit.builder.alloca(ir.VectorType(SINGLE, lanes), -(-piece // lanes) * tall)
    copy.align = _LINE
    return emit.builder.ptrtoint(copy, WORD)
