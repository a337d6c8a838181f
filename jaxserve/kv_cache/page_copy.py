"""Defines copies of pages within and between the tiers of memory."""

from __future__ import annotations

import dataclasses
import enum


class PageState(enum.Enum):
    """Enumerates the states of a page. ACTIVE, HOST and DISK also name the tiers between which pages are copied."""

    FREE = "free"
    ACTIVE = "active"
    CACHED = "cached"
    HOST = "host"
    DISK = "disk"


@dataclasses.dataclass(frozen=True)
class PageCopy:
    """Describes one page to copy before the step. A tier is ACTIVE (a page of the device), HOST (a page of host memory)
    or DISK (a page in the directory of the cache).

    Device and host pages are numbered apart: device page 3 and host page 3 are different pages. On disk a page has no
    number but its key; where it comes from there, `source` is the number of the read, which ends later.
    group: the group of layers whose keys and values the page holds; 0 where all layers are alike. key: content key of a
    page that is copied to or from disk.
    """

    source: int
    source_tier: PageState
    destination: int
    destination_tier: PageState
    group: int = 0
    key: bytes = b""
