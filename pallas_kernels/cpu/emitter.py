"""Emits LLVM's vector instructions; some methods need AVX512_BF16.

Nothing is reassociated or contracted: the order of every sum is the one that is emitted.
"""

# The builder is llvmlite's, which has no types.
# pyright: basic

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

LANES = 16
"""float32 numbers of a vector."""

WORD, INT, SINGLE = ir.IntType(64), ir.IntType(32), ir.FloatType()
FLOATS, INTS = ir.VectorType(SINGLE, LANES), ir.VectorType(INT, LANES)

# 2^x for x in [-1/2, 1/2] by Taylor's series: off by less than 3e-6 of it, where weights keep 2^-9.
_EXP2 = [math.log(2) ** power / math.factorial(power) for power in range(6)]
_LEAST_EXPONENT = -200.0  # 2 to its power is 0


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    intrinsic_name = "bf16"

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat)

    def __hash__(self):
        return hash(_BFloat)


_BFLOATS = ir.VectorType(_BFloat(), 2 * LANES)


class Emitter:
    """Emits instructions through a builder, with the vector types of this module; addresses are int64."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def function(self, name: str, result: Any, *arguments: Any) -> Any:
        return cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(result, arguments), name)

    def call(self, name: str, result: Any, *values: Any) -> Any:
        return self.builder.call(self.function(name, result, *(value.type for value in values)), values)

    def at(self, address: Any, offset: Any = 0) -> Any:
        return self.builder.add(address, WORD(offset) if isinstance(offset, int) else offset)

    def load(self, address: Any, kind: Any, align: int = 2) -> Any:
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=align)

    def store(self, value: Any, address: Any, align: int = 2) -> None:
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()), align=align)

    def prefetch(self, address: Any) -> None:
        """Asks for the cache line at an address, which need not be mapped, to be brought to the second level."""
        pointer = self.builder.inttoptr(address, ir.IntType(8).as_pointer())
        function = self.function("llvm.prefetch.p0", ir.VoidType(), pointer.type, INT, INT, INT)
        to_read, second_level, data = INT(0), INT(2), INT(1)
        self.builder.call(function, [pointer, to_read, second_level, data])

    def splat(self, value: Any, lanes: int = LANES) -> Any:
        kind = ir.VectorType(value.type, lanes)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, INT(0))
        zeros = ir.Constant(ir.VectorType(INT, lanes), None)
        return self.builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)

    def constant(self, value: float) -> Any:
        return ir.Constant(FLOATS, [value] * LANES)

    def dot(self, total: Any, one: Any, other: Any) -> Any:
        """Adds to each lane the products of its two pairs of bfloat16: the second pair first."""
        one, other = self.builder.bitcast(one, _BFLOATS), self.builder.bitcast(other, _BFLOATS)
        return self.call("llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, total, one, other)

    def larger(self, one: Any, other: Any) -> Any:
        """The larger of two; `other` where one of them is no number."""
        return self.builder.select(self.builder.fcmp_ordered(">", one, other), one, other)

    def largest(self, vector: Any) -> Any:
        """The largest lane."""
        return self._folded(vector, self.larger)

    def sum_lanes(self, vector: Any) -> Any:
        """The sum of the lanes: halves are added to each other, until one lane is left."""
        return self._folded(vector, self.builder.fadd)

    def _folded(self, vector: Any, join: Callable[[Any, Any], Any]) -> Any:
        """The lane that is left when halves are joined again and again."""
        lanes = LANES
        while lanes > 1:
            lanes //= 2
            halves = [
                self.builder.shuffle_vector(
                    vector,
                    ir.Constant(vector.type, ir.Undefined),
                    ir.Constant(ir.VectorType(INT, lanes), list(range(start, start + lanes))),
                )
                for start in (0, lanes)
            ]
            vector = join(*halves)
        return self.builder.extract_element(vector, INT(0))

    def exp2(self, x: Any) -> Any:
        """2^x; 0 below 2^-149, minus infinity included, and infinity from 2^128 on."""
        least = self.constant(_LEAST_EXPONENT)
        x = self.builder.select(self.builder.fcmp_ordered("<", x, least), least, x)
        whole = self.call("llvm.rint.v16f32", FLOATS, x)
        rest = self.builder.fsub(x, whole)
        power = self.constant(_EXP2[-1])
        for coefficient in reversed(_EXP2[:-1]):
            power = self.call("llvm.fma.v16f32", FLOATS, power, rest, self.constant(coefficient))
        all_lanes, as_set = ir.IntType(16)(-1), INT(4)
        return self.call("llvm.x86.avx512.mask.scalef.ps.512", FLOATS, power, whole, power, all_lanes, as_set)

    def silu(self, x: Any) -> Any:
        """x / (1 + e^-x)."""
        power = self.exp2(self.builder.fmul(x, self.constant(-math.log2(math.e))))
        return self.builder.fdiv(x, self.builder.fadd(self.constant(1.0), power))

    def power_of_two(self, exponent: Any) -> Any:
        """2^exponent for an integer of at most 0 held as float32; 0 below the range of normal numbers."""
        exponent = self.larger(exponent, ir.Constant(SINGLE, -127.0))
        biased = self.builder.add(self.builder.fptosi(exponent, INT), INT(127))
        return self.builder.bitcast(self.builder.shl(biased, INT(23)), SINGLE)

    def to_bfloat(self, low: Any, high: Any) -> Any:
        """Two vectors rounded to the nearest bfloat16 (ties to even), side by side."""
        return self.call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", _BFLOATS, high, low)

    def half(self, pairs: Any) -> Any:
        """The first LANES of a vector of 2 * LANES."""
        mask = ir.Constant(INTS, list(range(LANES)))
        return self.builder.shuffle_vector(pairs, ir.Constant(pairs.type, ir.Undefined), mask)

    def loop(self, count: Any, initial: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """Runs body(index, values) for each index below count, at least once; the values it ends with."""
        builder, before = self.builder, self.builder.block
        block, after = builder.append_basic_block("loop"), builder.append_basic_block("loop.end")
        builder.branch(block)
        builder.position_at_end(block)
        index = builder.phi(WORD)
        index.add_incoming(WORD(0), before)
        values = [builder.phi(value.type) for value in initial]
        for phi, value in zip(values, initial, strict=True):
            phi.add_incoming(value, before)
        results = body(index, values)
        following, end = builder.add(index, WORD(1)), builder.block  # another one than `block` after a loop in the body
        index.add_incoming(following, end)
        for phi, value in zip(values, results, strict=True):
            phi.add_incoming(value, end)
        builder.cbranch(builder.icmp_signed("<", following, count), block, after)
        builder.position_at_end(after)
        return results
