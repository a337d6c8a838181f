"""The fixed shapes that steps are padded to."""

from __future__ import annotations

import bisect
import dataclasses
from typing import TYPE_CHECKING

from jaxserve.config.scheduling import MIN_BUCKET

if TYPE_CHECKING:
    from jaxserve.config.settings import EngineConfig


@dataclasses.dataclass(frozen=True)
class Buckets:
    """tokens: sizes of the forward program; rows: sizes of the sample program; both rising."""

    tokens: tuple[int, ...]
    rows: tuple[int, ...]

    @classmethod
    def from_config(cls, config: EngineConfig, platform: str, tokens_per_step: int = 1) -> Buckets:
        """The configured sizes, or those that suit a platform ("cpu", "gpu", ...).

        A CPU's step costs what its rows cost, so sizes lie closer there; a GPU's costs what the weights cost, and
        every size is a program more to compile. tokens_per_step: that a row which decodes may have, and sample from.
        """
        sizes = close if platform == "cpu" else powers
        return cls(
            tokens=config.token_buckets or sizes(config.scheduler.max_num_batched_tokens),
            rows=config.row_buckets or sizes(config.scheduler.max_num_seqs * tokens_per_step),
        )

    def token_bucket(self, count: int) -> int:
        """The smallest token bucket that holds `count` tokens."""
        return self.tokens[bisect.bisect_left(self.tokens, count)]

    def largest_within(self, count: int) -> int:
        """The largest token bucket of at most `count` tokens; 0 where none is so small."""
        place = bisect.bisect_right(self.tokens, count)
        return self.tokens[place - 1] if place else 0

    def row_bucket(self, count: int) -> int:
        """The smallest row bucket that holds `count` rows; 0 for none."""
        return self.rows[bisect.bisect_left(self.rows, count)] if count else 0

    @property
    def decode_tokens(self) -> tuple[int, ...]:
        """Token buckets that a step of one token a row can need."""
        return tuple(size for size in self.tokens if size <= self.token_bucket(self.rows[-1]))

    def rows_of(self, token_bucket: int) -> int:
        """Rows that a forward program of `token_bucket` tokens has room for: every row has a token."""
        return min(token_bucket, self.rows[-1])


def powers(limit: int) -> tuple[int, ...]:
    """Powers of two from MIN_BUCKET, ended by `limit` itself (at least MIN_BUCKET)."""
    sizes = []
    size = MIN_BUCKET
    while size < limit:
        sizes.append(size)
        size *= 2
    return (*sizes, max(limit, MIN_BUCKET))


def close(limit: int) -> tuple[int, ...]:
    """`powers`, and halfway between two of them where that is a multiple of MIN_BUCKET."""
    sizes = powers(limit)
    between = (low + low // 2 for low in sizes if low >= 2 * MIN_BUCKET and low + low // 2 < limit)
    return tuple(sorted({*sizes, *between}))
