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

Every call takes time proportional to the pages it is given, not to the size of the pool, except `check_integrity`. The
pool is put together of parts, none of which knows those that follow it:

    DevicePages     which pages are free, referenced and cached
    PageContents    what they contain, by content key
    HostCopies      what is copied to host memory and disk when it is reclaimed
    DeferredRuns    committed pages whose keys nobody has needed yet
    CachedPages     what is kept when the last reference is dropped, and reclaimed
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxserve.kv_cache.cached_pages import CachedPages
from jaxserve.kv_cache.deferred_keys import DeferredRun
from jaxserve.kv_cache.deferred_runs import DeferredRuns
from jaxserve.kv_cache.device_pages import DevicePages, check_distinct
from jaxserve.kv_cache.eviction import Eviction, LeastRecentlyUsed
from jaxserve.kv_cache.host_copies import HostCopies
from jaxserve.kv_cache.host_pool import HeldPage, HostPool
from jaxserve.kv_cache.page_contents import PageContents
from jaxserve.kv_cache.page_copy import PageCopy, PageState
from jaxserve.kv_cache.pool_checks import NULL_PAGE, check_pages, check_runs


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
        self.contents = PageContents(num_pages, self.host)
        self.host_copies = HostCopies(self.host, self.contents)
        self._pages = DevicePages(num_pages, LeastRecentlyUsed() if eviction is None else eviction)
        self._runs = DeferredRuns(self._pages, self.contents, page_size)
        self.cached = CachedPages(self._pages, self.contents, self._runs, self.host_copies)
        self.evictions = self.cached.evictions

    @property
    def num_usable(self) -> int:
        """Returns the number of device pages that can be allocated at all: free + used + cached."""
        return self.num_pages - 1

    @property
    def num_free(self) -> int:
        return len(self._pages.free)

    @property
    def num_cached(self) -> int:
        return len(self._pages.cached)

    @property
    def num_used(self) -> int:
        """Returns the number of device pages with at least one reference."""
        return self.num_usable - len(self._pages.free) - len(self._pages.cached)

    @property
    def num_available(self) -> int:
        """Returns the number of device pages that `allocate` can return now."""
        return len(self._pages.free) + len(self._pages.cached)

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
        return self._pages.state(page)

    def references(self, page: int) -> int:
        """Returns the number of page tables that hold a device page."""
        self._pages.check_range(page)
        return self._pages.references[page]

    def writable(self, page: int) -> bool:
        """Tells whether the only owner of an active page may write it; if not, `copy` it first.

        A committed page is full, and other sequences may share it at any time, so it is never written again. Pages
        whose keys are deferred are not told apart from those that are not committed: whoever defers them must not ask.
        """
        self._pages.check_active((page,))
        return self._pages.references[page] == 1 and self.contents.keys[page] is None

    def allocate(self, count: int) -> list[int] | None:
        """Allocates `count` private pages with one reference each and undefined content; returns None, and changes
        nothing, when fewer are available.

        Takes free pages first, then cached ones, in the order of eviction.
        """
        if count < 0:
            raise ValueError(f"count is {count}; it must be at least 0")
        free, references = self._pages.free, self._pages.references
        if count > len(free) and count > len(free) + len(self._pages.cached):
            return None
        pages = free[: -1 - count : -1]
        del free[len(free) - len(pages) :]
        for page in pages:
            references[page] = 1
        if len(pages) < count:
            pages += self.cached.reclaim(count - len(pages))
        return pages

    def share(self, pages: Sequence[int]) -> None:
        """Adds one reference to each active or cached page, for the table of another sequence."""
        check_distinct(pages)
        references, keys, end = self._pages.references, self.contents.keys, self.num_pages
        for page in pages:
            if not NULL_PAGE < page < end or (not references[page] and keys[page] is None):
                self._pages.check_range(page)
                raise ValueError(f"page {page} is free; only active and cached pages can be shared")
        self.cached.take(pages)

    def release(self, pages: Sequence[int], run: DeferredRun | None = None) -> None:
        """Drops one reference to each active page of one table, given in table order.

        A page without references keeps its content as CACHED if `find` returns it, else it becomes FREE. Of one
        table the later pages are reclaimed first: without the earlier ones no `find` would reach them.

        run: of the pages in the table, those without keys; `pages` are then all pages of the table.
        """
        self._pages.check_active(pages)
        if run is not None and run.pages and self._runs.is_listed(run):
            self.cached.drop(pages[run.first + len(run.pages) :])
            self._runs.release(run)
            pages = pages[: run.first]
        self.cached.drop(pages)

    def commit(self, pages: Sequence[int], keys: Sequence[bytes], first: int = 0, group: int = 0) -> None:
        """Assigns its content key to each of several active pages, whose content is computed by what is dispatched.

        pages: full pages, of one table, one after the other. keys: of their content (`ContentKeys`), in the same order.
        first: index in the table of the first of them. group: of layers.

        Where another page has the same content already, `find` keeps returning that one. Raises ValueError, and changes
        nothing, when a page holds other content already or is not active.
        """
        self._pages.check_active(pages)
        if len(pages) != len(keys):
            raise ValueError(f"pages has {len(pages)} pages and keys {len(keys)}; each page needs one")
        contents, listed = self.contents, self._runs.listed
        known, page_of_key = contents.keys, contents.page_of_key
        depths, uses, groups = contents.depths, contents.uses, contents.groups
        for page, key in zip(pages, keys, strict=True):
            if known[page] is not None and known[page] != key:
                raise ValueError(f"page {page} is committed with other content")
        for depth, (page, key) in enumerate(zip(pages, keys, strict=True), first):
            known[page] = key
            page_of_key.setdefault(key, page)
            depths[page] = depth
            uses[page] = uses[page] or 1
            groups[page] = group
            if listed and key in listed:
                self._runs.advance(key)

    @property
    def may_defer(self) -> bool:
        """Tells whether `defer` may be called: pages of host memory need their keys, and so do pages that are reclaimed
        in another order than that of their release."""
        return self._pages.lru is not None and not self.host.num_pages

    def are_deferrable(self, pages: Sequence[int]) -> bool:
        """Tells whether active pages have one owner each and no content keys."""
        return self._runs.are_deferrable(pages)

    def defer(self, run: DeferredRun, pages: Sequence[int]) -> None:
        """Commits several active pages that follow those of a run, whose content is computed by what is dispatched.

        pages: each has one owner, and no content key. The first page of a new run gets its key, which is in `run.keys`.
        The others get theirs when a look-up finds the page in front of them, or by `commit_run`.
        """
        self._runs.defer(run, pages)

    def defers(self, run: DeferredRun) -> bool:
        """Tells whether pages can be appended to a run of active pages: what it has are all of those behind a key."""
        return self._runs.is_listed(run)

    def commit_run(self, run: DeferredRun) -> None:
        """Commits what remains of a run of active pages."""
        self._runs.commit_all(run)

    def uncommit(self, page: int) -> None:
        """Drops the content key of an active page if it has one owner, who may then write the page."""
        self._pages.check_active((page,))
        contents = self.contents
        key = contents.keys[page]
        if key is None or self._pages.references[page] > 1:
            return
        contents.keys[page] = None
        if contents.page_of_key.get(key) == page:  # that of a duplicate may be gone
            del contents.page_of_key[key]
            self._runs.listed.pop(key, None)
            contents.unfindable(key)

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
        page = self.contents.page_of_key.get(key)
        if page is not None and key in self._runs.listed:
            self._runs.advance(key)
        return page

    def num_unreferenced(self, pages: Iterable[int]) -> int:
        """Returns how many of these active or cached pages no table holds: to share them takes them from
        `num_available`."""
        return sum(not self._pages.references[page] for page in pages)

    def forget(self, cause: str = "lost") -> int:
        """Drops the content keys of all device pages, so that no later `find` returns them; returns how many cached
        pages became free.

        cause: one of `EVICTION_CAUSES`. Pages in host memory keep their keys where the device alone is lost.
        """
        return self.cached.forget(cause)

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
        return self.host_copies.load(contents)

    def part_all(self) -> list[PageCopy]:
        """Moves all cached pages to host memory and all of host memory to disk, for an orderly stop; returns the
        copies. No sequence may hold a page."""
        self.host_copies.limit = None
        pages = self.allocate(self.num_available) or []
        for one in self.host.reclaim_all():
            self.host_copies.leaves_host(one)
        self.release(pages)
        return self.take_copies()

    def take_copies(self) -> list[PageCopy]:
        """Returns the copies of pages reclaimed since the last call."""
        return self.host_copies.take()

    def start_step(self) -> None:
        """Begins to count the copies of reclaimed pages anew, of which a step has a limited number."""
        self.host_copies.start_step()

    def lost_copies(self, host_pages: Iterable[int]) -> None:
        """Forgets what was cached in host pages whose copies did not take place."""
        self.host_copies.lost(host_pages)

    def release_host(self, pages: Sequence[int]) -> None:
        """Frees the host pages of a sequence that ends while swapped out."""
        self.host.release(pages)

    def check_integrity(self, tables: Iterable[Sequence[int]], host_tables: Iterable[Sequence[int]] = ()) -> None:
        """Recomputes the reference counts from the tables of all sequences; raises AssertionError when they differ.

        Takes time in the size of the pool: for tests and for when the engine is idle (then without tables).
        """
        pages, contents, runs = self._pages, self.contents, self._runs.cached
        check_runs(self._runs.listed, runs, pages.references, contents.keys, contents.page_of_key)
        deferred = {page for run in runs for page in run.pages}
        check_pages(tables, pages.references, pages.free, pages.cached, contents.keys, contents.page_of_key, deferred)
        self.cached.check_integrity()
        self.host.check_integrity(host_tables)

    def _move_out(self, pages: Sequence[int]) -> tuple[PageCopy, ...] | None:
        self._pages.check_active(pages)
        held = self.host.hold([self.contents.of(page) for page in pages])
        if held is None:
            return None
        targets, reclaimed = held
        for one in reclaimed:
            self.host_copies.leaves_host(one)
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
        copies, contents = [], self.contents
        for place, (page, target) in enumerate(zip(pages, targets, strict=True)):
            content = self.host.content(page)
            if content.key is not None:
                depth = content.depth if first is None else first + place
                contents.assign(target, content.key, depth, content.group)
            group = content.group if first is None else 0
            copies.append(PageCopy(page, PageState.HOST, target, PageState.ACTIVE, group))
        self.host.release(pages)
        return tuple(copies)


def greatest_concurrency(num_usable: int, pages: int, max_num_seqs: int) -> float:
    """Returns how many sequences of so many pages can run at once: as many as the usable pages hold, at most
    max_num_seqs."""
    return min(num_usable / pages, max_num_seqs)
