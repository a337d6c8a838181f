"""The shapes that are measured through other libraries too. Standard library only.

The names are those of the cases in the parts `decode` and `prefill`, so that figures can be set side by side.
"""

from __future__ import annotations

import dataclasses

from benchmarks.gpu.counts import Heads, attention_bytes, attention_flops
from benchmarks.gpu.record import Settings


@dataclasses.dataclass(frozen=True)
class Shape:
    """kind "decode": `batch` rows of one token that see `context` positions; "prefill": `batch` prompts of `new`."""

    kind: str
    batch: int
    context: int
    new: int
    page_size: int = 64

    @property
    def label(self) -> str:
        if self.kind == "decode":
            return f"batch {self.batch} context {self.context} page {self.page_size}"
        return f"{self.batch} x {self.new}"

    @property
    def rows(self) -> list[tuple[int, int]]:
        """(new tokens, length) of each row."""
        return [(self.new, self.context)] * self.batch

    def fields(self, peer: str) -> dict[str, object]:
        """What a case says of itself."""
        return {"peer": peer, **dataclasses.asdict(self)}

    def rates(self, heads: Heads, seconds: float, copy: float | None, product: float | None) -> dict[str, object]:
        """Bytes a second of a decode, operations a second of a prefill, each with its share of the ceiling."""
        if self.kind == "decode":
            rate = attention_bytes(heads, self.rows, 2, 2) / seconds
            return {"gb_per_s": rate / 1e9, "share": rate / copy if copy else None}
        rate = attention_flops(heads, self.rows) / seconds
        return {"tflop_per_s": rate / 1e12, "share": rate / product if product else None}


def decode_shapes(settings: Settings) -> list[Shape]:
    """Some of the grid of the part `decode`."""
    if not settings.gpu:
        return [Shape("decode", 4, 64, 1, 16)]
    chosen = [(64, 2048), (1, 8192), (64, 8192), (256, 2048), (8, 32768), (1, 512)]
    return [Shape("decode", batch, context, 1) for batch, context in chosen]


def prefill_shapes(settings: Settings) -> list[Shape]:
    """Some of the lengths of the part `prefill`."""
    if not settings.gpu:
        return [Shape("prefill", 1, 40, 40)]
    chosen = [(1, 8192), (4, 2048), (16, 512), (1, 32768)]
    return [Shape("prefill", batch, new, new) for batch, new in chosen]
