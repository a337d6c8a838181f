"""Adds up the pooled hidden states of a prompt over its chunks."""

from __future__ import annotations

import numpy as np

from jaxserve.request import Pooling
from jaxserve.scheduler.plan import PooledTokens, RowPlan


def pooled_tokens(kind: Pooling, start: int, count: int, last: bool) -> PooledTokens | None:
    """Returns which tokens of a chunk are pooled; None where that is none and the prompt goes on.

    Args:
        kind: the kind of pooling.
        start: tokens of the prompt before the chunk.
        count: tokens of the chunk.
        last: the prompt ends with the chunk.
    """
    match kind:
        case Pooling.MEAN:
            return PooledTokens(0, count, last)
        case Pooling.CLS if not start:
            return PooledTokens(0, 1, last)
        case Pooling.LAST if last:
            return PooledTokens(count - 1, 1, last)
    return PooledTokens(0, 0, last) if last else None


class PooledSum:
    """Holds the sum over the tokens of one prompt that are computed so far.

    A prompt that was preempted is computed again from its first token, which begins a new sum. What a step in flight
    then still brings belongs to the old one: it is added there as long as it continues it.
    """

    def __init__(self, kind: Pooling):
        self._kind = kind
        self._sum: np.ndarray | None = None
        self._end = 0

    def add(self, row: RowPlan, values: np.ndarray) -> None:
        """Adds the sum of the pooled tokens of a chunk, float64 [hidden size]."""
        if not row.start:
            self._sum = values
        elif self._kind is Pooling.MEAN and row.start != self._end:
            return  # of the sum before
        else:
            self._sum = values if self._sum is None else self._sum + values
        self._end = row.start + row.num_tokens

    def vector(self, num_tokens: int) -> np.ndarray:
        """Returns the pooled hidden state of a prompt of so many tokens, all computed: float64 [hidden size]."""
        assert self._sum is not None
        assert self._end == num_tokens, f"{self._end} of {num_tokens} tokens are pooled"
        return self._sum / num_tokens if self._kind is Pooling.MEAN else self._sum
