"""Cached pages on disk, over the fake runner: what a new engine finds there, and what becomes of those that wait."""

from __future__ import annotations

from collections import defaultdict

import pytest

from jaxserve.config.scheduling import SchedulerConfig
from jaxserve.config.settings import CacheConfig, EngineConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.messages import AbortRequest, AddRequest, FlushPrefixCache, outputs
from jaxserve.request import EngineRequest, RequestOptions
from jaxserve.runner.fake import FakeDisk, FakeRunner, Page
from jaxserve.scheduler.preemption_costs import PreemptionCosts
from tests.scheduler.drive import alone

DEVICE_PAGES, HOST_PAGES = 13, 12


class Engine:
    """An engine whose requests hold most of its pages one after the other. stored: what is on disk."""

    def __init__(
        self,
        secret: str,
        stored: dict[bytes, Page],
        windows: tuple[int | None, ...] = (None,),
        costs: PreemptionCosts | None = None,
        page_seconds: float = 0.0,
    ):
        groups = len(windows)
        self.runner = FakeRunner(
            num_pages=DEVICE_PAGES * groups,
            num_host_pages=HOST_PAGES * groups,
            group_windows=windows,
            max_model_len=48,
            preemption_costs=costs,
        )
        self.runner.disk = self.disk = FakeDisk(self.runner._host_pages, stored)
        self.disk.page_seconds = page_seconds
        config = EngineConfig(
            model="fake",
            cache=CacheConfig(prefix_caching_secret_file=secret),
            scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64),
        )
        self.clock = 0.0
        self.core = EngineCore(config, self.runner, now=self.now)
        self.cached: dict[str, int] = {}
        self.windows = windows

    def now(self) -> float:
        self.clock += 1e-3
        return self.clock

    def serve(self, *requests: EngineRequest) -> list[int]:
        """Serves requests; returns how many tokens each found. Each must have the answer that it has alone."""
        tokens: dict[str, list[int]] = defaultdict(list)
        for one in requests:
            self.core.handle(AddRequest(one))
        while self.core.busy:
            for message in self.core.step():
                for output in outputs(message):
                    tokens[output.request_id] += output.token_ids
                    if output.finish_reason is not None:
                        self.cached[output.request_id] = output.num_cached_tokens
            self.core.check_integrity()
        for one in requests:
            assert tokens[one.request_id] == alone(one, windows=self.windows)[0]
        return [self.cached[one.request_id] for one in requests]


@pytest.fixture
def secret(tmp_path) -> str:
    (tmp_path / "secret").write_bytes(b"0123456789abcdef")
    return str(tmp_path / "secret")


def ask(name: str, first: int, **options) -> EngineRequest:
    return EngineRequest(name, tuple(range(first, first + 41)), 3, options=RequestOptions(**options))


FIRST = (1, 20, 40, 55)


def left_on_disk(secret) -> dict[bytes, Page]:
    """Returns what an engine leaves on disk that has answered one request and was stopped in order."""
    stored: dict[bytes, Page] = {}
    engine = Engine(secret, stored)
    engine.serve(ask("a", 1))
    engine.core.close()
    return stored


@pytest.mark.parametrize("windows", [(None,), (9,), (None, 9)])
def test_a_new_engine_finds_what_the_last_one_has_left(secret, windows):
    """Also what it still had on the device and in host memory when it was closed."""
    stored: dict[bytes, Page] = {}
    engine = Engine(secret, stored, windows)
    assert engine.serve(*(ask(f"r{first}", first) for first in FIRST)) == [0] * 4
    engine.core.close()
    assert stored
    again = Engine(secret, stored, windows)
    for first in reversed(FIRST):
        assert again.serve(ask(f"r{first}", first)) == [40]
    stats = again.core.stats()
    assert (stats.disk_choices["fetched"], stats.host_cache_hits) == (4, 4)


def test_pages_reach_the_disk_without_an_orderly_stop(secret):
    stored: dict[bytes, Page] = {}
    engine = Engine(secret, stored)
    for first in FIRST:
        engine.serve(ask(f"r{first}", first))
    assert stored
    again = Engine(secret, stored)
    assert sum(again.serve(*(ask(f"r{first}", first) for first in FIRST))) > 0


@pytest.mark.parametrize("other", [{"tenant": "t"}, {"cache_salt": "s"}, {"prefix_caching": False}])
def test_disk_is_not_shared_further_than_the_device(secret, other):
    stored = left_on_disk(secret)
    again = Engine(secret, stored)
    assert again.serve(ask("b", 1, **other)) == [0]
    assert again.serve(ask("a", 1)) == [40]


def test_pages_that_are_gone_are_computed_again_and_not_asked_for_twice(secret):
    stored = left_on_disk(secret)
    again = Engine(secret, stored)
    gone = again.core.scheduler.pool.host.on_disk
    assert gone
    stored.clear()
    assert again.serve(ask("a", 1)) == [0]
    assert not gone & set(again.disk.keys)


def test_a_flush_deletes_what_is_on_disk_and_ends_the_waits(secret):
    stored = left_on_disk(secret)
    again = Engine(secret, stored)
    again.core.handle(AddRequest(ask("a", 1)))
    again.core.step()
    assert again.core.scheduler.disk_waits.num_withheld == 1
    again.core.handle(FlushPrefixCache(1))
    assert (stored, again.core.scheduler.disk_waits.num_withheld) == ({}, 0)
    assert again.serve() == []
    assert again.cached["a"] == 0


def test_a_request_that_is_aborted_while_it_waits_leaves_nothing(secret):
    stored = left_on_disk(secret)
    again = Engine(secret, stored)
    again.core.handle(AddRequest(ask("a", 1)))
    again.core.step()
    again.core.handle(AbortRequest("a"))
    again.core.check_integrity()
    assert again.serve(ask("b", 1)) == [40]
    again.core.check_integrity()


@pytest.mark.parametrize(("page_seconds", "found"), [(3.4e-3, 40), (4.4e-3, 0)])
def test_pages_are_read_where_that_is_predicted_to_be_faster(secret, page_seconds, found):
    """Ten pages, host copies of 0, and 1 ms a token: 41 tokens are padded to 64 and the last one to 8."""
    stored = left_on_disk(secret)
    costs = PreemptionCosts(1e-3, 0.0, 0.0)
    again = Engine(secret, stored, costs=costs, page_seconds=page_seconds * 56 / 40)
    assert again.serve(ask("a", 1)) == [found]
    choices = again.core.stats().disk_choices
    assert (choices["fetched"], choices["computed"]) == (int(found > 0), int(not found))
