"""Keeps which pages of the device are free, active and cached."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.kv_cache.eviction import Eviction, LeastRecentlyUsed
from jaxserve.kv_cache.page_copy import PageState
from jaxserve.kv_cache.pool_checks import NULL_PAGE


class DevicePages:
    """Holds the reference counts of pages, the free ones, and the order in which cached ones are reclaimed.

    references: of each page, the number of tables that hold it. A cached page without a content key has one, too: its
    run's (`DeferredRuns`). free: a stack. cached: the order. lru: the same if it is least recently used, else None.
    """

    def __init__(self, num_pages: int, cached: Eviction) -> None:
        self.num_pages = num_pages
        self.references = [0] * num_pages
        self.free = list(range(num_pages - 1, NULL_PAGE, -1))  # low numbers first
        self.cached = cached
        self.lru = cached if isinstance(cached, LeastRecentlyUsed) else None

    def state(self, page: int) -> PageState:
        """Returns the state of a page: FREE, ACTIVE or CACHED."""
        self.check_range(page)
        if page in self.cached:
            return PageState.CACHED
        return PageState.ACTIVE if self.references[page] else PageState.FREE

    def check_range(self, page: int) -> None:
        """Raises ValueError where a page does not exist."""
        if not NULL_PAGE < page < self.num_pages:
            raise ValueError(f"page {page} does not exist; pages are numbered from 1 to {self.num_pages - 1}")

    def check_active(self, pages: Sequence[int]) -> None:
        """Raises ValueError where a page is not active, or is named twice."""
        check_distinct(pages)
        references, end = self.references, self.num_pages
        for page in pages:
            if not NULL_PAGE < page < end or not references[page]:
                self.check_range(page)
                raise ValueError(f"page {page} is {self.state(page).value}; it must be active")


def check_distinct(pages: Sequence[int]) -> None:
    """Raises ValueError where a page is named twice."""
    if len(set(pages)) != len(pages):
        raise ValueError(f"pages {list(pages)} name a page twice; a table holds each page once")
