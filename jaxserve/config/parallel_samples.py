"""Bounds how many samples a request may ask for, as a frozen dataclass that validates itself. Standard library only."""

from __future__ import annotations

import dataclasses

from jaxserve.config.checks import at_least

MAX_SAMPLES = 16_384
"""Samples of one request that any server may allow."""

DEFAULT_MAX_N = 128


@dataclasses.dataclass(frozen=True)
class ParallelSamplesConfig:
    """Bounds the samples of one request (n).

    max_n: at most. Each sample takes a place among the unfinished requests, so max_num_seqs + max_num_waiting bounds
    them too.
    """

    max_n: int = DEFAULT_MAX_N

    def __post_init__(self) -> None:
        at_least("max_n", self.max_n, 1)
        if self.max_n > MAX_SAMPLES:
            raise ValueError(f"max_n is {self.max_n}; it must be at most {MAX_SAMPLES}")
