"""Manages the host side of the paged KV cache: reference counts, content keys and eviction of pages.

The pool hands out page numbers; the arrays behind them belong to the runner. It alone changes a page's state:

    FREE    -> ACTIVE   allocate
    ACTIVE  -> FREE     release of the last reference, content without a key
    ACTIVE  -> CACHED   release of the last reference, content with a key: kept, and reclaimable
    CACHED  -> ACTIVE   share
    CACHED  -> ACTIVE   allocate, when no page is free: the one that `Eviction` selects loses its content
    CACHED  -> FREE     forget
    ACTIVE <-> HOST     move: swap out and in

Where host memory keeps cached pages, too (`HostPool.caches`), a page that is reclaimed is copied there, and `fetch`
brings it back.

`copy`, `move`, `fetch` and reclaiming only decide; the `PageCopy` records are for the runner, which performs them
before the step, in the order in which they were decided: a page may be the source of one and the destination of a later
one. Those of `copy`, `move` and `fetch` are returned; `take_copies` returns those of pages reclaimed before, which come
first.

Every call takes time proportional to the pages it is given, not to the size of the pool, except `check_integrity`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from jaxserve.kv_cache.deferred_keys import DeferredRun
from jaxserve.kv_cache.event_log import CacheEventLog
from jaxserve.kv_cache.eviction import Eviction, LeastRecentlyUsed
from jaxserve.kv_cache.host_pool import HeldPage, HostPool, Reclaimed
from jaxserve.kv_cache.page_copy import PageCopy, PageState
from jaxserve.kv_cache.pool_checks import NULL_PAGE, check_pages, check_runs, expect

EVICTION_CAUSES = ("capacity", "flush", "lost")
"""Why pages lose what they kept: another sequence needed the page, `forget` was asked for, the device lost it."""


class PagePool:
    """Keeps the reference counts, content keys, and free and cached pages of one KV cache.

    num_pages: pages of the device, the null page included. page_size: tokens per page.
    num_host_pages: pages of host memory, numbered from 0 (there is no null page). eviction: an empty order of cached
    pages; None for least recently used. caches_on_host: cached pages move to host memory when they are reclaimed, as
    far as swapped sequences leave room.

    Misuse (a page that is not held, twice in one call, out of range) is a ValueError, raised before anything changes.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_host_pages: int = 0,
        eviction: Eviction | None = None,
        *,
        caches_on_host: bool = False,
    ) -> None:
        for name, value, low in (("num_pages", num_pages, 2), ("page_size", page_size, 1)):
            if value < low:
                raise ValueError(f"{name} is {value}; it must be at least {low}")
        self.num_pages = num_pages
        self.page_size = page_size
        self.host = HostPool(num_host_pages, caches=caches_on_host)
        self._references = [0] * num_pages
        # The key of a committed page's content. Two pages can have the same content; `_page_of_key` names the one
        # that `find` returns. The other keeps its key: it takes over when that one is reclaimed.
        self._keys: list[bytes | None] = [None] * num_pages
        self._page_of_key: dict[bytes, int] = {}
        self._deferred: dict[bytes, DeferredRun] = {}  # by the key of the page in front of the run
        self._free = list(range(num_pages - 1, NULL_PAGE, -1))  # a stack: low numbers first
        self._cached: Eviction = LeastRecentlyUsed() if eviction is None else eviction
        self._lru = self._cached if isinstance(self._cached, LeastRecentlyUsed) else None
        self._depths = [0] * num_pages  # of a committed page: pages before it in its sequence
        self._uses = [0] * num_pages  # of a committed page: sequences that had it
        self._groups = [0] * num_pages  # of a committed page: the group of layers
        self._copies: list[PageCopy] = []  # of reclaimed pages to host memory
        self._parted_copies = 0  # of them in this step
        self.most_copies: int | None = None  # of reclaimed pages in a step; None for any number
        self.evictions: dict[str, int] = dict.fromkeys(
            EVICTION_CAUSES, 0
        )  # pages that `find` no longer returns, by cause
        self.event_log: CacheEventLog | None = None  # is told of these pages
        self.cached_by_group: list[int] = []  # cached pages of each group of layers; empty where nobody counts them

    @property
    def num_usable(self) -> int:
        """Returns the number of device pages that can be allocated at all: free + used + cached."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_used(self) -> int:
        """Returns the number of device pages with at least one reference."""
        return self.num_usable - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Returns the number of device pages that `allocate` can return now."""
        return len(self._free) + len(self._cached)

    @property
    def num_host_pages(self) -> int:
        return self.host.num_pages

    @property
    def num_host_free(self) -> int:
        """Returns the number of host pages that a swapped sequence can have now."""
        return self.host.num_free + self.host.num_cached

    @property
    def num_host_used(self) -> int:
        """Returns the number of host pages that swapped sequences hold."""
        return self.host.num_held

    def state(self, page: int) -> PageState:
        """Returns the state of a device page: FREE, ACTIVE or CACHED."""
        self._check_range(page)
        if page in self._cached:
            return PageState.CACHED
        return PageState.ACTIVE if self._references[page] else PageState.FREE

    def references(self, page: int) -> int:
        """Returns the number of page tables that hold a device page."""
        self._check_range(page)
        return self._references[page]

    def writable(self, page: int) -> bool:
        """Tells whether the only owner of an active page may write it; if not, `copy` it first.

        A committed page is full, and other sequences may share it at any time, so it is never written again.
        """
        self._check_active((page,))
        return self._references[page] == 1 and self._keys[page] is None

    def allocate(self, count: int) -> list[int] | None:
        """Allocates `count` private pages with one reference each and undefined content; returns None, and changes
        nothing, when fewer are available.

        Takes free pages first, then cached ones, in the order of eviction.
        """
        if count < 0:
            raise ValueError(f"count is {count}; it must be at least 0")
        free, references = self._free, self._references
        if count > len(free) and count > len(free) + len(self._cached):
            return None
        pages = free[: -1 - count : -1]
        del free[len(free) - len(pages) :]
        for page in pages:
            references[page] = 1
        if len(pages) < count:
            pages += self._reclaim(count - len(pages))
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Adds one reference to each active or cached page, for the table of another sequence."""
        self._check_distinct(pages)
        for page in pages:
            self._check_range(page)
            if not self._references[page] and self._keys[page] is None:
                raise ValueError(f"page {page} is free; only active and cached pages can be shared")
        for page in pages:
            self._take(page)
            self._uses[page] += 1

    def release(self, pages: Sequence[int], run: DeferredRun | None = None) -> None:
        """Drops one reference to each active page of one table, given in table order.

        A page without references keeps its content as CACHED if `find` returns it, else it becomes FREE. Of one
        table the later pages are reclaimed first: without the earlier ones no `find` would reach them.

        run: of the pages in the table, those without keys; `pages` are then all pages of the table.
        """
        self._check_active(pages)
        if run is not None and run.pages and self.defers(run):
            self._drop(pages[run.first + len(run.pages) :])
            assert self._lru is not None
            self._lru.add_run(run)
            run.cached = True
            pages = pages[: run.first]
        self._drop(pages)

    def commit(self, pages: Sequence[int], keys: Sequence[bytes], first: int = 0, group: int = 0) -> None:
        """Assigns its content key to each of several active pages, whose content is computed by what is dispatched.

        pages: full pages, of one table, one after the other. keys: of their content (`ContentKeys`), in the same order.
        first: index in the table of the first of them. group: of layers.

        Where another page has the same content already, `find` keeps returning that one. Raises ValueError, and changes
        nothing, when a page holds other content already or is not active.
        """
        self._check_active(pages)
        if len(pages) != len(keys):
            raise ValueError(f"pages has {len(pages)} pages and keys {len(keys)}; each page needs one")
        contents, page_of_key, depths, uses = self._keys, self._page_of_key, self._depths, self._uses
        groups, deferred = self._groups, self._deferred
        for page, key in zip(pages, keys, strict=True):
            if contents[page] is not None and contents[page] != key:
                raise ValueError(f"page {page} is committed with other content")
        for depth, (page, key) in enumerate(zip(pages, keys, strict=True), first):
            contents[page] = key
            page_of_key.setdefault(key, page)
            depths[page] = depth
            uses[page] = uses[page] or 1
            groups[page] = group
            if deferred and key in deferred:
                self._advance(key)

    @property
    def may_defer(self) -> bool:
        """Tells whether `defer` may be called: pages of host memory need their keys, and so do pages that are reclaimed
        in another order than that of their release."""
        return self._lru is not None and not self.host.num_pages

    def are_deferrable(self, pages: Sequence[int]) -> bool:
        """Tells whether active pages have one owner each and no content keys."""
        alone = sum(map(self._references.__getitem__, pages)) == len(pages)
        return alone and not any(map(self._keys.__getitem__, pages))

    def defer(self, run: DeferredRun, pages: Sequence[int]) -> None:
        """Commits several active pages that follow those of a run, whose content is computed by what is dispatched.

        pages: each has one owner, and no content key. The first page of a new run gets its key, which is in `run.keys`.
        The others get theirs when a look-up finds the page in front of them, or by `commit_run`.
        """
        if not run.begun:
            alone = self._begin(run, pages[0])
            run.pages += pages[1:]
            if not alone:  # others have the same content
                self._commit_deferred(run, len(run.pages))
        else:
            run.pages += pages

    def defers(self, run: DeferredRun) -> bool:
        """Tells whether pages can be appended to a run of active pages: what it has are all of those behind a key."""
        return self._deferred.get(run.keys[run.first - 1]) is run

    def commit_run(self, run: DeferredRun) -> None:
        """Commits what remains of a run of active pages."""
        if self.defers(run):
            del self._deferred[run.keys[run.first - 1]]
            self._commit_deferred(run, len(run.pages))

    def uncommit(self, page: int) -> None:
        """Drops the content key of an active page if it has one owner, who may then write the page."""
        self._check_active((page,))
        key = self._keys[page]
        if key is None or self._references[page] > 1:
            return
        self._keys[page] = None
        if self._page_of_key.get(key) == page:  # that of a duplicate may be gone
            self._unlist(key)

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """Returns the committed pages of the longest run of `keys` from the first on.

        They get no reference: `share` them before anything is allocated, which may reclaim them. Keys are taken one by
        one, so that an iterator need not derive those behind the run.
        """
        pages = []
        for key in keys:
            page = self.page_of(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def page_of(self, key: bytes) -> int | None:
        """Returns the committed page of a key, or None; as with `find` it gets no reference."""
        page = self._page_of_key.get(key)
        if self._deferred and page is not None and key in self._deferred:
            self._advance(key)
        return page

    def num_unreferenced(self, pages: Iterable[int]) -> int:
        """Returns how many of these active or cached pages no table holds: to share them takes them from
        `num_available`."""
        return sum(not self._references[page] for page in pages)

    def forget(self, cause: str = "lost") -> int:
        """Drops the content keys of all device pages, so that no later `find` returns them; returns how many cached
        pages became free.

        cause: one of EVICTION_CAUSES. Pages in host memory keep their keys where the device alone is lost.
        """
        count = len(self._cached)
        self.evictions[cause] += len(self._page_of_key) + sum(len(run.pages) for run in self._deferred.values())
        for run in () if self._lru is None else self._lru.runs:
            for page in run.pages:
                self._references[page] = 0
        known = list(self._page_of_key) if self.event_log is not None and self.host.num_cached else ()
        copies = self.take_copies()
        if cause == "lost":
            self.lost_copies([copy.destination for copy in copies if copy.destination_tier is PageState.HOST])
        else:
            self.host.forget()
            self._copies = [copy for copy in copies if PageState.DISK not in (copy.source_tier, copy.destination_tier)]
        self._keys = [None] * self.num_pages
        self._page_of_key.clear()
        self._deferred.clear()
        self._free.extend(self._cached)
        self._uses = [0] * self.num_pages
        if self.event_log is not None and not self.host.num_cached:
            self.event_log.cleared()
        for key in known:
            self._unfindable(key)
        self._cached.clear()
        self.cached_by_group = [0] * len(self.cached_by_group)
        return count

    def copy(self, page: int) -> PageCopy | None:
        """Exchanges the caller's reference to a page it may not write for a private copy.

        Returns the copy to perform, whose destination replaces the page in the caller's table; None, and no change,
        when no page is available. A page that is writable needs no copy: ValueError.
        """
        if self.writable(page):
            raise ValueError(f"page {page} is writable by its one owner; it needs no copy")
        private = self.allocate(1)
        if private is None:
            return None
        self.release((page,))
        return PageCopy(page, PageState.ACTIVE, private[0], PageState.ACTIVE)

    def move(self, pages: Sequence[int], to: PageState, first: int = 0) -> tuple[PageCopy, ...] | None:
        """Swaps a sequence out (to HOST, given its device pages) or in (to ACTIVE, given its host pages).

        Returns one copy per page, in table order; the destinations are the sequence's new table, private to it.
        None, and no change, when the other tier has too few pages. The references to the source pages are released,
        so a page that others share, or that is cached, stays on the device too. Content keys move along.

        first: index in its table of the first page swapped in; those before it have left the table's window.
        """
        if to is PageState.HOST:
            return self._move_out(pages)
        if to is PageState.ACTIVE:
            return self._move_in(pages, first)
        raise ValueError(f"to is {to}; pages move to {PageState.HOST} or {PageState.ACTIVE}")

    def fetch(self, host_pages: Sequence[int]) -> tuple[PageCopy, ...] | None:
        """Brings cached pages of host memory back, as active pages with one reference each, their content keys too.

        They leave host memory. Returns one copy per page, in order; None, and no change, when too few device pages are
        available.
        """
        if len(host_pages) > self.num_available:
            return None
        self.host.take(host_pages)
        targets = self.allocate(len(host_pages))
        assert targets is not None, "pages that are available are not there"
        return self._arrive(host_pages, targets, None)

    def load(self, contents: Iterable[HeldPage]) -> list[int]:
        """Begins to read pages from disk to host memory, as far as it has room; returns the numbers of the reads."""
        numbers = []
        for content in contents:
            number, page, reclaimed = self.host.load(content)
            if reclaimed is not None:
                self._leaves_host(reclaimed)
            if number < 0:
                break
            numbers.append(number)
            if page is not None:
                key = content.key or b""
                self._copies.append(PageCopy(number, PageState.DISK, page, PageState.HOST, content.group, key))
        return numbers

    def part_all(self) -> list[PageCopy]:
        """Moves all cached pages to host memory and all of host memory to disk, for an orderly stop; returns the
        copies. No sequence may hold a page."""
        self.most_copies = None
        pages = self.allocate(self.num_available) or []
        for one in self.host.reclaim_all():
            self._leaves_host(one)
        self.release(pages)
        return self.take_copies()

    def take_copies(self) -> list[PageCopy]:
        """Returns the copies of pages reclaimed since the last call."""
        copies, self._copies = self._copies, []
        return copies

    def start_step(self) -> None:
        """Begins to count the copies of reclaimed pages anew, of which a step has at most `most_copies`."""
        self._parted_copies = 0

    def lost_copies(self, host_pages: Iterable[int]) -> None:
        """Forgets what was cached in host pages whose copies did not take place."""
        for key in self.host.lost(host_pages):
            self._unfindable(key)

    def release_host(self, pages: Sequence[int]) -> None:
        """Frees the host pages of a sequence that ends while swapped out."""
        self.host.release(pages)

    def check_integrity(self, tables: Iterable[Sequence[int]], host_tables: Iterable[Sequence[int]] = ()) -> None:
        """Recomputes the reference counts from the tables of all sequences; raises AssertionError when they differ.

        Takes time in the size of the pool: for tests and for when the engine is idle (then without tables).
        """
        runs = [] if self._lru is None else self._lru.runs
        check_runs(self._deferred, runs, self._references, self._keys, self._page_of_key)
        deferred = {page for run in runs for page in run.pages}
        check_pages(tables, self._references, self._free, self._cached, self._keys, self._page_of_key, deferred)
        if self.cached_by_group:
            counts = Counter(self._groups[page] for page in self._cached)
            wanted = [counts[group] for group in range(len(self.cached_by_group))]
            expect(self.cached_by_group == wanted, f"cached pages by group are {wanted}, not {self.cached_by_group}")
        self.host.check_integrity(host_tables)

    def _move_out(self, pages: Sequence[int]) -> tuple[PageCopy, ...] | None:
        self._check_active(pages)
        contents = [HeldPage(self._keys[page], self._groups[page], self._depths[page]) for page in pages]
        held = self.host.hold(contents)
        if held is None:
            return None
        targets, reclaimed = held
        for one in reclaimed:
            self._leaves_host(one)
        self.release(pages)
        pairs = zip(pages, targets, strict=True)
        return tuple([PageCopy(page, PageState.ACTIVE, host, PageState.HOST) for page, host in pairs])

    def _move_in(self, pages: Sequence[int], first: int) -> tuple[PageCopy, ...] | None:
        self.host.check_held(pages)
        targets = self.allocate(len(pages))
        return None if targets is None else self._arrive(pages, targets, first)

    def _arrive(self, pages: Sequence[int], targets: Sequence[int], first: int | None) -> tuple[PageCopy, ...]:
        """Gives allocated pages the content of held host pages, which are then free; returns the copies.

        first: index in its table of the first one; None where each has the depth that it had."""
        copies = []
        for place, (page, target) in enumerate(zip(pages, targets, strict=True)):
            content = self.host.content(page)
            key = self._keys[target] = content.key
            if key is not None:
                self._page_of_key.setdefault(key, target)
                self._depths[target], self._uses[target] = content.depth if first is None else first + place, 1
                self._groups[target] = content.group
            group = content.group if first is None else 0
            copies.append(PageCopy(page, PageState.HOST, target, PageState.ACTIVE, group))
        self.host.release(pages)
        return tuple(copies)

    def _count_cached(self, page: int, change: int) -> None:
        if self.cached_by_group:
            self.cached_by_group[self._groups[page]] += change

    def _take(self, page: int) -> None:
        if not self._references[page]:
            self._cached.remove(page)
            self._count_cached(page, -1)
        self._references[page] += 1

    def _drop(self, pages: Sequence[int]) -> None:
        later = None
        for page in reversed(pages):
            self._references[page] -= 1
            later = page if not self._references[page] and self._keep(page, later) else None

    def _keep(self, page: int, later: int | None) -> bool:
        """Caches or frees a page without references; returns whether it is cached. later: the next page of the table,
        if it has just been cached."""
        key = self._keys[page]
        # `setdefault`: a duplicate takes over when the page found until now has been reclaimed.
        if key is not None and self._page_of_key.setdefault(key, page) == page:
            self._cached.add(page, self._depths[page], self._uses[page], later)
            self._count_cached(page, 1)
            return True
        self._free_page(page)
        return False

    def _reclaim(self, count: int) -> list[int]:
        """Takes so many cached pages from what they keep; returns them, with a reference each."""
        pages, keyed = self._cached.pop_several(count)
        self.evictions["capacity"] += count
        for page in keyed:
            key = self._keys[page]
            assert key is not None, f"page {page} is cached without a content key"
            self._references[page], self._keys[page], self._uses[page] = 1, None, 0
            self._count_cached(page, -1)
            self._reclaimed(page, key)
        pages += keyed
        return pages

    def _reclaimed(self, page: int, key: bytes) -> None:
        """Makes what a page contained unfindable on the device, and copies it to host memory."""
        del self._page_of_key[key]
        if self._deferred:
            self._deferred.pop(key, None)  # pages behind it have been reclaimed, or cannot be found any more
        if self.host.caches:
            self._part(page, key)
        if self.event_log is not None:
            self._unfindable(key)

    def _begin(self, run: DeferredRun, page: int) -> bool:
        """Commits the first page of a run; returns whether no other page has its content, so that none is behind it."""
        key = run.keys[run.first]
        self._keys[page], self._depths[page], self._uses[page] = key, run.first, 1
        run.first += 1
        run.begun = True
        if self._page_of_key.setdefault(key, page) == page and self._deferred.setdefault(key, run) is run:
            return True
        if key in self._deferred:
            self._advance(key)
        return False

    def _advance(self, key: bytes) -> None:
        """Commits pages behind the one with this key, as many again as the sequence has in front of them."""
        run = self._deferred.pop(key)
        self._commit_deferred(run, run.first)

    def _commit_deferred(self, run: DeferredRun, count: int) -> None:
        """Commits the first `count` pages of a run, which is not listed, and lists what remains of it behind a page of
        its own; where others have the content of some, the whole run.

        A cached page whose content another has becomes free.
        """
        deferred, lru, freed = self._deferred, self._lru, 0
        assert lru is not None
        while count:
            taken, alone, key = run.take(count, self.page_size), True, b""
            for depth, (page, key) in enumerate(taken, run.first - len(taken)):
                found = self._page_of_key.setdefault(key, page) == page
                alone = alone and found
                self._keys[page], self._depths[page], self._uses[page] = key, depth, 1
                if run.cached:
                    self._references[page] = 0
                    if found:
                        lru.named(run, page)
                    else:
                        self._free_page(page)
                        freed += 1
                if key in deferred:
                    self._advance(key)
            listed = alone and (not run.pages or deferred.setdefault(key, run) is run)
            count = 0 if listed else len(run.pages)
        if freed:
            lru.drop(run, freed)

    def _free_page(self, page: int) -> None:
        self._keys[page] = None
        self._uses[page] = 0
        self._free.append(page)

    def _part(self, page: int, key: bytes) -> None:
        """Copies a page that is reclaimed to host memory, where it is not there yet."""
        if self.most_copies is not None and self._parted_copies >= self.most_copies and key not in self.host:
            return
        group = self._groups[page]
        target, reclaimed = self.host.store(HeldPage(key, group, self._depths[page]))
        if reclaimed is not None:
            self._leaves_host(reclaimed)
        if target is not None:
            self._copies.append(PageCopy(page, PageState.ACTIVE, target, PageState.HOST, group))
            self._parted_copies += 1

    def _leaves_host(self, reclaimed: Reclaimed) -> None:
        """Writes a cached page of host memory to disk, where there is one that does not have it, before its place is
        taken."""
        page, content = reclaimed
        assert content.key is not None
        self._unfindable(content.key)
        on_disk = self.host.on_disk
        if on_disk is not None and content.key not in on_disk:
            on_disk.add(content.key)
            self._copies.append(PageCopy(page, PageState.HOST, 0, PageState.DISK, content.group, content.key))

    def _unlist(self, key: bytes) -> None:
        del self._page_of_key[key]
        self._deferred.pop(key, None)
        self._unfindable(key)

    def _unfindable(self, key: bytes) -> None:
        """Tells the event log of a page that is neither on the device nor cached on the host any more."""
        if self.event_log is not None and key not in self._page_of_key and key not in self.host:
            self.event_log.removed(key)

    def _check_range(self, page: int) -> None:
        if not NULL_PAGE < page < self.num_pages:
            raise ValueError(f"page {page} does not exist; pages are numbered from 1 to {self.num_pages - 1}")

    def _check_active(self, pages: Sequence[int]) -> None:
        self._check_distinct(pages)
        references, end = self._references, self.num_pages
        for page in pages:
            if not NULL_PAGE < page < end or not references[page]:
                self._check_range(page)
                raise ValueError(f"page {page} is {self.state(page).value}; it must be active")

    @staticmethod
    def _check_distinct(pages: Sequence[int]) -> None:
        if len(set(pages)) != len(pages):
            raise ValueError(f"pages {list(pages)} name a page twice; a table holds each page once")


def greatest_concurrency(num_usable: int, pages: int, max_num_seqs: int) -> float:
    """Returns how many sequences of so many pages can run at once: as many as the usable pages hold, at most
    max_num_seqs."""
    return min(num_usable / pages, max_num_seqs)
