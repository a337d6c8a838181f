"""Defines the fixed shapes that steps are padded to."""

from __future__ import annotations

import bisect
import dataclasses
from typing import TYPE_CHECKING

from jaxserve.config.scheduling import MIN_BUCKET

if TYPE_CHECKING:
    from jaxserve.config.settings import EngineConfig


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Holds the bucket sizes, in ascending order.

    tokens: sizes of the forward program. rows: sizes of the sample program.
    """

    tokens: tuple[int, ...]
    rows: tuple[int, ...]

    @classmethod
    def from_config(cls, config: EngineConfig, platform: str, tokens_per_step: int = 1) -> Buckets:
        """Returns the configured sizes, or defaults for the platform.

        A CPU's step costs in proportion to its rows, so sizes are closer there; a GPU's step is dominated by reading
        the weights, and every size is one more program to compile.

        Args:
            config: the engine's settings.
            platform: "cpu", "gpu", ...
            tokens_per_step: maximum tokens of a decoding row, each of which it may sample from.
        """
        sizes = close if platform == "cpu" else powers
        return cls(
            tokens=config.token_buckets or sizes(config.scheduler.max_num_batched_tokens),
            rows=config.row_buckets or sizes(config.scheduler.max_num_seqs * tokens_per_step),
        )

    def token_bucket(self, count: int) -> int:
        """Returns the smallest token bucket that holds `count` tokens."""
        return self.tokens[bisect.bisect_left(self.tokens, count)]

    def largest_within(self, count: int) -> int:
        """Returns the largest token bucket of at most `count` tokens; 0 when none is that small."""
        place = bisect.bisect_right(self.tokens, count)
        return self.tokens[place - 1] if place else 0

    def row_bucket(self, count: int) -> int:
        """Returns the smallest row bucket that holds `count` rows; 0 for none."""
        return self.rows[bisect.bisect_left(self.rows, count)] if count else 0

    @property
    def decode_tokens(self) -> tuple[int, ...]:
        """Returns the token buckets that a step of one token a row can need."""
        return tuple(size for size in self.tokens if size <= self.token_bucket(self.rows[-1]))

    def rows_of(self, token_bucket: int) -> int:
        """Returns the number of rows that a forward program of `token_bucket` tokens has room for: every row has a
        token."""
        return min(token_bucket, self.rows[-1])


def powers(limit: int) -> tuple[int, ...]:
    """Returns the powers of two from MIN_BUCKET, ended by `limit` itself (at least MIN_BUCKET)."""
    sizes = []
    size = MIN_BUCKET
    while size < limit:
        sizes.append(size)
        size *= 2
    return (*sizes, max(limit, MIN_BUCKET))


def close(limit: int) -> tuple[int, ...]:
    """Returns `powers` and the midpoints between them that are multiples of MIN_BUCKET."""
    sizes = powers(limit)
    between = (low + low // 2 for low in sizes if low >= 2 * MIN_BUCKET and low + low // 2 < limit)
    return tuple(sorted({*sizes, *between}))
