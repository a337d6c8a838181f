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
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol


class Eviction(Protocol):
    """Orders the cached pages of a pool. weighs: by their depths and uses."""

    weighs: bool

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

    def add_run(self, pages: Sequence[int], depths: Sequence[int], uses: Sequence[int]) -> None:
        """Adds consecutive pages of one table, the last of them first. depths, uses: as for `add`, by page number."""
        ...

    def remove(self, page: int) -> None:
        """Removes a page that a table holds again."""
        ...

    def pop(self) -> int:
        """Removes and returns the page to reclaim; there must be one."""
        ...

    def pop_run(self, count: int) -> list[int]:
        """Removes and returns so many pages, in the order in which they are reclaimed; there must be as many."""
        ...

    def clear(self) -> None: ...


class LeastRecentlyUsed:
    """Reclaims the page released first."""

    weighs = False

    def __init__(self) -> None:
        self._pages: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._pages)

    def __contains__(self, page: int) -> bool:
        return page in self._pages

    def __iter__(self) -> Iterator[int]:
        return iter(self._pages)

    def add(self, page: int, depth: int, uses: int, follows: int | None) -> None:
        self._pages[page] = None

    def add_run(self, pages: Sequence[int], depths: Sequence[int], uses: Sequence[int]) -> None:
        self._pages.update(dict.fromkeys(pages))

    def remove(self, page: int) -> None:
        del self._pages[page]

    def pop(self) -> int:
        return self._pages.popitem(last=False)[0]

    def pop_run(self, count: int) -> list[int]:
        pop = self._pages.popitem
        return [pop(last=False)[0] for _ in range(count)]

    def clear(self) -> None:
        self._pages.clear()


class LeastWorth:
    """Reclaims the page of the least worth, and of several the one released first.

    worth: of a page that is released, from its depth and uses. ages: what is released later is worth more, by the worth
    of the page reclaimed last.
    """

    weighs = True

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

    def add_run(self, pages: Sequence[int], depths: Sequence[int], uses: Sequence[int]) -> None:
        follows = None
        for page in pages:
            self.add(page, depths[page], uses[page], follows)
            follows = page

    def remove(self, page: int) -> None:
        del self._pages[page]

    def pop(self) -> int:
        while True:
            worth, release, page = heapq.heappop(self._heap)
            if self._pages.get(page) == (worth, release):
                del self._pages[page]
                self._age = max(self._age, worth)
                return page

    def pop_run(self, count: int) -> list[int]:
        return [self.pop() for _ in range(count)]

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
