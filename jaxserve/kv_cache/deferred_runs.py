"""Commits runs of pages whose content keys are deferred, and gives them their keys as look-ups come near.

A run is listed by the key of the page in front of it, which is a page of the same sequence that look-ups find. So it
is reclaimed after the run's pages, and what is listed can be found.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.kv_cache.deferred_keys import DeferredRun
from jaxserve.kv_cache.device_pages import DevicePages
from jaxserve.kv_cache.page_contents import PageContents


class DeferredRuns:
    """Lists the runs of active and cached pages of one pool, which are reclaimed in the order of their release.

    listed: by the key of the page in front of each.
    """

    def __init__(self, pages: DevicePages, contents: PageContents, page_size: int) -> None:
        self._pages = pages
        self._contents = contents
        self._page_size = page_size
        self.listed: dict[bytes, DeferredRun] = {}

    @property
    def cached(self) -> list[DeferredRun]:
        """Returns the runs with cached pages; O(cached pages)."""
        return [] if self._pages.lru is None else self._pages.lru.runs

    def are_deferrable(self, pages: Sequence[int]) -> bool:
        """Tells whether active pages have one owner each and no content keys."""
        alone = sum(map(self._pages.references.__getitem__, pages)) == len(pages)
        return alone and not any(map(self._contents.keys.__getitem__, pages))

    def is_listed(self, run: DeferredRun) -> bool:
        """Tells whether what a run has are all pages behind a key, so that more can be appended."""
        return self.listed.get(run.keys[run.first - 1]) is run

    def defer(self, run: DeferredRun, pages: Sequence[int]) -> None:
        """Appends active pages to a run, which is listed or new; the first page of a new one gets its key."""
        if not run.begun:
            alone = self._begin(run, pages[0])
            run.pages += pages[1:]
            if not alone:  # others have the same content
                self._commit(run, len(run.pages))
        else:
            run.pages += pages

    def release(self, run: DeferredRun) -> None:
        """Caches the pages of a listed run whose sequence releases them."""
        assert self._pages.lru is not None
        self._pages.lru.add_run(run)
        run.cached = True

    def commit_all(self, run: DeferredRun) -> None:
        """Commits the pages of a run, if it is listed."""
        if self.is_listed(run):
            del self.listed[run.keys[run.first - 1]]
            self._commit(run, len(run.pages))

    def advance(self, key: bytes) -> None:
        """Commits pages behind the one with this key, as many again as the sequence has in front of them."""
        run = self.listed.pop(key)
        self._commit(run, run.first)

    def forget(self) -> int:
        """Forgets all runs, those of cached pages too, which have no references then; returns how many pages could be
        found."""
        count = sum(len(run.pages) for run in self.listed.values())
        for run in self.cached:
            for page in run.pages:
                self._pages.references[page] = 0
        self.listed.clear()
        return count

    def _begin(self, run: DeferredRun, page: int) -> bool:
        """Commits the first page of a run; returns whether no other page has its content, so that none is behind it."""
        key = run.keys[run.first]
        found = self._contents.assign(page, key, run.first)
        run.first += 1
        run.begun = True
        if found and self.listed.setdefault(key, run) is run:
            return True
        if key in self.listed:
            self.advance(key)
        return False

    def _commit(self, run: DeferredRun, count: int) -> None:
        """Commits the first `count` pages of a run, which is not listed, and lists what remains of it behind a page of
        its own; where others have the content of some, commits the whole run.

        A cached page whose content another has becomes free.
        """
        listed, lru, freed = self.listed, self._pages.lru, 0
        assert lru is not None
        while count:
            taken, alone, key = run.take(count, self._page_size), True, b""
            for depth, (page, key) in enumerate(taken, run.first - len(taken)):
                found = self._contents.assign(page, key, depth)
                alone = alone and found
                if run.cached:
                    self._pages.references[page] = 0
                    if found:
                        lru.named(run, page)
                    else:
                        self._contents.clear(page)
                        self._pages.free.append(page)
                        freed += 1
                if key in listed:
                    self.advance(key)
            ends = alone and (not run.pages or listed.setdefault(key, run) is run)
            count = 0 if ends else len(run.pages)
        if freed:
            lru.drop(run, freed)
