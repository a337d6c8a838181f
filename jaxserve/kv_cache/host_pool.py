"""Manages pages of host memory: which are free, which hold what a swapped sequence needs, and which are cached.

    FREE   -> HELD     hold: a sequence is swapped out
    HELD   -> FREE     release: it is back, or has ended
    FREE   -> CACHED   store: a cached page of the device has lost its place there
    CACHED -> HELD     take: its content goes back to the device
    CACHED -> FREE     forget, lost; reclaimed for a swapped sequence, or for another cached page
    FREE   -> LOADING  load: its content is read from disk
    LOADING -> CACHED  loaded; or FREE, where it could not be read

What is on disk is known by content key (`on_disk`); it may turn out to be gone when it is read.

Swapped sequences come first: a cached page, the one stored or looked up longest ago, is given up for them. Every call
takes time proportional to the pages it is given, except `forget` and `check_integrity`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxserve.kv_cache.pool_checks import count_references, expect

HOST_EVICTION_CAUSES = ("capacity", "swap", "flush", "lost")
"""Why cached pages leave host memory otherwise than to the device: for another cached page, for a swapped sequence,
because `forget` was asked for, because their copy from the device did not take place."""


class HeldPage(NamedTuple):
    """Describes the content of a host page: its content key, None where it has none, its group of layers, and the
    number of pages before it in its sequence."""

    key: bytes | None
    group: int = 0
    depth: int = 0


class Reclaimed(NamedTuple):
    """Describes what was cached in a host page that got another use."""

    page: int
    content: HeldPage


class HostPool:
    """Keeps the pages of host memory, numbered from 0; there is no null page.

    num_pages: of them. caches: evicted pages of the device are kept here. on_disk: content keys of pages that can be
    read from disk, where cached pages are written when they are reclaimed; None where there is no disk.

    Misuse (a page that is not held, or twice in one call) is a ValueError, raised before anything changes.
    """

    def __init__(self, num_pages: int, *, caches: bool = False):
        if num_pages < 0:
            raise ValueError(f"num_host_pages is {num_pages}; it must be at least 0")
        self.num_pages = num_pages
        self.caches = caches and num_pages > 0
        self._free = list(range(num_pages - 1, -1, -1))  # a stack: low numbers first
        self._held: dict[int, HeldPage] = {}
        self._cached: OrderedDict[int, HeldPage] = OrderedDict()  # least recently used first
        self._page_of_key: dict[bytes, int] = {}  # of the cached ones
        self._loads: dict[int, tuple[int, HeldPage]] = {}  # by number of the read
        self._load_of_key: dict[bytes, int] = {}
        self._num_loads = 0
        self.on_disk: set[bytes] | None = None
        self.num_stored = 0
        self.evictions: dict[str, int] = dict.fromkeys(HOST_EVICTION_CAUSES, 0)

    def __contains__(self, key: bytes) -> bool:
        """Tells whether the page of a content key is cached."""
        return key in self._page_of_key

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        """Returns the number of pages that swapped sequences hold."""
        return len(self._held)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_loading(self) -> int:
        """Returns the number of pages that are being read from disk."""
        return len(self._loads)

    def hold(self, contents: Sequence[HeldPage]) -> tuple[list[int], list[Reclaimed]] | None:
        """Takes pages for what a swapped sequence holds, cached ones where too few are free.

        Returns:
            The pages, and what was cached in them; None, and nothing changes, when there are too few.
        """
        if len(contents) > len(self._free) + len(self._cached):
            return None
        evicted = []
        while len(self._free) < len(contents):
            evicted.append(self._evict("swap"))
        pages = [self._free.pop() for _ in contents]
        self._held.update(zip(pages, contents, strict=True))
        return pages, evicted

    def content(self, page: int) -> HeldPage:
        """Returns what a held page contains."""
        return self._held[page]

    def release(self, pages: Sequence[int]) -> None:
        """Frees held pages."""
        self.check_held(pages)
        for page in reversed(pages):
            del self._held[page]
            self._free.append(page)

    def page_of(self, key: bytes) -> int | None:
        """Returns the cached page of a content key, or None."""
        return self._page_of_key.get(key)

    def store(self, content: HeldPage) -> tuple[int | None, Reclaimed | None]:
        """Caches what an evicted page of the device contains, which has a content key.

        Returns:
            The page to copy it to, and what was cached there; neither where it is cached already, or no page can be
            had.
        """
        key = content.key
        assert key is not None
        page = self._page_of_key.get(key)
        if page is not None:
            self._cached.move_to_end(page)
            return None, None
        evicted = None
        if not self._free:
            if not self._cached:
                return None, None
            evicted = self._evict("capacity")
        page = self._free.pop()
        self._cached[page] = content
        self._page_of_key[key] = page
        self.num_stored += 1
        return page, evicted

    def take(self, pages: Sequence[int]) -> None:
        """Makes cached pages held ones, whose content goes back to the device: `release` them when the copies are
        decided."""
        for page in pages:
            if page not in self._cached:
                raise ValueError(f"host page {page} is not cached; {len(self._cached)} of {self.num_pages} are")
        for page in pages:
            content = self._cached.pop(page)
            assert content.key is not None
            del self._page_of_key[content.key]
            self._held[page] = content

    def forget(self) -> None:
        """Frees all cached pages, and drops the content keys of those that are held."""
        self.evictions["flush"] += len(self._cached)
        self._free.extend(self._cached)
        self._cached.clear()
        self._page_of_key.clear()
        self.abandon_loads()
        if self.on_disk is not None:
            self.on_disk.clear()
        self._held = {page: content._replace(key=None) for page, content in self._held.items()}

    def load(self, content: HeldPage) -> tuple[int, int | None, Reclaimed | None]:
        """Takes a page for content that is on disk, unless it is being read already.

        Returns:
            The number of the read; and where it is a new one, the page to read to and what was cached there. The number
            is -1 where no page can be had.
        """
        key = content.key
        assert key is not None
        if key in self._load_of_key:
            return self._load_of_key[key], None, None
        reclaimed = None
        if not self._free:
            if not self._cached:
                return -1, None, None
            reclaimed = self._evict("capacity")
        page, self._num_loads = self._free.pop(), self._num_loads + 1
        self._loads[self._num_loads] = page, content
        self._load_of_key[key] = self._num_loads
        return self._num_loads, page, reclaimed

    def loaded(self, number: int, *, found: bool) -> int | None:
        """Ends a read. Returns the page, which is cached now; None where it was not found on disk, or is not wanted any
        more, or has been computed and stored meanwhile."""
        page, content = self._loads.pop(number, (None, None))
        if page is None or content is None or content.key is None:
            return None
        del self._load_of_key[content.key]
        if not found or content.key in self._page_of_key:
            self._free.append(page)
            if not found and self.on_disk is not None:
                self.on_disk.discard(content.key)
            return None
        self._cached[page] = content
        self._page_of_key[content.key] = page
        return page

    def reclaim_all(self) -> list[Reclaimed]:
        """Frees all cached pages, the one used longest ago first; returns what was cached."""
        return [self._evict("capacity") for _ in range(len(self._cached))]

    def abandon_loads(self) -> None:
        """Frees the pages that are being read from disk; `loaded` will find that nobody wants them."""
        self._free.extend(page for page, _ in self._loads.values())
        self._loads.clear()
        self._load_of_key.clear()

    def lost(self, pages: Iterable[int]) -> list[bytes]:
        """Frees the cached ones among pages whose copies did not take place; returns the keys that were cached."""
        keys = []
        for page in pages:
            content = self._cached.pop(page, None)
            if content is not None:
                assert content.key is not None
                del self._page_of_key[content.key]
                self._free.append(page)
                self.evictions["lost"] += 1
                keys.append(content.key)
        return keys

    def check_held(self, pages: Sequence[int]) -> None:
        """Raises ValueError where a page is not held, or is named twice."""
        if len(set(pages)) != len(pages):
            raise ValueError(f"pages {list(pages)} name a page twice; a table holds each page once")
        for page in pages:
            if page not in self._held:
                raise ValueError(f"host page {page} is not in use; {len(self._held)} of {self.num_pages} are")

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises AssertionError unless every page is free, cached, or in one of the tables of swapped sequences.

        Takes time in the number of pages.
        """
        counted = count_references(tables, "host table")
        free, loading = Counter(self._free), Counter(page for page, _ in self._loads.values())
        for page in range(self.num_pages):
            held = int(page in self._held)
            expect(counted[page] == held, f"host page {page} is in {counted[page]} tables, but has {held} owners")
            places = held + free[page] + (page in self._cached) + loading[page]
            expect(places == 1, f"host page {page} is {places} times used, free or cached, not 1")
        beyond = sorted(page for page in counted if not 0 <= page < self.num_pages)
        expect(not beyond, f"host pages {beyond} are in tables, but there are {self.num_pages} host pages")
        keys = {content.key: page for page, content in self._cached.items()}
        expect(keys == self._page_of_key, "cached host pages are not those that their keys find")
        loads = {content.key: number for number, (_, content) in self._loads.items()}
        expect(loads == self._load_of_key, "host pages that are read from disk are not those that their keys find")
        total = len(self._free) + len(self._held) + len(self._cached) + len(self._loads)
        expect(total == self.num_pages, f"free + used + cached host pages are {total}, not {self.num_pages}")

    def _evict(self, cause: str) -> Reclaimed:
        """Frees the page used longest ago; returns what was cached in it."""
        page, content = self._cached.popitem(last=False)
        assert content.key is not None
        del self._page_of_key[content.key]
        self._free.append(page)
        self.evictions[cause] += 1
        return Reclaimed(page, content)
