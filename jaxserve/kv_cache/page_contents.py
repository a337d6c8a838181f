"""Knows what the pages of the device contain, by content key."""

from __future__ import annotations

from jaxserve.kv_cache.event_log import CacheEventLog
from jaxserve.kv_cache.host_pool import HeldPage, HostPool


class PageContents:
    """Maps committed pages to their content keys, and keys to the page that a look-up finds.

    Two pages can have the same content; `page_of_key` names the one that is found. The other keeps its key: it takes
    over when that one is reclaimed.

    keys: of each page, or None. depths, uses, groups: of each committed page, the number of pages before it in its
    sequence, the sequences that had it, and its group of layers. event_log: is told of content that can no longer be
    found; None where nobody follows it.
    """

    def __init__(self, num_pages: int, host: HostPool) -> None:
        """Creates the record of pages without content. host: of which it is asked what host memory still has."""
        self._host = host
        self.keys: list[bytes | None] = [None] * num_pages
        self.page_of_key: dict[bytes, int] = {}
        self.depths = [0] * num_pages
        self.uses = [0] * num_pages
        self.groups = [0] * num_pages
        self.event_log: CacheEventLog | None = None

    def assign(self, page: int, key: bytes, depth: int, group: int = 0) -> bool:
        """Records the content of a page of one sequence; returns whether it is the one that is found."""
        self.keys[page], self.depths[page], self.uses[page], self.groups[page] = key, depth, 1, group
        return self.page_of_key.setdefault(key, page) == page

    def clear(self, page: int) -> None:
        """Forgets what a page contained that is not found."""
        self.keys[page] = None
        self.uses[page] = 0

    def of(self, page: int) -> HeldPage:
        """Describes the content of a page."""
        return HeldPage(self.keys[page], self.groups[page], self.depths[page])

    def forget(self) -> None:
        """Forgets what all pages contain, and records that it can no longer be found unless host memory has it."""
        known = list(self.page_of_key) if self.event_log is not None and self._host.num_cached else ()
        self.keys = [None] * len(self.keys)
        self.page_of_key.clear()
        self.uses = [0] * len(self.uses)
        if self.event_log is not None and not self._host.num_cached:
            self.event_log.cleared()
        for key in known:
            self.unfindable(key)

    def unfindable(self, key: bytes) -> None:
        """Records that a page was lost, unless it is found on the device or cached on the host."""
        if self.event_log is not None and key not in self.page_of_key and key not in self._host:
            self.event_log.removed(key)
