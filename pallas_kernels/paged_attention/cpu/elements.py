"""What pages hold and how it is multiplied: all that differs between the kernels of two implementations."""

from __future__ import annotations

import dataclasses
import functools
import platform
from typing import NamedTuple

from jaxserve.pallas_kernels.cpu import native_calls
from jaxserve.pallas_kernels.cpu.native_functions import Parameter

MOST_ROWS = 6
"""The most queries computed together on any CPU."""


@dataclasses.dataclass(frozen=True)
class Element:
    """How keys, values, queries and weights are held.

    Attributes:
        name: part of the names of compiled functions.
        stored: dtype of the numbers in pages.
        together: numbers of the axis that a product sums over that lie side by side and are multiplied by one
            instruction: a unit.
        unit: bytes of a unit in pages. Of queries and weights a unit has 4: a pair of bfloat16, or one float32.
        vectors: of 16 numbers of the head dimension, whose weighed sums are computed together.
    """

    name: str
    stored: str
    together: int
    unit: int
    vectors: int = 4

    def of(self, head_dim: int) -> Element:
        """This element with as many vectors together as divide a head dimension."""
        return dataclasses.replace(self, vectors=4 if head_dim % 64 == 0 else 2)

    @property
    def number(self) -> int:
        """Bytes of a number in pages."""
        return self.unit // self.together

    @property
    def max_rows(self) -> int:
        return machine().max_rows

    @property
    def computed(self) -> str:
        """Dtype of queries, weights and results."""
        return "bfloat16" if self.together == 2 else "float32"


PAIRS = Element("bfloat16_pairs", "bfloat16", 2, 4)
"""Pairs of bfloat16, which `vdpbf16ps` multiplies and adds in float32."""

SINGLES = {
    "float32": Element("float32", "float32", 1, 4),
    "bfloat16": Element("bfloat16", "bfloat16", 1, 2),
    "float16": Element("float16", "float16", 1, 2),
}
"""Single numbers by dtype, converted to float32 as they are read."""

# In functions that are compiled for an element: its attributes.
TOGETHER, UNIT, NUMBER = Parameter("together"), Parameter("unit"), Parameter("number")


MAX_ROWS, VECTORS = Parameter("max_rows"), Parameter("vectors")


class Machine(NamedTuple):
    """What the instructions of a CPU allow. fused: it multiplies and adds float32 with one rounding. max_rows: the most
    queries computed together."""

    fused: bool
    max_rows: int


@functools.cache
def machine() -> Machine:
    """This CPU. Sums of six queries with four vectors of 16 float32 each leave room for operands in 32 registers of
    AVX-512; where registers are shorter, those of one query fill them."""
    features = native_calls.features()
    fused = {"avx2", "fma"} <= features or platform.machine() in ("aarch64", "arm64")
    return Machine(fused, MOST_ROWS if "avx512f" in features else 1)


def converts_float16() -> bool:
    """Whether this CPU converts float16; LLVM would call functions that are not there."""
    return "f16c" in native_calls.features() or platform.machine() in ("aarch64", "arm64")
