"""Holds log-probabilities of consecutive tokens as columns, from the device to whoever shows them. numpy only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class LogprobColumns:
    """Holds the log-probabilities of N tokens, and of the K likeliest ones at each of their positions.

    packed: int32 [N, 2 + 2 K], as `programs.logprobs` packs it: a token's value (float32 bits), its rank (1 is the
    likeliest), the K likeliest ids, largest value first, and their values (float32 bits).
    """

    packed: np.ndarray

    def __len__(self) -> int:
        return len(self.packed)

    @property
    def width(self) -> int:
        """Returns K."""
        return (self.packed.shape[1] - 2) // 2

    @property
    def values(self) -> np.ndarray:
        """Returns float32 [N], of the tokens."""
        return self.packed[:, 0].view(np.float32)

    @property
    def ranks(self) -> np.ndarray:
        """Returns int32 [N], of the tokens."""
        return self.packed[:, 1]

    @property
    def top_ids(self) -> np.ndarray:
        """Returns int32 [N, K]."""
        return self.packed[:, 2 : 2 + self.width]

    @property
    def top_values(self) -> np.ndarray:
        """Returns float32 [N, K]."""
        return self.packed[:, 2 + self.width :].view(np.float32)

    def part(self, begin: int, end: int) -> LogprobColumns:
        """Returns tokens `begin` to `end` - 1."""
        return LogprobColumns(self.packed[begin:end])

    def rows(self, places: np.ndarray) -> LogprobColumns:
        """Returns the tokens at some places, an int or bool array."""
        return LogprobColumns(self.packed[places])

    def narrowed(self, width: int) -> LogprobColumns:
        """Returns the tokens with the first `width` of the likeliest ids, all where there are no more."""
        if width >= self.width:
            return self
        top = slice(2, 2 + width), slice(2 + self.width, 2 + self.width + width)
        return LogprobColumns(np.concatenate([self.packed[:, :2], *(self.packed[:, place] for place in top)], axis=1))

    def to_bytes(self) -> bytes:
        """Returns the bytes that `from_bytes` reads back."""
        return self.packed.tobytes()

    @classmethod
    def from_bytes(cls, width: int, data: bytes) -> LogprobColumns:
        """Reads tokens with `width` likeliest ids each. Raises ValueError for bytes that are no whole rows."""
        return cls(np.frombuffer(data, np.int32).reshape(-1, 2 + 2 * width))

    @classmethod
    def unknown(cls, count: int, width: int) -> LogprobColumns:
        """Returns tokens about which nothing is known: their values are not numbers."""
        columns = cls(np.zeros((count, 2 + 2 * width), np.int32))
        columns.values[:] = np.nan
        return columns

    @classmethod
    def joined(cls, parts: Sequence[LogprobColumns]) -> LogprobColumns:
        """Joins tokens of one width, in order; there must be a part."""
        return parts[0] if len(parts) == 1 else cls(np.concatenate([part.packed for part in parts]))

    @classmethod
    def of(cls, rows: Sequence[tuple[float, int, Sequence[tuple[int, float]]]]) -> LogprobColumns:
        """Builds the columns from tokens given as (value, rank, the likeliest as pairs of id and value)."""
        packed = np.zeros((len(rows), 2 + 2 * (len(rows[0][2]) if rows else 0)), np.int32)
        columns = cls(packed)
        for place, (value, rank, top) in enumerate(rows):
            columns.values[place], columns.ranks[place] = value, rank
            for index, (token_id, top_value) in enumerate(top):
                columns.top_ids[place, index], columns.top_values[place, index] = token_id, top_value
        return columns
