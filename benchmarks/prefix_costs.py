"""What a prefix cache costs the host where nothing is found: a whole step of the engine, and single calls by size.

`step_overhead` keeps three engines full (benchmarks/host_overhead.py), the second of which caches prefixes, lets them
step in turn, and compares the processor time that this thread took: other processes of the machine change it little.
The other two are alike, so that their ratio says what a ratio is worth.
`call_costs` times the calls of the page pool with so many cached pages, and eviction in each order.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.host_overhead import Case, FullEngine, make_core
from benchmarks.host_step import send
from benchmarks.spread import spread
from jaxserve.config.settings import EVICTION_POLICIES
from jaxserve.kv_cache.content_keys import ContentKeys
from jaxserve.kv_cache.eviction import make_eviction
from jaxserve.kv_cache.page_pool import PagePool

CASES = (
    Case("steady", (32, 33), (3000, 3001), 0),
    Case("mixed", (16, 257), (16, 257), 0),
    Case("mixed, pool overflows", (16, 257), (16, 257), 0),
)
BLOCK = 20
"""Steps that one engine makes before it is the other's turn."""

PAGE_SIZE = 16
CHAIN = 8
"""Pages of a prefix that is looked up, committed or evicted at once."""


def step_overhead(case: Case, running: int, rounds: int, steps: int) -> dict[str, Any]:
    """Microseconds of a step with and without the cache, and their ratio in each round of so many steps."""
    pages = running * 20 if "overflows" in case.name else None
    engines = [
        FullEngine(make_core(running, pages, caching=on), case, running, rounds * steps) for on in (False, True, False)
    ]
    gc.collect()
    gc.freeze()
    spent: list[list[float]] = []
    for _ in range(rounds):
        blocks: list[list[float]] = [[], [], []]
        for block in range(steps // BLOCK):
            for index in range(3):
                turn = (index + block) % 3
                blocks[turn].append(_thread_seconds(engines[turn]))
        spent.append([statistics.median(one) / BLOCK for one in blocks])
    gc.unfreeze()
    cached = engines[1].core
    for engine in engines:
        engine.core.check_integrity()
    return {
        "case": case.name,
        "running": running,
        "microseconds": {
            "with cache": 1e6 * statistics.median(one[1] for one in spent),
            "without": 1e6 * statistics.median((one[0] + one[2]) / 2 for one in spent),
        },
        "ratio": spread([2 * on / (first + second) for first, on, second in spent]),
        "ratio_of_equals": spread([second / first for first, _, second in spent]),
        "queries": cached.scheduler.prefix_counts.queries,
        "hits": cached.scheduler.prefix_counts.hits,
        "evicted": cached.scheduler.pool.evictions["capacity"],
        "preemptions": [engine.core.scheduler.num_preemptions for engine in engines],
    }


def _thread_seconds(engine: FullEngine) -> float:
    spent = 0.0
    for _ in range(BLOCK):
        engine.refill()
        begin = time.thread_time()
        send(engine.core.step())
        spent += time.thread_time() - begin
    return spent


def call_costs(cached: int, policy: str, repeats: int) -> dict[str, Any]:
    """Microseconds a page, the median of so many calls, with `cached` cached pages: `find` and `share` of CHAIN pages,
    keys derived apart; `commit` of as many; `release`, which caches them; `allocate`, which evicts as many."""
    keys = ContentKeys()
    pool = PagePool(cached + CHAIN + 1, PAGE_SIZE, eviction=make_eviction(policy))
    chains = [_chain(keys, number) for number in range(-(-cached // CHAIN))]
    for chain in chains:
        pages = pool.allocate(CHAIN) or []
        pool.commit(pages, chain)
        pool.release(pages)
    free = pool.allocate(pool.num_free) or []  # from here on every page that is allocated has been evicted
    spent: dict[str, list[float]] = {name: [] for name in ("keys", "lookup", "insert", "release", "evict")}
    held: list[int] = []

    def timed(name: str, call: Callable[[], Any]) -> Any:
        begin = time.thread_time_ns()
        result = call()
        spent[name].append((time.thread_time_ns() - begin) / 1e3 / CHAIN)
        return result

    for number in range(repeats):
        # A chain that was looked up a while ago, or cached last, so that it is there.
        found = timed("lookup", lambda chain=chains[-1]: _looked_up(pool, chain))
        assert len(found) == CHAIN
        timed("release", lambda found=found: pool.release(found))
        held = timed("evict", lambda: pool.allocate(CHAIN)) or []
        fresh = timed("keys", lambda number=number: _chain(keys, -1 - number))
        timed("insert", lambda held=held, fresh=fresh: pool.commit(held, fresh))
        pool.release(held)
        chains.append(fresh)
    pool.release(free)
    pool.check_integrity([])
    return {"cached": cached, "policy": policy, **{name: statistics.median(values) for name, values in spent.items()}}


def _chain(keys: ContentKeys, number: int) -> list[bytes]:
    """Content keys of CHAIN pages of a prefix of its own."""
    found, key = [], keys.root("tenant", "salt")
    for page in range(CHAIN):
        key = keys.link(key, tuple(range(number, number + PAGE_SIZE - 1)) + (page,))
        found.append(key)
    return found


def _looked_up(pool: PagePool, chain: Sequence[bytes]) -> list[int]:
    found = pool.find(chain)
    pool.share(found)
    return found


def all_calls(sizes: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """`call_costs` for each size and order of eviction."""
    return [call_costs(size, policy, repeats) for policy in EVICTION_POLICIES for size in sizes]
