"""Defines copies of pages within and between the tiers of memory."""

from __future__ import annotations

import dataclasses
import enum


class PageState(enum.Enum):
    """Enumerates the states of a page. ACTIVE and HOST also name the two tiers between which pages are copied."""

    FREE = "free"
    ACTIVE = "active"
    CACHED = "cached"
    HOST = "host"


@dataclasses.dataclass(frozen=True)
class PageCopy:
    """Describes one page to copy before the step. A tier is ACTIVE (a page of the device) or HOST (a page of host
    memory).

    Device and host pages are numbered apart: device page 3 and host page 3 are different pages.
    group: the group of layers whose keys and values the page holds; 0 where all layers are alike.
    """

    source: int
    source_tier: PageState
    destination: int
    destination_tier: PageState
    group: int = 0
