"""Grouped products on any CPU whose bits depend on a row and its expert's matrix alone, never on companions.

The tiles are those of `pallas_kernels.cpu.row_products`, with one more indirection: a work item is a block of rows of
one expert and a block of columns of its matrix. Experts without rows have no items, so nothing of them is read.
"""

# The builder is llvmlite's, which has no types.
# pyright: basic, reportAttributeAccessIssue=false

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from llvmlite import ir

from jaxserve.pallas_kernels.cpu import native_calls, row_products
from jaxserve.pallas_kernels.cpu.emitter import INT, WORD
from jaxserve.pallas_kernels.cpu.native_calls import FLOATING, Call
from jaxserve.pallas_kernels.cpu.product_blocks import LEAST_WORK
from jaxserve.pallas_kernels.cpu.row_products import LARGEST_BLOCK

_VERSION = 1
"""Changes with what is computed: a program that was kept from an earlier release must not meet another function."""


def prepare(dtype: jax.typing.DTypeLike) -> None:
    """Compiles the function for weights of a dtype and makes it known to XLA, once a process; before a program that
    calls it is loaded or run."""
    name = jnp.dtype(dtype).name
    native_calls.register(_name(name), functools.partial(_build, dtype=name))


def multiply(x: jax.Array, weights: jax.Array, offsets: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Computes `api.grouped_matmul`; arguments are checked there."""
    prepare(weights.dtype)
    result = jax.ShapeDtypeStruct((x.shape[0], weights.shape[1]), jnp.float32)
    product = jax.ffi.ffi_call(_name(weights.dtype.name), result)(x.astype(jnp.float32), weights, offsets)
    # The function leaves the rows of no expert as they are.
    return jnp.where((jnp.arange(x.shape[0]) < offsets[-1])[:, None], product, 0).astype(dtype)


def _name(dtype: str) -> str:
    return f"jaxserve_grouped_{_VERSION}_{dtype}_{row_products.kernels()}"


def _build(module: Any, name: str, dtype: str) -> None:
    native_calls.add_handler(module, name, _add_num_items(module), _add_work(module, dtype))


class _Sizes(NamedTuple):
    """Of a call, as words: experts, columns, length of the contracted axis; where the offsets are; and columns of a
    work item."""

    experts: Any
    columns: Any
    length: Any
    offsets: Any
    block_columns: Any


def _sizes(emit: Call, frame: Any) -> _Sizes:
    x, weights, offsets = (emit.argument(frame, number) for number in range(3))
    rows = emit.dim(x, 0)
    experts, columns, length = (emit.dim(weights, axis) for axis in range(3))
    builder = emit.builder
    little = builder.icmp_signed("<", builder.mul(builder.mul(rows, columns), length), WORD(LEAST_WORK))
    block_columns = builder.select(little, columns, WORD(LARGEST_BLOCK.columns))
    return _Sizes(experts, columns, length, emit.data(offsets), block_columns)


def _rows(emit: Call, sizes: _Sizes, expert: Any) -> tuple[Any, Any]:
    """The first row of an expert, and the one past its last."""
    builder = emit.builder
    place = emit.at(sizes.offsets, builder.shl(expert, WORD(2)))
    first, last = (builder.sext(emit.load(emit.at(place, 4 * number), INT, 4), WORD) for number in range(2))
    return first, last


def _add_num_items(module: Any) -> Any:
    """The function that tells the work items of a call: of each expert its blocks of rows times blocks of columns."""
    made, emit = native_calls.function(module, "num_items", WORD, [WORD])
    builder, sizes = emit.builder, _sizes(emit, made.args[0])

    def one(expert: Any, blocks: list[Any]) -> list[Any]:
        first, last = _rows(emit, sizes, expert)
        return [builder.add(blocks[0], emit.parts(builder.sub(last, first), WORD(LARGEST_BLOCK.rows)))]

    (blocks,) = emit.loop(sizes.experts, [WORD(0)], one)
    builder.ret(builder.mul(blocks, emit.parts(sizes.columns, sizes.block_columns)))
    return made


def _found(emit: Call, sizes: _Sizes, block: Any) -> tuple[Any, Any, Any]:
    """The expert, the first row and the one past the last of a block of rows, which are counted over all experts."""
    builder = emit.builder

    def one(expert: Any, state: list[Any]) -> list[Any]:
        left, *found = state
        first, last = _rows(emit, sizes, expert)
        blocks = emit.parts(builder.sub(last, first), WORD(LARGEST_BLOCK.rows))
        here = builder.and_(
            builder.icmp_signed(">=", left, WORD(0)),
            builder.icmp_signed("<", left, blocks),
        )
        begin = builder.add(first, builder.mul(left, WORD(LARGEST_BLOCK.rows)))
        end = emit.smaller(builder.add(begin, WORD(LARGEST_BLOCK.rows)), last)
        new = [builder.select(here, one, before) for one, before in zip((expert, begin, end), found, strict=True)]
        return [builder.sub(left, blocks), *new]

    _, expert, begin, end = emit.loop(sizes.experts, [block, WORD(0), WORD(0), WORD(0)], one)
    return expert, begin, end


def _add_work(module: Any, dtype: str) -> Any:
    """The function that computes a work item."""
    multiply_block = row_products.add_block(module, dtype)
    made, emit = native_calls.function(module, "work", ir.VoidType(), [WORD, WORD])
    builder, (frame, item) = emit.builder, made.args
    sizes = _sizes(emit, frame)
    x, weights = (emit.data(emit.argument(frame, number)) for number in range(2))
    out = emit.data(emit.result(frame, 0))
    # Items that follow each other are columns of the same rows.
    blocks = emit.parts(sizes.columns, sizes.block_columns)
    expert, first_row, end_row = _found(emit, sizes, builder.sdiv(item, blocks))
    first_column = builder.mul(builder.srem(item, blocks), sizes.block_columns)
    end_column = emit.smaller(builder.add(first_column, sizes.block_columns), sizes.columns)
    of_expert = builder.mul(builder.mul(expert, sizes.columns), builder.mul(sizes.length, WORD(FLOATING[dtype])))
    weight = emit.at(weights, of_expert)
    place = [first_row, end_row, first_column, end_column]
    builder.call(multiply_block, [x, weight, out, sizes.columns, sizes.length, *place])
    builder.ret_void()
    return made
