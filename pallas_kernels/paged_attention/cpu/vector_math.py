"""Numbers of 16 and 32 bits in vectors of float32: reading, rounding, products, and the functions of the softmax."""

# The builder is llvmlite's, which has no types.
# pyright: basic, reportAttributeAccessIssue=false

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir

from jaxserve.pallas_kernels.cpu.emitter import FLOATS, INTS, LANES
from jaxserve.pallas_kernels.cpu.native_calls import FLOATING
from jaxserve.pallas_kernels.cpu.native_functions import Emit
from jaxserve.pallas_kernels.paged_attention.cpu import elements
from jaxserve.pallas_kernels.paged_attention.cpu.elements import Element

_SHORT = ir.IntType(16)
_SHORTS = ir.VectorType(_SHORT, LANES)

# 2^x for x in [-1/2, 1/2] by Taylor's series: off by less than 6e-9 of it, a tenth of what rounding to float32 costs.
_EXP2 = [math.log(2) ** power / math.factorial(power) for power in range(8)]

# 3 * 2^22: what is added to it is rounded to an integer, which the low bits of the sum hold.
_ROUNDING = 12582912.0

_LEAST_EXPONENT = -126.0
"""2 to its power is the smallest normal float32."""

_SMALL = 0.625
"""Up to which the hyperbolic tangent is computed as a quotient of polynomials."""


def read_units(emit: Emit, element: Element, address: Any) -> Any:
    """LANES units: pairs as they lie, single numbers as float32."""
    if element.together == 2:
        return emit.load(address, INTS, 4)
    return emit.read(address, element.stored, LANES)


def store(emit: Emit, dtype: str, parts: list[Any], address: Any) -> None:
    """Stores vectors of float32 side by side, rounded to a dtype (to the nearest, ties to even)."""
    for number, part in enumerate(parts):
        rounded = part
        if dtype == "float16":
            rounded = emit.builder.fptrunc(part, ir.VectorType(ir.HalfType(), LANES))
        elif dtype == "bfloat16":
            rounded = _to_bfloat16(emit, part)
        emit.store(rounded, emit.at(address, FLOATING[dtype] * LANES * number), FLOATING[dtype])


def _to_bfloat16(emit: Emit, value: Any) -> Any:
    """The upper half of the bits, to which the lower half's rounding is carried; one NaN for all."""
    if emit.parameters.together == 2:
        return emit.half(emit.to_bfloat(value, value))
    builder, bits = emit.builder, emit.builder.bitcast(value, INTS)
    odd = builder.and_(builder.lshr(bits, ir.Constant(INTS, [16] * LANES)), ir.Constant(INTS, [1] * LANES))
    rounded = builder.add(builder.add(bits, ir.Constant(INTS, [0x7FFF] * LANES)), odd)
    rounded = builder.lshr(rounded, ir.Constant(INTS, [16] * LANES))
    number = builder.fcmp_ordered("ord", value, value)
    return builder.trunc(builder.select(number, rounded, ir.Constant(INTS, [0x7FC0] * LANES)), _SHORTS)


def add_product(emit: Emit, total: Any, left: Any, right: Any) -> Any:
    """total + left * right, rounded once where the CPU can."""
    return emit.add_product(total, left, right, elements.machine().fused)


def exp2(emit: Emit, element: Element, x: Any) -> Any:
    """2^x as exactly as the element's weights need it."""
    return emit.exp2(x) if element.together == 2 else exp2_float32(emit, x)


def exp2_float32(emit: Emit, x: Any) -> Any:
    """2^x below 2^128, within 1e-7 of it; 0 below 2^-126, minus infinity included."""
    builder, least = emit.builder, emit.constant(_LEAST_EXPONENT)
    below = builder.fcmp_ordered("<", x, least)
    x = builder.select(below, least, x)
    shifted = builder.fadd(x, emit.constant(_ROUNDING))
    rest = builder.fsub(x, builder.fsub(shifted, emit.constant(_ROUNDING)))
    power = emit.constant(_EXP2[-1])
    for coefficient in reversed(_EXP2[:-1]):
        power = add_product(emit, emit.constant(coefficient), power, rest)
    biased = builder.add(builder.bitcast(shifted, INTS), ir.Constant(INTS, [127] * LANES))
    scale = builder.bitcast(builder.shl(biased, ir.Constant(INTS, [23] * LANES)), FLOATS)
    return builder.select(below, emit.constant(0.0), builder.fmul(power, scale))


def capped(emit: Emit, scores: list[Any], cap: Any, condition: Any) -> list[Any]:
    """cap * tanh(score) where a condition, one for all, holds; the scores elsewhere."""
    builder, before = emit.builder, emit.builder.block
    bent, after = builder.append_basic_block("cap"), builder.append_basic_block("scores")
    builder.cbranch(condition, bent, after)
    builder.position_at_end(bent)
    results = [builder.fmul(cap, _tanh(emit, score)) for score in scores]
    end = builder.block
    builder.branch(after)
    builder.position_at_end(after)
    return [emit.merged((one, before), (other, end)) for one, other in zip(scores, results, strict=True)]


def _tanh(emit: Emit, x: Any) -> Any:
    """The hyperbolic tangent: of small numbers the fifth convergent of Lambert's continued fraction, else from e^-2|x|.

    The convergent is off by less than 1e-9 of it.
    """
    builder, one = emit.builder, emit.constant(1.0)
    size = emit.call(f"llvm.fabs.v{LANES}f32", FLOATS, x)
    power = exp2_float32(emit, builder.fmul(size, emit.constant(-2 * math.log2(math.e))))
    large = builder.fdiv(builder.fsub(one, power), builder.fadd(one, power))
    large = emit.call(f"llvm.copysign.v{LANES}f32", FLOATS, large, x)
    square = builder.fmul(x, x)
    above = builder.fmul(x, _polynomial(emit, square, (945.0, 105.0, 1.0)))
    small = builder.fdiv(above, _polynomial(emit, square, (945.0, 420.0, 15.0)))
    return builder.select(builder.fcmp_ordered("<", size, emit.constant(_SMALL)), small, large)


def _polynomial(emit: Emit, x: Any, coefficients: tuple[float, ...]) -> Any:
    value = emit.constant(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        value = add_product(emit, emit.constant(coefficient), value, x)
    return value
