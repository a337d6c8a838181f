"""Elementary functions that LLVM vectorises, for numba functions: no table, no call into a library, fixed roundings."""

# numba reads the functions itself; pyright knows neither its types nor its intrinsics.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_LOG2_E = np.float32(math.log2(math.e))
_C1, _C2, _C3, _C4, _C5, _C6, _C7 = (np.float32(math.log(2.0) ** n / math.factorial(n)) for n in range(1, 8))


@intrinsic
def fma(typingctx, a, b, c):
    """a * b + c, rounded once."""

    def codegen(context, builder, signature, args):
        return builder.fma(*args)

    return types.float32(types.float32, types.float32, types.float32), codegen


@intrinsic
def float_of_bits(typingctx, bits):
    """The float32 with these 32 bits."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.uint32), codegen


@intrinsic
def bits_of_float(typingctx, value):
    """The 32 bits of a float32."""

    def codegen(context, builder, signature, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@njit(inline="always")
def exp2(x):
    """2^x for x from -126 to 127, clamped to that range; the error is a unit in the last place or two.

    A Taylor polynomial on [0, 1) times a power of two.
    """
    x = min(max(x, np.float32(-126.0)), np.float32(127.0))
    whole = np.floor(x)
    part = x - whole
    value = fma(_C7, part, _C6)
    value = fma(value, part, _C5)
    value = fma(value, part, _C4)
    value = fma(value, part, _C3)
    value = fma(value, part, _C2)
    value = fma(value, part, _C1)
    value = fma(value, part, np.float32(1.0))
    return value * float_of_bits(np.uint32(np.int32(whole) + np.int32(127)) << np.uint32(23))


def exp2_vector(builder, x):
    """`exp2` of a vector of float32, as instructions."""

    def constant(value):
        return ir.Constant(x.type, [ir.Constant(x.type.element, float(value))] * x.type.count)

    integers = ir.VectorType(ir.IntType(32), x.type.count)

    def integer(value):
        return ir.Constant(integers, [value] * x.type.count)

    for bound, keep in ((-126.0, ">"), (127.0, "<")):
        x = builder.select(builder.fcmp_ordered(keep, x, constant(bound)), x, constant(bound))
    whole = _call(builder, "floor", x)
    part = builder.fsub(x, whole)
    value = constant(_C7)
    for coefficient in (_C6, _C5, _C4, _C3, _C2, _C1, 1.0):
        value = _call(builder, "fma", value, part, constant(coefficient))
    exponent = builder.add(builder.fptosi(whole, integers), integer(127))
    return builder.fmul(value, builder.bitcast(builder.shl(exponent, integer(23)), x.type))


def _call(builder, name, *vectors):
    """LLVM's intrinsic `name` of vectors of float32."""
    kind = vectors[0].type
    function_type = ir.FunctionType(kind, [kind] * len(vectors))
    function = cgutils.get_or_insert_function(builder.module, function_type, f"llvm.{name}.v{kind.count}f32")
    return builder.call(function, vectors)


def silu_vector(builder, x):
    """x / (1 + e^-x) of a vector of float32, as instructions; NaN for NaN."""
    count = x.type.count
    one, scale = (ir.Constant(x.type, [ir.Constant(x.type.element, float(v))] * count) for v in (1.0, -_LOG2_E))
    return builder.fdiv(x, builder.fadd(one, exp2_vector(builder, builder.fmul(x, scale))))


def bfloat16_vector(builder, x):
    """The bits of a vector of float32 as bfloat16, as instructions: to nearest, ties to even; NaN stays NaN."""
    count = x.type.count
    integers, shorts = ir.VectorType(ir.IntType(32), count), ir.VectorType(ir.IntType(16), count)

    def integer(value):
        return ir.Constant(integers, [value] * count)

    bits = builder.bitcast(x, integers)
    odd = builder.and_(builder.lshr(bits, integer(16)), integer(1))
    rounded = builder.lshr(builder.add(builder.add(bits, integer(0x7FFF)), odd), integer(16))
    rounded = builder.select(builder.fcmp_unordered("uno", x, x), integer(0x7FC0), rounded)
    return builder.trunc(rounded, shorts)
