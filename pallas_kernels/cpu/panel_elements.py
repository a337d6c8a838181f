"""Reads the numbers of packed panels as vectors of float32, whatever they are held as.

Numbers of a panel lie side by side for each element of the contracted axis; of int4 two elements share the bytes of
one, the first in the lower halves.
"""

# The builder is llvmlite's, which has no types.
# pyright: basic, reportAttributeAccessIssue=false

from __future__ import annotations

import dataclasses
from typing import Any

from llvmlite import ir

from jaxserve.pallas_kernels.cpu.emitter import INT, SINGLE
from jaxserve.pallas_kernels.cpu.native_calls import FLOATING, Call

BITS = {"fp8": 8, "int8": 8, "int4": 4}
"""Bits of a quantized number by its kind."""

_HALF_FACTOR = 256.0
"""What the bits of fp8 have to be multiplied by when they are read as float16, whose exponents are 8 larger."""

_INT4_MIDDLE = 8


@dataclasses.dataclass(frozen=True)
class Elements:
    """Describes the numbers of a panel.

    Attributes:
        kind: a dtype of FLOATING, or one of BITS.
        piece: elements of the contracted axis that are summed before others, at most as many as share a scale.
        zeros: groups have zeros of their own.
    """

    kind: str
    piece: int
    zeros: bool = False

    @property
    def name(self) -> str:
        """Names them in the names of functions."""
        if not self.scaled:
            return self.kind
        return f"{self.kind}_{self.piece}{'_zeros' if self.zeros else ''}"

    @property
    def scaled(self) -> bool:
        """Whether sums are multiplied by scales."""
        return self.kind in BITS

    @property
    def factor(self) -> float:
        """What scales are multiplied by, a power of 2."""
        return _HALF_FACTOR if self.kind == "fp8" else 1.0

    @property
    def together(self) -> int:
        """Elements of the contracted axis that share bytes."""
        return 2 if self.kind == "int4" else 1

    def row_bytes(self, columns: int) -> int:
        """Bytes of so many columns of the elements that are `together`."""
        return columns * (1 if self.scaled else FLOATING[self.kind])

    def read(self, emit: Call, address: Any, lanes: int) -> list[Any]:
        """Returns for each of the elements that are `together` a vector of its columns from an address on."""
        if not self.scaled:
            return [emit.read(address, self.kind, lanes)]
        ints = ir.VectorType(INT, lanes)
        stored = emit.load(address, ir.VectorType(ir.IntType(8), lanes), 1)
        if self.kind == "fp8":
            return [_from_fp8(emit, stored, lanes)]
        if self.kind == "int8":
            return [emit.builder.sitofp(emit.builder.sext(stored, ints), ir.VectorType(SINGLE, lanes))]
        return _from_int4(emit, emit.builder.zext(stored, ints), lanes, 0 if self.zeros else _INT4_MIDDLE)


def _from_fp8(emit: Call, stored: Any, lanes: int) -> Any:
    """Returns numbers of e4m3, divided by _HALF_FACTOR: their bits are put where float16 has sign, exponent and
    mantissa, and float16 has the small ones as such, too."""
    builder, shorts = emit.builder, ir.VectorType(ir.IntType(16), lanes)
    wide = builder.sext(stored, shorts)
    # The sign stays in front; the bit behind it is the exponent's, which has one more.
    half = builder.and_(builder.shl(wide, ir.Constant(shorts, [7] * lanes)), ir.Constant(shorts, [0xBFFF] * lanes))
    return builder.fpext(builder.bitcast(half, ir.VectorType(ir.HalfType(), lanes)), ir.VectorType(SINGLE, lanes))


def _from_int4(emit: Call, pairs: Any, lanes: int, middle: int) -> list[Any]:
    """Returns the lower and the upper halves of bytes, less `middle`."""
    builder, singles = emit.builder, ir.VectorType(SINGLE, lanes)
    halves = [pairs, builder.lshr(pairs, ir.Constant(pairs.type, [4] * lanes))]
    if lanes == 16:
        # A look-up of float32 by the lowest 4 bits of each lane.
        table = ir.Constant(singles, [float(number - middle) for number in range(16)])
        return [emit.call("llvm.x86.avx512.permvar.sf.512", singles, table, half) for half in halves]
    low = ir.Constant(pairs.type, [15] * lanes)
    middles = ir.Constant(pairs.type, [middle] * lanes)
    return [builder.sitofp(builder.sub(builder.and_(half, low), middles), singles) for half in halves]
