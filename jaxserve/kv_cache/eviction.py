"""Decides which cached page the pool reclaims next.

A cached page is held by no table; its content stays until its memory is needed. `Eviction` orders these pages:

    lru     least recently released first
    lfu     fewest uses first, then least recently released
    cost    least worth first: uses times the seconds that computing the page again takes, plus the worth of the page
            that was reclaimed last when this one was released, so that what is not used any more ages.
            Source: GreedyDual-Size-Frequency, Cherkasova (HP Labs report HPL-98-69, 1998), of pages of one size

Within one sequence a later page is reclaimed before an earlier one, whatever the order: without the earlier ones no
look-up would reach it. Each call takes constant time, or logarithmic time in the number of cached pages.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Protocol

from jaxserve.kv_cache.deferred_keys import DeferredRun


class Eviction(Protocol):
    """Orders the cached pages of a pool."""

    def __len__(self) -> int: ...

    def __contains__(self, page: int) -> bool: ...

    def __iter__(self) -> Iterator[int]:
        """Yields the pages in no particular order."""
        ...

    def add(self, page: int, depth: int, uses: int, follows: int | None) -> None:
        """Adds a page that no table holds any more.

        Args:
            page: its number.
            depth: number of pages before it in its sequence.
            uses: number of sequences that had it.
            follows: the next page of the table that is released, if that one is cached too: it goes first.
        """
        ...

    def remove(self, page: int) -> None:
        """Removes a page that a table holds again."""
        ...

    def pop(self) -> int:
        """Removes and returns the page to reclaim; there must be one."""
        ...

    def pop_several(self, count: int) -> tuple[list[int], list[int]]:
        """Removes and returns so many pages, of those to reclaim next: those without content keys, and the others."""
        ...

    def clear(self) -> None: ...


class LeastRecentlyUsed:
    """Reclaims the page released first. Pages whose keys are deferred are one entry in this order, with their run."""

    def __init__(self) -> None:
        self._entries: OrderedDict[int | DeferredRun, None] = OrderedDict()
        self._run_of: dict[int, DeferredRun] = {}  # of pages of runs that have got their keys since they were added
        self._next: DeferredRun | None = None  # the run that is being reclaimed, which is no entry any more
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, page: int) -> bool:
        """Tells whether a page is in the order; O(runs) for one without a key."""
        return page in self._entries or page in self._run_of or any(page in run.pages for run in self.runs)

    def __iter__(self) -> Iterator[int]:
        for entry in self._entries:
            if isinstance(entry, int):
                yield entry
        for run in self.runs:
            yield from (*run.pages, *(run.named or ()))

    @property
    def runs(self) -> list[DeferredRun]:
        """Returns the runs with cached pages; O(entries)."""
        waiting = [entry for entry in self._entries if isinstance(entry, DeferredRun)]
        return waiting if self._next is None else [self._next, *waiting]

    def add(self, page: int, depth: int, uses: int, follows: int | None) -> None:
        self._entries[page] = None
        self._count += 1

    def add_run(self, run: DeferredRun) -> None:
        """Adds the pages of a run, the last one first."""
        self._entries[run] = None
        self._count += len(run.pages)

    def named(self, run: DeferredRun, page: int) -> None:
        """Keeps the place of a page of a run, behind those that still are in it and have no keys."""
        if run.named is None:
            run.named = []
        run.named.append(page)
        self._run_of[page] = run

    def drop(self, run: DeferredRun, count: int) -> None:
        """Removes `count` pages that were in a run and are neither in it any more nor among its named ones."""
        self._count -= count
        self._end(run)

    def remove(self, page: int) -> None:
        self._count -= 1
        run = self._run_of.pop(page, None)
        if run is None:
            del self._entries[page]
            return
        assert run.named is not None
        run.named.remove(page)  # usually the first
        self._end(run)

    def pop(self) -> int:
        pages, keyed = self.pop_several(1)
        return (pages or keyed)[0]

    def pop_several(self, count: int) -> tuple[list[int], list[int]]:
        self._count -= count
        run = self._next
        if run is not None and len(run.pages) > count:
            pages = run.pages[-count:]
            del run.pages[-count:]
            return pages, []
        pages, keyed = [], []
        while count:
            run = self._next
            if run is None:
                entry = self._entries.popitem(last=False)[0]
                if isinstance(entry, int):
                    keyed.append(entry)
                    count -= 1
                    continue
                run = self._next = entry
            taken = run.pages[-count:]
            if taken:
                del run.pages[-count:]
                pages += taken
                count -= len(taken)
            else:
                assert run.named is not None
                keyed.append(run.named.pop())
                del self._run_of[keyed[-1]]
                count -= 1
            if not run.pages and not run.named:
                self._next = None
        return pages, keyed

    def clear(self) -> None:
        self._entries.clear()
        self._run_of.clear()
        self._next, self._count = None, 0

    def _end(self, run: DeferredRun) -> None:
        """Forgets a run without pages."""
        if run.pages or run.named:
            return
        if run is self._next:
            self._next = None
        else:
            del self._entries[run]


class LeastWorth:
    """Reclaims the page of the least worth, and of several the one released first.

    worth: of a page that is released, from its depth and uses. ages: what is released later is worth more, by the worth
    of the page reclaimed last.
    """

    def __init__(self, worth: Callable[[int, int], float], *, ages: bool):
        self._worth = worth
        self._ages = ages
        self._age = 0.0
        self._heap: list[tuple[float, int, int]] = []  # worth, number of the release, page; some are outdated
        self._pages: dict[int, tuple[float, int]] = {}
        self._releases = 0

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, page: int) -> bool:
        return page in self._pages

    def __iter__(self) -> Iterator[int]:
        return iter(self._pages)

    def add(self, page: int, depth: int, uses: int, follows: int | None) -> None:
        worth = self._worth(depth, uses) + (self._age if self._ages else 0.0)
        if follows is not None:
            worth = max(worth, self._pages[follows][0])
        self._releases += 1
        self._pages[page] = worth, self._releases
        heapq.heappush(self._heap, (worth, self._releases, page))
        if len(self._heap) > 2 * len(self._pages) + 64:
            self._heap = [(worth, release, page) for page, (worth, release) in self._pages.items()]
            heapq.heapify(self._heap)

    def remove(self, page: int) -> None:
        del self._pages[page]

    def pop(self) -> int:
        while True:
            worth, release, page = heapq.heappop(self._heap)
            if self._pages.get(page) == (worth, release):
                del self._pages[page]
                self._age = max(self._age, worth)
                return page

    def pop_several(self, count: int) -> tuple[list[int], list[int]]:
        return [], [self.pop() for _ in range(count)]

    def clear(self) -> None:
        self._pages.clear()
        self._heap.clear()


def make_eviction(policy: str, page_seconds: Callable[[int], float] | None = None) -> Eviction:
    """Creates an order of cached pages.

    Args:
        policy: of `jaxserve.config.settings.EVICTION_POLICIES`.
        page_seconds: for "cost": seconds that the page behind so many others takes to compute; None counts each the
            same.

    Raises:
        ValueError: the policy is unknown.
    """
    if policy == "lru":
        return LeastRecentlyUsed()
    if policy == "lfu":
        return LeastWorth(lambda depth, uses: uses, ages=False)
    if policy == "cost":
        seconds = page_seconds or (lambda depth: 1.0)
        return LeastWorth(lambda depth, uses: uses * seconds(depth), ages=True)
    raise ValueError(f"eviction_policy is {policy!r}; it must be lru, lfu or cost")
