"""Cached pages in host memory: what moves there, what comes back, and what that costs."""

from __future__ import annotations

import random
from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given

from jaxserve.config.scheduling import PreemptionConfig, SchedulerConfig
from jaxserve.kv_cache.content_keys import ContentKeys
from jaxserve.kv_cache.event_log import CacheEventLog
from jaxserve.kv_cache.host_pool import HeldPage
from jaxserve.kv_cache.page_pool import PagePool, PageState
from jaxserve.request import EngineRequest, RequestOptions
from jaxserve.runner.fake import FakeRunner
from jaxserve.scheduler import Scheduler
from jaxserve.scheduler.buckets import Buckets, powers
from jaxserve.scheduler.host_fetches import (
    FetchPredictor,
    HostFetches,
    fetch_and_compute_seconds,
    measured_seconds,
)
from jaxserve.scheduler.preemption_costs import PreemptionCosts, configured_costs
from jaxserve.scheduler.prefix_costs import chunk_shape
from tests.budgets import budget
from tests.scheduler.drive import dispatch
from tests.scheduler.history import run_history
from tests.scheduler.pool_helpers import cached, commit, keys_of, taken
from tests.scheduler.test_cache_events import Replay, finish

BUCKETS = Buckets(powers(64), powers(8))
OUT, IN = (PageState.ACTIVE, PageState.HOST), (PageState.HOST, PageState.ACTIVE)


def tiers(copies) -> list[tuple[PageState, PageState]]:
    return [(copy.source_tier, copy.destination_tier) for copy in copies]


def small_pool(num_pages: int = 5, host: int = 3) -> PagePool:
    return PagePool(num_pages, 1, host, caches_on_host=True)


def host_pages(pool: PagePool, tokens, salt: str = "s") -> list[int | None]:
    return [pool.host.page_of(key) for key in keys_of(pool, tokens, salt)]


# ----------------------------------------------------------------------------------------------------------- the pool


def test_a_reclaimed_page_moves_to_the_host_and_comes_back_with_its_key():
    pool = small_pool()
    pages = cached(pool, [1, 2])
    held = taken(pool, 4)
    out = pool.take_copies()
    assert tiers(out) == [OUT, OUT]
    assert [copy.source for copy in out] == pages[::-1], "the later page is reclaimed first"
    assert pool.take_copies() == []
    assert pool.find(keys_of(pool, [1, 2], "s")) == []
    pool.release(held)
    stored = host_pages(pool, [1, 2])
    back = pool.fetch([page for page in stored if page is not None])
    assert back is not None
    assert tiers(back) == [IN, IN]
    assert [copy.source for copy in back] == stored
    table = [copy.destination for copy in back]
    assert pool.find(keys_of(pool, [1, 2], "s")) == table
    assert pool.host.num_cached == 0
    pool.check_integrity([table])


def test_a_page_that_is_on_the_host_already_is_not_copied_again():
    pool = small_pool()
    cached(pool, [1])
    pool.release(taken(pool, 4))
    assert len(pool.take_copies()) == 1
    cached(pool, [1])  # computed again
    cached(pool, [2])
    pool.release(taken(pool, 4))
    assert [copy.destination for copy in pool.take_copies()] == host_pages(pool, [2])
    assert pool.host.num_cached == 2


def test_swapped_sequences_take_the_place_of_cached_pages_and_not_the_reverse():
    pool = small_pool(num_pages=5, host=2)
    cached(pool, [1, 2])
    pool.release(taken(pool, 4))
    assert pool.host.num_cached == 2
    swapped = taken(pool, 2)
    out = pool.move(swapped, PageState.HOST)
    assert out is not None
    assert (pool.host.num_cached, pool.host.num_held) == (0, 2)
    assert pool.host.evictions["swap"] == 2
    pool.take_copies()
    cached(pool, [3])
    pool.release(taken(pool, 4))
    assert pool.take_copies() == [], "host memory is full of what must not be lost"
    pool.check_integrity([], [[copy.destination for copy in out]])


def test_the_host_page_used_longest_ago_goes_first():
    pool = small_pool(num_pages=5, host=2)
    for token in (1, 2, 1, 3):  # the second 1 is computed again, which counts as a use
        cached(pool, [token])
        pool.release(taken(pool, 4))
    assert [host_pages(pool, [token])[0] is not None for token in (1, 2, 3)] == [True, False, True]
    assert pool.host.evictions["capacity"] == 1


def test_a_step_copies_no_more_than_it_may():
    pool = small_pool(num_pages=5, host=3)
    pool.host_copies.limit = 1
    cached(pool, [1, 2, 3])
    pool.release(taken(pool, 4))
    assert len(pool.take_copies()) == 1
    pool.start_step()
    cached(pool, [4])
    pool.release(taken(pool, 4))
    assert len(pool.take_copies()) == 1


def test_a_flush_empties_the_host_and_a_lost_device_does_not():
    pool = small_pool()
    cached(pool, [1])
    pool.release(taken(pool, 4))
    pool.take_copies()
    pool.forget("lost")
    assert host_pages(pool, [1]) != [None]
    cached(pool, [2])
    pool.release(taken(pool, 4))
    pool.forget("lost")
    assert host_pages(pool, [2]) == [None], "its copy will read pages that are lost"
    pool.forget("flush")
    assert (pool.host.num_cached, pool.host.evictions) == (0, {"capacity": 0, "swap": 0, "flush": 1, "lost": 1})
    pool.check_integrity([])


def test_what_is_to_be_written_when_a_flush_comes_is_not():
    pool = small_pool(host=1)
    pool.host.on_disk = set()
    for tokens in ([1], [2]):
        cached(pool, tokens)
        pool.release(taken(pool, 4))
    pool.forget("flush")
    assert tiers(pool.take_copies()) == [OUT, OUT]
    assert (pool.host.on_disk, pool.host.num_free) == (set(), 1)
    pool.check_integrity([])


def test_what_leaves_the_host_is_written_before_its_place_is_taken_and_once():
    pool = small_pool(host=1)
    pool.host.on_disk = set()
    for tokens in ([1], [2]):
        cached(pool, tokens)
        pool.release(taken(pool, 4))
    copies = pool.take_copies()
    assert tiers(copies) == [OUT, (PageState.HOST, PageState.DISK), OUT]
    assert copies[0].destination == copies[1].source == copies[2].destination
    assert pool.host.on_disk == {copies[1].key} == set(keys_of(pool, [1], "s"))
    cached(pool, [1])
    pool.release(taken(pool, 4))
    cached(pool, [3])
    pool.release(taken(pool, 4))
    written = [copy.key for copy in pool.take_copies() if copy.destination_tier is PageState.DISK]
    assert written == list(keys_of(pool, [2], "s")), "1 is there already"
    pool.forget("lost")
    pool.check_integrity([])


def test_pages_read_from_disk_are_found_when_they_are_there():
    pool = small_pool(host=2)
    key, other = (next(keys_of(pool, [token], "s")) for token in (1, 2))
    pool.host.on_disk = {key, other}
    (number,) = pool.load([HeldPage(key)])
    assert pool.load([HeldPage(key)]) == [number], "it is being read"
    (copy,) = pool.take_copies()
    assert (copy.source, copy.source_tier, copy.destination_tier, copy.key) == (
        number,
        PageState.DISK,
        PageState.HOST,
        key,
    )
    assert (pool.host.num_loading, host_pages(pool, [1])) == (1, [None])
    pool.check_integrity([])
    assert pool.host.loaded(number, found=True) == copy.destination == host_pages(pool, [1])[0]
    (number,) = pool.load([HeldPage(other)])
    assert pool.host.loaded(number, found=False) is None
    assert pool.host.on_disk == {key}
    (number,) = pool.load([HeldPage(other)])
    pool.forget("flush")
    assert pool.host.loaded(number, found=True) is None, "nobody wants it any more"
    pool.check_integrity([])


def test_a_copy_that_did_not_take_place_is_forgotten():
    pool = small_pool()
    cached(pool, [1])
    pool.release(taken(pool, 4))
    (copy,) = pool.take_copies()
    pool.lost_copies([copy.destination])
    assert (host_pages(pool, [1]), pool.host.num_free) == ([None], 3)


@budget(40)
@given(st.integers(0, 2**32))
def test_what_comes_back_is_what_was_there(seed):
    """Random sequences that begin alike, swapped and not: a memory shows what each copy really moves."""
    rng = random.Random(seed)
    pool = PagePool(9, 1, rng.choice((1, 3, 6)), caches_on_host=True)
    memory: dict[tuple[PageState, int], object] = {}
    tables: list[tuple[list[int], list[int], bool]] = []  # tokens, pages, on the host

    def perform(copies) -> None:
        for copy in copies:
            memory[copy.destination_tier, copy.destination] = memory[copy.source_tier, copy.source]

    for _ in range(120):
        kind = rng.choice(("start", "start", "end", "swap"))
        if kind == "start":
            tokens = [rng.randint(1, 2) for _ in range(rng.randint(1, 6))]
            keys = list(keys_of(pool, tokens, "s"))
            found = pool.find(keys)
            pool.share(found)
            more = []
            for key in keys[len(found) :]:
                page = pool.host.page_of(key)
                if page is None or pool.page_of(key) is not None:
                    break
                more.append(page)
            if len(tokens) - len(found) > pool.num_available:
                pool.release(found)
                continue
            back = pool.fetch(more) or ()
            perform(pool.take_copies())
            perform(back)
            table = [*found, *(copy.destination for copy in back)]
            for length, page in enumerate(table, start=1):
                assert memory[PageState.ACTIVE, page] == tuple(tokens[:length])
            fresh = taken(pool, len(tokens) - len(table))
            perform(pool.take_copies())
            for page in fresh:
                table.append(page)
                memory[PageState.ACTIVE, page] = tuple(tokens[: len(table)])
            commit(pool, table, tokens)
            tables.append((tokens, table, False))
        elif tables:
            tokens, table, swapped = tables.pop(rng.randrange(len(tables)))
            if kind == "end":
                (pool.release_host if swapped else pool.release)(table)
                continue
            copies = pool.move(table, PageState.ACTIVE if swapped else PageState.HOST)
            perform(pool.take_copies())
            perform(copies or ())
            if copies is not None:
                table, swapped = [copy.destination for copy in copies], not swapped
            tables.append((tokens, table, swapped))
        pool.check_integrity([table for _, table, out in tables if not out], [table for _, table, out in tables if out])
        host = pool.host
        assert host.num_free + host.num_held + host.num_cached == host.num_pages


# -------------------------------------------------------------------------------------------------------- the scheduler


def served(num_pages: int = 13, host: int = 24, **others) -> tuple[Scheduler, FakeRunner]:
    """A scheduler of sequences of up to 12 pages, over the fake runner."""
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64)
    pool = PagePool(num_pages, 4, host, caches_on_host=True)
    scheduler = Scheduler(config, pool, Buckets(powers(64), powers(4)), content_keys=ContentKeys(b"a secret"), **others)
    windows = others.get("group_windows", (None,))
    return scheduler, FakeRunner(num_pages=num_pages, num_host_pages=host, group_windows=windows)


def ask(name: str, first: int, length: int = 24, **options) -> EngineRequest:
    return EngineRequest(name, tuple(range(first, first + length)), 2, options=RequestOptions(**options))


def serve(scheduler: Scheduler, runner: FakeRunner, request: EngineRequest) -> int:
    """Serves a request alone; returns how many tokens it found."""
    sequence = scheduler.add(request)
    finish(scheduler, runner)
    return sequence.num_cached_tokens


def crowd_out(scheduler: Scheduler, runner: FakeRunner) -> None:
    """Serves a request that takes nearly all pages."""
    serve(scheduler, runner, ask("crowd", 30, 45, prefix_caching=False))


@pytest.mark.parametrize("windows", [(None,), (9,), (None, 9)])
def test_a_request_finds_what_is_in_host_memory(windows):
    scheduler, runner = served(13 * len(windows), 24 * len(windows), group_windows=windows)
    assert serve(scheduler, runner, ask("a", 1)) == 0
    crowd_out(scheduler, runner)
    assert scheduler.pool.host.num_cached > 0
    assert serve(scheduler, runner, ask("b", 1)) == 20
    counts = scheduler.prefix_counts
    assert (counts.host_hits, scheduler.prefix_cache.fetches.counts.fetched) == (1, 1)
    assert counts.hit_tokens == 20 >= counts.host_hit_tokens > 0
    assert runner.page_copies()["in"].pages <= sum(-(-min(window or 20, 20) // 4) + 1 for window in windows)


@pytest.mark.parametrize(
    "other", [{"tenant": "t"}, {"cache_salt": "s"}, {"prefix_caching": False}], ids=["tenant", "salt", "opts out"]
)
def test_host_memory_is_not_shared_further_than_the_device(other):
    scheduler, runner = served()
    serve(scheduler, runner, ask("a", 1))
    crowd_out(scheduler, runner)
    assert serve(scheduler, runner, ask("b", 1, **other)) == 0


def test_a_flush_leaves_nothing_to_find():
    scheduler, runner = served()
    serve(scheduler, runner, ask("a", 1))
    crowd_out(scheduler, runner)
    scheduler.flush_prefix_cache()
    assert serve(scheduler, runner, ask("b", 1)) == 0


def test_what_a_lost_step_was_to_copy_is_not_found_and_the_rest_is():
    scheduler, runner = served()
    serve(scheduler, runner, ask("a", 1))
    crowd_out(scheduler, runner)
    scheduler.add(ask("c", 60))
    plan = scheduler.schedule()
    assert plan is not None
    lost = [copy.destination for copy in plan.copies if copy.destination_tier is PageState.HOST]
    kept = set(scheduler.pool.host._cached) - set(lost)
    scheduler.restart(plan.copies)
    runner.reset()
    assert set(scheduler.pool.host._cached) == kept
    assert kept
    finish(scheduler, runner)
    assert serve(scheduler, runner, ask("b", 1)) == 20


def test_events_name_a_page_until_it_is_on_neither_tier():
    scheduler, runner = served(host=8)
    log, replay = CacheEventLog(), Replay()
    scheduler.prefix_cache.record(log)
    for number in range(12):
        serve(scheduler, runner, ask(f"r{number}", 1 + 20 * (number % 4), 16 + number))
        replay.take(log)
        pool = scheduler.pool
        findable = {*pool.contents.page_of_key, *pool.host._page_of_key}
        assert len(replay.known) == len(findable)
    scheduler.flush_prefix_cache()
    replay.take(log)
    assert not replay.known


@pytest.mark.parametrize(("seconds", "fetches"), [(0.9e-3, True), (1.3e-3, False)])
def test_pages_come_back_where_that_is_predicted_to_be_faster(seconds, fetches):
    """A step takes 1 ms a token: 20 tokens cost 32 - 8 = 24, padded, and five pages five times `seconds` a token."""
    costs = PreemptionCosts(1e-3, 1.0, 4 * seconds)
    scheduler, runner = served(costs=costs)
    serve(scheduler, runner, ask("a", 1))
    crowd_out(scheduler, runner)
    found = serve(scheduler, runner, ask("b", 1))
    counts = scheduler.prefix_cache.fetches.counts
    assert (counts.fetched, counts.computed) == (int(fetches), int(not fetches))
    assert (found == 20) is fetches


# --------------------------------------------------------------------------------------------------------- the costs


def predictor(page_seconds: float, pace: int = 64) -> FetchPredictor:
    return FetchPredictor(lambda shape: 10.0 + shape.token_bucket, page_seconds, BUCKETS, pace)


def test_both_ways_are_predicted_in_steps():
    both = fetch_and_compute_seconds(predictor(2.0), start=0, fetched=48, pages=12, own=16)
    assert both == (12 * 2.0 + 10 + 16, 10 + 64)
    both = fetch_and_compute_seconds(predictor(2.0, pace=16), start=16, fetched=32, pages=4, own=8)
    assert both == (4 * 2.0 + 10 + 8, 2 * (10 + 16) + 10 + 8)


def test_the_choice_changes_where_the_copies_cost_what_the_steps_do():
    """48 of 64 tokens in 12 pages: the step is shorter by 48."""
    for page_seconds, fetches in ((3.99, True), (4.01, False)):
        choice = HostFetches(predictor(page_seconds)).choose(0, 48, 12, 64)
        assert choice.fetches is fetches
        assert choice.margin == pytest.approx(0.12)


def test_copies_that_save_only_padding_are_not_made():
    """Of 64 tokens 60 take as long."""
    assert not HostFetches(predictor(0.01)).choose(0, 4, 1, 64).fetches
    assert HostFetches(predictor(0.01)).choose(0, 32, 8, 64).fetches


def test_without_measurements_pages_come_back():
    assert HostFetches(None).choose(0, 4, 1, 64).fetches


def test_predictions_agree_with_the_measured_step():
    costs = PreemptionCosts(0.5, 1.0)
    seconds = measured_seconds(lambda shape: 7.0 * shape.token_bucket, costs, BUCKETS)
    assert seconds(chunk_shape(0, 64, BUCKETS)) == pytest.approx(32.0)
    assert seconds(chunk_shape(0, 16, BUCKETS)) == pytest.approx(8.0)
    assert measured_seconds(None, costs, BUCKETS)(chunk_shape(0, 16, BUCKETS)) == 8.0
    assert costs.fetch_seconds == 0.5
    assert PreemptionCosts(0.5, 1.0, 0.75).fetch_seconds == 0.75


def test_configured_costs_replace_measured_ones():
    config = PreemptionConfig(recompute_seconds_per_token=3.0)
    assert configured_costs(config, None) is None
    assert configured_costs(config, PreemptionCosts(1.0, 2.0, 1.5)) == PreemptionCosts(3.0, 2.0, 1.5)
    config = PreemptionConfig(swap_seconds_per_page=3.0)
    assert configured_costs(config, PreemptionCosts(1.0, 2.0, 1.5)) == PreemptionCosts(1.0, 3.0)


@pytest.mark.parametrize(("late", "wrong"), [(1.0, 0), (30.0, 1)])
def test_a_choice_is_wrong_where_its_step_is_later_than_the_other_would_have_been(late, wrong):
    scheduler, runner = served()
    fetches = HostFetches(predictor(2.0))
    now = lasts = 0.0
    for number in range(5):
        scheduler.add(ask(f"r{number}", 1 + 25 * number))
        plan = scheduler.schedule()
        assert plan is not None
        if number == 2:
            choice = fetches.choose(0, 48, 12, 64)
            assert choice.margin == 24.0
            fetches.chosen(choice)
        fetches.planned(plan, now)
        now += lasts  # the next one is planned when the step before has ended
        lasts = 10.0 + plan.token_bucket + (late if number == 2 else 0.0) + 2.0 * len(plan.copies)
        scheduler.update(plan, runner.collect(dispatch(runner, plan)))
    fetches.planned(None, now)
    assert (fetches.counts.fetched, fetches.counts.wrong) == (1, wrong)


@pytest.mark.parametrize("windows", [(None,), (None, 9)])
def test_histories_bring_pages_back(windows):
    """Tokens are those of each request alone, and accounts hold after every step (tests/scheduler/history.py)."""
    events: Counter[str] = Counter()
    for seed in range(8):
        events += run_history(seed, ("continuous", "separated")[seed % 2], "greedy", "fcfs", 60, windows)
    for kind in ("fetched", "host evictions", "swapped in", "recomputed"):
        assert events[kind] > 0, f"{kind}: {events}"
