"""Holds the measured costs of bringing a preempted sequence, or a cached page, back."""

from __future__ import annotations

import dataclasses

from jaxserve.config.checks import between
from jaxserve.config.scheduling import PreemptionConfig


@dataclasses.dataclass(frozen=True)
class PreemptionCosts:
    """Holds the costs of recomputation and swapping.

    recompute_seconds_per_token: of a prefill in the largest bucket. swap_seconds_per_page: a page out and in.
    fetch_seconds_per_page: of these, in; None where only both were measured.
    """

    recompute_seconds_per_token: float
    swap_seconds_per_page: float
    fetch_seconds_per_page: float | None = None

    def __post_init__(self) -> None:
        between("recompute_seconds_per_token", self.recompute_seconds_per_token, 0.0)
        between("swap_seconds_per_page", self.swap_seconds_per_page, 0.0)
        if self.fetch_seconds_per_page is not None:
            between("fetch_seconds_per_page", self.fetch_seconds_per_page, 0.0)

    @property
    def fetch_seconds(self) -> float:
        """Returns the seconds of a page from host memory to the device; half of a swap where they are not known."""
        if self.fetch_seconds_per_page is None:
            return self.swap_seconds_per_page / 2
        return self.fetch_seconds_per_page


def configured_costs(config: PreemptionConfig, measured: PreemptionCosts | None) -> PreemptionCosts | None:
    """Returns the costs with those of the configuration in place of measured ones; None where one is in neither."""
    per_token, per_page = config.recompute_seconds_per_token, config.swap_seconds_per_page
    if measured is None:
        return None if per_token is None or per_page is None else PreemptionCosts(per_token, per_page)
    return PreemptionCosts(
        measured.recompute_seconds_per_token if per_token is None else per_token,
        measured.swap_seconds_per_page if per_page is None else per_page,
        measured.fetch_seconds_per_page if per_page is None else None,
    )
