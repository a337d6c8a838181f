"""Lets new requests wait while pages of their prompts are read from disk, where that is cheaper than computing them.

A request asks once, when it could be admitted. Its pages are read to host memory, where the prefix cache finds them
like others; the request is in no queue meanwhile. Whatever becomes of the reads, it then queues again.
"""

from __future__ import annotations

import dataclasses

from jaxserve.kv_cache.page_pool import PagePool
from jaxserve.scheduler.host_fetches import FetchChoice, FetchCounts
from jaxserve.scheduler.prefix_cache import PrefixCache
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.waiting import Waiting


@dataclasses.dataclass
class _Waiter:
    """A request that waits since `begin`. reads: numbers of those that are under way."""

    sequence: Sequence
    reads: set[int]
    begin: float
    patience: float | None


class DiskWaits:
    """Keeps the requests of one scheduler that wait for pages from disk.

    page_seconds: that reading a page takes, as measured lately. counts: of choices, as for pages of host memory; a wait
    was wrong where it took so long that computing is predicted to have been faster.
    """

    def __init__(self, cache: PrefixCache, pool: PagePool, waiting: Waiting):
        self._cache = cache
        self._pool = pool
        self._waiting = waiting
        self._waiters: list[_Waiter] = []
        self.page_seconds = 0.0
        self.counts = FetchCounts()

    @property
    def num_withheld(self) -> int:
        """Returns the number of requests that wait."""
        return sum(one.sequence.withheld for one in self._waiters)

    def begin(self, sequence: Sequence, now: float) -> bool:
        """Decides whether a waiting request waits for pages from disk; if so, it is in no queue any more."""
        if not self._pool.host.on_disk or not sequence.waits_new or sequence.prompt is not None or sequence.asked_disk:
            return False
        sequence.asked_disk = True
        found = self._cache.find(sequence)
        entries, pages = self._cache.find_on_disk(sequence, found)
        room = self._pool.num_host_free
        if len(pages) > room:  # as many as fit, where each is of use without those behind it
            entries, pages = pages[room].depth, pages[:room] if self._cache.alike else []
        if not pages:
            return False
        start, reading = self._cache.num_tokens(found), len(pages) * self.page_seconds
        tokens = entries * self._pool.page_size - start
        choice = self._cache.fetches.choose(start, tokens, len(pages), sequence.num_known, reading)
        reads = set(self._pool.load(pages)) if choice.fetches else ()
        if not reads:
            self.counts.computed += 1
            return False
        self.counts.fetched += 1
        self._waiting.withhold(sequence)
        self._waiters.append(_Waiter(sequence, set(reads), now, _patience(choice, reading)))
        return True

    def loaded(self, number: int, now: float, *, found: bool) -> int | None:
        """Ends a read; returns the host page to put its content in, or None."""
        page = self._pool.host.loaded(number, found=found)
        for one in self._waiters:
            one.reads.discard(number)
        for one in [one for one in self._waiters if not one.reads]:
            self._release(one, wrong=one.patience is not None and now - one.begin > one.patience)
        return page

    def release_all(self) -> None:
        """Ends all waits: what is read is not wanted any more."""
        self._pool.host.abandon_loads()
        for one in list(self._waiters):
            self._release(one, wrong=True)

    def _release(self, waiter: _Waiter, *, wrong: bool) -> None:
        self._waiters.remove(waiter)
        self.counts.wrong += wrong
        if waiter.sequence.withheld:
            self._waiting.offer(waiter.sequence)


def _patience(choice: FetchChoice, reading: float) -> float | None:
    """Returns the seconds of reading after which computing is predicted to have been faster."""
    return None if choice.margin is None else reading + choice.margin
