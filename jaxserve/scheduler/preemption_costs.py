"""Holds the measured costs of bringing a preempted sequence back."""

from __future__ import annotations

import dataclasses

from jaxserve.config.checks import between


@dataclasses.dataclass(frozen=True)
class PreemptionCosts:
    """Holds the costs of recomputation and swapping.

    recompute_seconds_per_token: of a prefill in the largest bucket. swap_seconds_per_page: a page out and in.
    """

    recompute_seconds_per_token: float
    swap_seconds_per_page: float

    def __post_init__(self) -> None:
        between("recompute_seconds_per_token", self.recompute_seconds_per_token, 0.0)
        between("swap_seconds_per_page", self.swap_seconds_per_page, 0.0)
