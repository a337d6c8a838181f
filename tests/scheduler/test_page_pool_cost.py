"""No call of the page pool that a step makes takes time in the size of the pool.

Counted, not timed: the lines of Python executed are the same for a small and a large pool, and the containers are
replaced by ones that fail when they are scanned, which covers the loops that C runs.
"""

import gc
import sys
from collections import OrderedDict

import pytest

from jaxserve.kv_cache.eviction import LeastRecentlyUsed
from jaxserve.kv_cache.page_pool import PagePool, PageState
from tests.scheduler.pool_helpers import cached, commit, match, taken


def _forbidden(self, *arguments):
    raise AssertionError("a step went through all pages")


SCANS = ("__iter__", "__reversed__", "index", "count", "remove", "insert", "copy", "sort", "reverse", "__eq__")


class NoScanList(list):
    """A list on which whatever takes time in its length fails, whether called from Python or from C."""

    __contains__ = _forbidden


class NoScanDict(OrderedDict):
    """A dict that cannot be iterated; membership is a look-up and stays allowed."""

    keys = values = items = _forbidden


for _class in (NoScanList, NoScanDict):
    for _name in SCANS:
        setattr(_class, _name, _forbidden)


def executed_lines(work):
    """Runs `work` and counts the lines of Python that it executes."""
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        return trace

    before, collects = sys.gettrace(), gc.isenabled()
    gc.disable()  # a collection may run callbacks, such as hypothesis's, whose lines are not the work's
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
        if collects:
            gc.enable()
    return lines


def cost_of_a_step(num_pages):
    """Lines executed by every call that a step may make, in a pool of this size with half of its pages cached."""
    pool = PagePool(num_pages, page_size=1, num_host_pages=num_pages, caches_on_host=True)
    half = list(range(num_pages // 2))
    cached(pool, half)
    pages, contents = pool._pages, pool.contents
    for part, name in ((pages, "references"), (contents, "keys"), (pages, "free"), (pool.host, "_free")):
        setattr(part, name, NoScanList(getattr(part, name)))
    for part, name in ((contents, "page_of_key"), (pool.host, "_held"), (pool.host, "_page_of_key")):
        setattr(part, name, NoScanDict(getattr(part, name)))
    eviction = pages.cached
    assert isinstance(eviction, LeastRecentlyUsed)
    eviction._entries = NoScanDict(eviction._entries)

    def step():
        pages = taken(pool, 4)
        commit(pool, pages, [-1, -2, -3], "t")
        pool.share(pages)
        copy = pool.copy(pages[0])
        assert copy is not None
        pool.release(pages)
        found = match(pool, [0, 1, 2, -1], "s")
        assert len(found) == 3
        out = pool.move(found, PageState.HOST)
        assert out is not None
        back = pool.move([copy.destination for copy in out], PageState.ACTIVE)
        assert back is not None
        pool.release([copy.destination for copy in back])
        pool.release([copy.destination, *pages[1:]])
        assert pool.num_free + pool.num_used + pool.num_cached == pool.num_usable

    first = executed_lines(step)
    pool.allocate(pool.num_free)  # from here on every page handed out has to be reclaimed
    return first, executed_lines(step)


def test_cost_does_not_grow_with_the_pool():
    assert cost_of_a_step(64) == cost_of_a_step(100_000)


def test_the_cost_guard_sees_scans():
    for scan in (list, sorted, lambda pages: 99 in pages, lambda pages: [-page for page in pages]):
        with pytest.raises(AssertionError, match="all pages"):
            scan(NoScanList([1, 2]))
    for scan in (list, min, lambda pages: pages.items(), lambda pages: next(iter(pages))):
        with pytest.raises(AssertionError, match="all pages"):
            scan(NoScanDict({1: None}))
    assert executed_lines(lambda: sum(1 for _ in range(100))) > executed_lines(lambda: sum(1 for _ in range(10)))
