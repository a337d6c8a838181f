"""Events of the prefix cache: whoever replays them knows pages that can be found, and all that requests have used."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from jaxserve.config.settings import SchedulerConfig
from jaxserve.kv_cache.content_keys import ContentKeys
from jaxserve.kv_cache.event_log import CacheEvent, CacheEventKind, CacheEventLog, page_hash
from jaxserve.kv_cache.page_groups import group_key, key_group
from jaxserve.kv_cache.page_pool import PagePool, PageState
from jaxserve.request import EngineRequest, RequestOptions
from jaxserve.runner.fake import FakeRunner
from jaxserve.scheduler import Scheduler
from tests.budgets import budget
from tests.scheduler.drive import make_scheduler
from tests.scheduler.pool_helpers import commit, taken

PAGE = 4
KEYS = ContentKeys(b"a secret")


class Replay:
    """What a reader knows: pages by hash, with tenant, salt's namespace, parent and tokens."""

    def __init__(self):
        self.known: dict[int, CacheEvent] = {}
        self.kinds: list[CacheEventKind] = []

    def take(self, log: CacheEventLog) -> None:
        for event in log.take():
            self.kinds.append(event.kind)
            match event.kind:
                case CacheEventKind.CLEARED:
                    self.known.clear()
                case CacheEventKind.REMOVED:
                    for name in event.hashes:
                        page = self.known.pop(name)
                        assert (page.tenant, page.group) == (event.tenant, event.group)
                case CacheEventKind.STORED:
                    parent = event.parent
                    for place, name in enumerate(event.hashes):
                        assert name not in self.known, "a page is told of twice"
                        tokens = event.token_ids[PAGE * place : PAGE * (place + 1)]
                        self.known[name] = CacheEvent(
                            event.kind,
                            event.tenant,
                            (name,),
                            parent,
                            tokens,
                            event.namespace,
                            group=event.group,
                            window=event.window,
                        )
                        parent = name

    def tokens(self, name: int) -> tuple[int, ...] | None:
        """All tokens up to a page's end; None where a page before it is not known."""
        found, place = (), name
        while place is not None:
            if place not in self.known:
                return None
            found, place = self.known[place].token_ids + found, self.known[place].parent
        return found


def finish(scheduler: Scheduler, runner: FakeRunner, steps: int = 10_000) -> None:
    """Runs up to so many steps, as the engine does: one is under way while the next is planned."""
    previous = None
    for _ in range(steps):
        plan = scheduler.schedule()
        pending = None if plan is None else (plan, runner.dispatch_forward(plan))
        if plan is not None:
            runner.dispatch_sample(plan)
        if previous is not None:
            scheduler.update(previous[0], runner.collect(previous[1]))
        previous = pending
        scheduler.check_integrity()
        if plan is None:
            return
    if previous is not None:
        scheduler.update(previous[0], runner.collect(previous[1]))


def served(num_pages: int = 17) -> tuple[Scheduler, FakeRunner]:
    config = SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=16)
    scheduler = make_scheduler(config, num_pages, PAGE, content_keys=KEYS, max_model_len=64)
    return scheduler, FakeRunner(num_pages=num_pages, page_size=PAGE, max_model_len=64)


def ask(name: str, tokens: list[int], output: int = 1, **options) -> EngineRequest:
    return EngineRequest(name, tuple(tokens), max_tokens=output, options=RequestOptions(**options))


def chain(tokens, tenant: str = "", salt: str = "") -> list[bytes]:
    keys, previous = [], KEYS.root(tenant, salt)
    for start in range(0, len(tokens) - PAGE + 1, PAGE):
        previous = KEYS.link(previous, tokens[start : start + PAGE])
        keys.append(previous)
    return keys


def test_nothing_is_recorded_while_nobody_follows():
    scheduler, runner = served()
    scheduler.add(ask("a", [*range(1, 13)]))
    finish(scheduler, runner)
    assert scheduler.pool.contents.event_log is None
    log = CacheEventLog()
    scheduler.prefix_cache.record(log)
    assert log.take() == ()
    scheduler.prefix_cache.record(None)
    scheduler.add(ask("b", [*range(20, 30)]))
    finish(scheduler, runner)
    assert log.take() == ()


def test_pages_are_told_of_with_their_tokens_parents_and_tenants():
    scheduler, runner = served()
    log, replay = CacheEventLog(), Replay()
    scheduler.prefix_cache.record(log)
    tokens = [*range(1, 14)]
    scheduler.add(ask("a", tokens, tenant="t", cache_salt="s"))
    finish(scheduler, runner)
    replay.take(log)
    names = [page_hash(key) for key in chain(tokens, "t", "s")]
    assert list(replay.known) == names
    assert replay.tokens(names[2]) == tuple(tokens[:12])
    assert {page.tenant for page in replay.known.values()} == {"t"}
    assert {page.namespace for page in replay.known.values()} == {page_hash(KEYS.root("t", "s"))}


def test_pages_from_before_become_known_when_a_request_uses_them():
    scheduler, runner = served()
    tokens = [*range(1, 14)]
    scheduler.add(ask("a", tokens))
    finish(scheduler, runner)
    log, replay = CacheEventLog(), Replay()
    scheduler.prefix_cache.record(log)
    scheduler.add(ask("b", [*tokens, 50, 51, 52]))
    finish(scheduler, runner)
    replay.take(log)
    assert list(replay.known) == [page_hash(key) for key in chain([*tokens, 50, 51, 52])]


def test_a_request_under_way_when_following_begins_is_told_of_from_its_first_page():
    scheduler, runner = served()
    tokens = [*range(1, 38)]
    scheduler.add(ask("a", tokens))
    finish(scheduler, runner, steps=2)
    log, replay = CacheEventLog(), Replay()
    scheduler.prefix_cache.record(log)
    finish(scheduler, runner)
    replay.take(log)
    assert sorted(replay.known) == sorted(page_hash(key) for key in chain(tokens))
    assert replay.tokens(page_hash(chain(tokens)[-1])) == tuple(tokens[:36])


def test_a_flush_clears_frees_and_leaves_running_requests_alone():
    expected, outputs = None, []
    for flushes in (False, True):
        scheduler, runner = served()
        log, replay = CacheEventLog(), Replay()
        scheduler.prefix_cache.record(log)
        scheduler.add(ask("done", [*range(60, 73)]))
        finish(scheduler, runner)
        running = scheduler.add(ask("a", [*range(1, 10)], output=12))
        finish(scheduler, runner, steps=4)
        if flushes:
            replay.take(log)
            known, cached = len(replay.known), scheduler.pool.num_cached
            assert scheduler.prefix_cache.forget("flush") == cached > 0
            replay.take(log)
            assert not replay.known
            assert scheduler.pool.evictions == {"capacity": 0, "flush": known, "lost": 0}
            assert known > cached, "some are in use"
        finish(scheduler, runner)
        outputs.append(list(running.output_token_ids))
        replay.take(log)
        expected = expected or set(replay.known)
        assert all(scheduler.pool.find([key]) for key in chain([*range(60, 73)])) is not flushes
    assert outputs[0] == outputs[1]
    assert len(outputs[0]) == 12


def test_what_was_swapped_out_is_not_found_after_a_flush():
    pool = PagePool(num_pages=6, page_size=1, num_host_pages=2)
    pages = taken(pool, 2)
    commit(pool, pages, [1, 2])
    host = [copy.destination for copy in pool.move(pages, PageState.HOST) or ()]
    assert pool.forget("flush") == 2
    back = [copy.destination for copy in pool.move(host, PageState.ACTIVE) or ()]
    pool.check_integrity([back])
    pool.release(back)
    assert (pool.num_cached, pool.num_free) == (0, 5)


prompts = st.lists(st.integers(1, 2), min_size=1, max_size=24)
histories = st.lists(
    st.tuples(prompts, st.integers(1, 9), st.sampled_from(["", "t"]), st.sampled_from(["", "s"]), st.integers(0, 6)),
    min_size=1,
    max_size=12,
)


@budget(25)
@given(histories, st.integers(0, 12))
def test_replayed_events_never_promise_what_cannot_be_found(history, flush_at):
    scheduler, runner = served(num_pages=13)
    log, replay = CacheEventLog(), Replay()
    scheduler.prefix_cache.record(log)
    for number, (tokens, output, tenant, salt, steps) in enumerate(history):
        scheduler.add(ask(f"r{number}", tokens, output, tenant=tenant, cache_salt=salt))
        finish(scheduler, runner, steps)
        if number == flush_at:
            scheduler.prefix_cache.forget("flush")
        replay.take(log)
        findable = {page_hash(key): key for key in scheduler.pool.contents.page_of_key}
        assert replay.known.keys() <= findable.keys()
        for name, page in replay.known.items():
            found = replay.tokens(name)
            if found is not None:  # recomputed from what the events say
                salts = {page_hash(KEYS.root(page.tenant, one)): one for one in ("", "s")}
                assert chain(found, page.tenant, salts[page.namespace])[-1] == findable[name]
    finish(scheduler, runner)
    scheduler.add(ask("last", [1] * 12))
    finish(scheduler, runner)
    replay.take(log)
    assert {page_hash(key) for key in chain([1] * 12)} <= replay.known.keys(), "what a request used just now is known"


@pytest.mark.parametrize("windows", [(None, 8), (8, None), (6, None, 9)])
def test_pages_of_every_group_of_layers_are_told_of_with_their_group(windows):
    """Of an alternating model what is known of each group is what can be found of it, also when the pool overflows."""
    config = SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=16)
    num_pages = 1 + 16 * len(windows)
    options = {"content_keys": KEYS, "max_model_len": 64, "group_windows": windows}
    scheduler = make_scheduler(config, num_pages, PAGE, **options)
    runner = FakeRunner(num_pages=num_pages, page_size=PAGE, max_model_len=64, group_windows=windows)
    log, replay = CacheEventLog(grouped=True), Replay()
    scheduler.prefix_cache.record(log)
    chains = []
    for number in range(12):
        tokens = [1 + number % 4, *range(2, 30 + number)]
        request = ask(str(number), tokens, output=6, tenant=f"t{number % 2}")
        chains.append((chain(tokens, request.options.tenant), tokens))
        scheduler.add(request)
        if number % 3 == 2:
            finish(scheduler, runner)
            replay.take(log)
            findable = {page_hash(key): key_group(key) for key in scheduler.pool.contents.page_of_key}
            assert {name: page.group for name, page in replay.known.items()} == findable
    assert {page.window for page in replay.known.values()} == set(windows)
    assert CacheEventKind.REMOVED in replay.kinds
    told = {name: page.token_ids for name, page in replay.known.items()}
    for keys, tokens in chains:
        for index, key in enumerate(keys):
            for group in range(len(windows)):
                name = page_hash(group_key(key, group))
                if name in told:
                    assert told[name] == tuple(tokens[PAGE * index : PAGE * (index + 1)])
                    before = page_hash(group_key(keys[index - 1], group)) if index else None
                    assert replay.known[name].parent == before
