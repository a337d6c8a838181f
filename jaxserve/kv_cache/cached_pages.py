"""Caches pages that lose their last reference, and reclaims them when other sequences need the memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from jaxserve.kv_cache.deferred_runs import DeferredRuns
from jaxserve.kv_cache.device_pages import DevicePages
from jaxserve.kv_cache.host_copies import HostCopies
from jaxserve.kv_cache.page_contents import PageContents
from jaxserve.kv_cache.pool_checks import expect

EVICTION_CAUSES = ("capacity", "flush", "lost")
"""Why pages lose what they kept: another sequence needed the page, `PagePool.forget` was asked for, the device lost
it."""


class CachedPages:
    """Moves device pages between the active, the cached and the free ones.

    evictions: pages that look-ups no longer find, by cause. by_group: cached pages of each group of layers; empty where
    nobody counts them.
    """

    def __init__(self, pages: DevicePages, contents: PageContents, runs: DeferredRuns, host_copies: HostCopies) -> None:
        self._pages = pages
        self._contents = contents
        self._runs = runs
        self._host_copies = host_copies
        self.evictions: dict[str, int] = dict.fromkeys(EVICTION_CAUSES, 0)
        self.by_group: list[int] = []

    def take(self, pages: Sequence[int]) -> None:
        """Adds a reference to each active or cached page, for one sequence more."""
        references, uses, cached = self._pages.references, self._contents.uses, self._pages.cached
        for page in pages:
            if not references[page]:
                cached.remove(page)
                if self.by_group:
                    self._count(page, -1)
            references[page] += 1
            uses[page] += 1

    def drop(self, pages: Sequence[int]) -> None:
        """Drops one reference to each active page of one table, the last one first."""
        references, later = self._pages.references, None
        for page in reversed(pages):
            references[page] -= 1
            later = page if not references[page] and self._keep(page, later) else None

    def reclaim(self, count: int) -> list[int]:
        """Takes so many cached pages from what they keep; returns them, with a reference each.

        Look-ups do not find what they contained any more. It is copied to host memory, where that caches pages.
        """
        pages, keyed = self._pages.cached.pop_several(count)
        self.evictions["capacity"] += count
        references, contents, listed = self._pages.references, self._contents, self._runs.listed
        for page in keyed:
            key = contents.keys[page]
            assert key is not None, f"page {page} is cached without a content key"
            references[page] = 1
            if self.by_group:
                self._count(page, -1)
            del contents.page_of_key[key]
            if listed:
                listed.pop(key, None)  # the pages behind it have been reclaimed
            if self._host_copies.caches:
                self._host_copies.store(page, contents.of(page))
            contents.clear(page)
            if contents.event_log is not None:
                contents.unfindable(key)
        pages += keyed
        return pages

    def forget(self, cause: str) -> int:
        """Forgets what all device pages contain, and frees the cached ones; returns how many there were."""
        count = len(self._pages.cached)
        self.evictions[cause] += len(self._contents.page_of_key) + self._runs.forget()
        self._host_copies.forget(cause)
        self._contents.forget()
        self._pages.free.extend(self._pages.cached)
        self._pages.cached.clear()
        self.by_group = [0] * len(self.by_group)
        return count

    def check_integrity(self) -> None:
        """Raises AssertionError unless the cached pages of each group of layers are counted."""
        if self.by_group:
            counts = Counter(self._contents.groups[page] for page in self._pages.cached)
            wanted = [counts[group] for group in range(len(self.by_group))]
            expect(self.by_group == wanted, f"cached pages by group are {wanted}, not {self.by_group}")

    def _count(self, page: int, change: int) -> None:
        self.by_group[self._contents.groups[page]] += change

    def _keep(self, page: int, later: int | None) -> bool:
        """Caches or frees a page without references; returns whether it is cached. later: the next page of the table,
        if it has just been cached."""
        contents = self._contents
        key = contents.keys[page]
        # `setdefault`: a duplicate takes over when the page found until now has been reclaimed.
        if key is not None and contents.page_of_key.setdefault(key, page) == page:
            self._pages.cached.add(page, contents.depths[page], contents.uses[page], later)
            if self.by_group:
                self._count(page, 1)
            return True
        contents.clear(page)
        self._pages.free.append(page)
        return False
