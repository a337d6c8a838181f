"""bfloat16 matrix products on CPUs with AVX512_BF16, from weights packed once: fast for few rows and for many.

Every element of the result is one chain of `vdpbf16ps` over the contracted axis, two at a time, from the first to the
last: its bits depend on its row and its column alone.
"""

# numba reads these functions itself; pyright knows neither its types nor its intrinsics.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from pallas_kernels.cpu import ffi

ROWS = 8
"""Rows computed together; the number of rows of a product must be a multiple."""

PANEL = 32
"""Columns computed together, two vectors of 16 float32; the last panel is filled up with zeros."""


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    intrinsic_name = "bf16"

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat)

    def __hash__(self):
        return hash(_BFloat)


@intrinsic
def multiply_panel(typingctx, x, x_stride, weights, pairs, out, out_stride):
    """ROWS rows of x times one panel of weights, into out. All are addresses, strides are bytes a row, pairs is half
    the length of the contracted axis. x is bfloat16, out float32; out takes all PANEL columns."""

    def codegen(context, builder, signature, args):
        word, single = ir.IntType(64), ir.FloatType()
        accumulator, operand = ir.VectorType(single, 16), ir.VectorType(_BFloat(), 32)
        broadcast = ir.VectorType(ir.IntType(32), 16)
        dot = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(accumulator, [accumulator, operand, operand]),
            "llvm.x86.avx512bf16.dpbf16ps.512",
        )
        x_address, x_step, w_address, count, out_address, out_step = args
        zero = ir.Constant(accumulator, None)
        before = builder.block
        loop, after = builder.append_basic_block("panel"), builder.append_basic_block("panel.end")
        builder.branch(loop)
        builder.position_at_end(loop)
        index = builder.phi(word)
        index.add_incoming(word(0), before)
        sums = [[builder.phi(accumulator) for _ in range(2)] for _ in range(ROWS)]
        base = builder.add(w_address, builder.mul(index, word(PANEL * 4)))
        columns = [
            builder.load(builder.inttoptr(builder.add(base, word(64 * part)), operand.as_pointer()), align=64)
            for part in range(2)
        ]
        new = []
        for row in range(ROWS):
            place = builder.add(x_address, builder.add(builder.mul(x_step, word(row)), builder.mul(index, word(4))))
            pair = builder.load(builder.inttoptr(place, ir.IntType(32).as_pointer()), align=4)
            lanes = builder.insert_element(ir.Constant(broadcast, ir.Undefined), pair, ir.IntType(32)(0))
            lanes = builder.shuffle_vector(
                lanes, ir.Constant(broadcast, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), 16), None)
            )
            lanes = builder.bitcast(lanes, operand)
            new.append([builder.call(dot, [sums[row][part], lanes, columns[part]]) for part in range(2)])
        following = builder.add(index, word(1))
        index.add_incoming(following, loop)
        for row in range(ROWS):
            for part in range(2):
                sums[row][part].add_incoming(zero, before)
                sums[row][part].add_incoming(new[row][part], loop)
        builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
        builder.position_at_end(after)
        for row in range(ROWS):
            place = builder.add(out_address, builder.mul(out_step, word(row)))
            for part in range(2):
                target = builder.inttoptr(builder.add(place, word(64 * part)), accumulator.as_pointer())
                builder.store(new[row][part], target, align=4)
        return context.get_dummy_value()

    words = (types.int64,) * 6
    return types.void(*words), codegen
