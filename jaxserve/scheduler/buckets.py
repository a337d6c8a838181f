"""The fixed shapes that steps are padded to."""

from __future__ import annotations

import bisect
import dataclasses

from jaxserve.config import MIN_BUCKET, EngineConfig


@dataclasses.dataclass(frozen=True)
class Buckets:
    """tokens: sizes of the forward program; rows: sizes of the sample program; both rising."""

    tokens: tuple[int, ...]
    rows: tuple[int, ...]

    @classmethod
    def from_config(cls, config: EngineConfig) -> Buckets:
        return cls(
            tokens=config.token_buckets or powers(config.scheduler.max_num_batched_tokens),
            rows=config.row_buckets or powers(config.scheduler.max_num_seqs),
        )

    def token_bucket(self, count: int) -> int:
        """The smallest token bucket that holds `count` tokens."""
        return self.tokens[bisect.bisect_left(self.tokens, count)]

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
