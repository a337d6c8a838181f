"""Pages whose keys are derived when they are looked up are found, shared and reclaimed as if they had keys at once."""

import random

import numpy as np
import pytest

from jaxserve.kv_cache.content_keys import ContentKeys
from jaxserve.kv_cache.eviction import make_eviction
from jaxserve.kv_cache.page_groups import PageGroups
from jaxserve.kv_cache.page_pool import PagePool, PageState
from jaxserve.request import EngineRequest, RequestStatus
from jaxserve.scheduler.prefix_cache import PrefixCache
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.shared_prompt import SharedPrompt

PAGE = 2
SECRET = bytes(range(16))


class CountingKeys(ContentKeys):
    """Content keys that count the pages hashed."""

    hashed = 0

    def links(self, previous, tokens, page_size):
        self.hashed += len(tokens) // page_size
        return super().links(previous, tokens, page_size)


class Side:
    """A pool and a prefix cache that run sequences without a scheduler."""

    def __init__(self, num_pages, defers=True, policy="lru"):
        self.keys = CountingKeys(SECRET)
        self.pool = PagePool(num_pages, PAGE, eviction=make_eviction(policy))
        self.cache = PrefixCache(self.pool, self.keys, PageGroups(PAGE))
        self.cache._defers &= defers
        self.running: list[Sequence] = []
        self.orders = 0
        self.memory: dict[int, tuple[int, ...]] = {}  # of each page the tokens before its end, when it was written

    def sequence(self, tokens):
        self.orders += 1
        return Sequence(EngineRequest(str(self.orders), tuple(tokens), max_tokens=64), self.orders)

    def start(self, tokens, sampled=False):
        """Admits a request if it fits; returns the number of pages that it found. sampled: as one of several samples,
        whose pages have their keys at once."""
        sequence = self.sequence(tokens)
        sequence.prompt = SharedPrompt(len(tokens), PAGE, [0]) if sampled else None
        found = self.look(sequence)
        needed = -(-(len(tokens) + 8) // PAGE) - len(found)
        if needed + self.pool.num_unreferenced(found.live) > self.pool.num_available:
            return len(found)
        self.pool.share(found.live)
        sequence.pages = [*found.live, *(self.pool.allocate(needed) or ())]
        self.cache.admitted(sequence, found)
        sequence.status = RequestStatus.RUNNING
        sequence.num_computed = len(found) * PAGE
        self.running.append(sequence)
        return len(found)

    def look(self, sequence):
        """Returns what a look-up finds; every page must hold the tokens that it is found for."""
        found = self.cache.find(sequence)
        for index, page in enumerate(found.live):
            assert self.memory[page] == sequence.known_token_ids(0, (index + 1) * PAGE)
        return found

    def write(self, sequence, end):
        """Computes the tokens of a sequence up to `end`."""
        for index in range(sequence.num_computed // PAGE, -(-end // PAGE)):
            assert self.pool.writable(sequence.pages[index])
            self.memory[sequence.pages[index]] = sequence.known_token_ids(0, min(end, (index + 1) * PAGE))
        sequence.num_computed = end

    def compute(self, index, count):
        """Computes up to `count` further tokens of a prompt, and commits them."""
        sequence = self.running[index % len(self.running)]
        self.write(sequence, min(sequence.num_known, sequence.num_computed + count))
        self.cache._commit(sequence, sequence.num_computed)

    def finish(self, index, outputs):
        """Ends a sequence, with these tokens behind its prompt."""
        sequence = self.running.pop(index % len(self.running))
        if sequence.num_computed == sequence.num_known:
            sequence.output_token_ids += outputs
            self.write(sequence, sequence.num_known)
        self.cache.leaves(sequence, sequence.num_known)
        self.pool.release(sequence.pages, sequence.deferred)
        sequence.num_committed, sequence.deferred, sequence.pages = 0, None, []

    def flush(self):
        for sequence in self.running:
            sequence.num_committed = 0
        self.cache.forget("flush")

    def state(self):
        pool = self.pool
        pool.check_integrity([sequence.pages for sequence in self.running])
        return pool.num_free, pool.num_cached, dict(pool.evictions)


def operation(rng: random.Random, num_ids: int) -> tuple:
    """What happens next, with its arguments. num_ids: of different tokens."""
    tokens = [rng.randrange(num_ids) for _ in range(rng.randrange(1, 17))]
    name = rng.choices(["start", "compute", "finish", "look", "flush"], [5, 8, 4, 2, 0.1])[0]
    match name:
        case "start":
            return name, tokens, rng.random() < 0.15
        case "compute":
            return name, rng.randrange(10), rng.randrange(1, 9)
        case "finish":
            return name, rng.randrange(10), [rng.randrange(num_ids) for _ in range(rng.randrange(9))]
        case "look":
            return name, tokens
    return (name,)


def played(num_pages: int, seed: int, *, defers: bool, num_ids: int = 2) -> tuple[list, Side]:
    """What a history of operations finds, and what the pool is like after each of them."""
    rng, side, results = random.Random(seed), Side(num_pages, defers), []
    for _ in range(120):
        name, *arguments = operation(rng, num_ids)
        if name == "look":
            results.append(len(side.look(side.sequence(*arguments))))
        elif name in ("start", "flush") or side.running:
            results.append(getattr(side, name)(*arguments))
        results.append(side.state())
    while side.running:
        side.finish(0, [])
    return [*results, side.state()], side


def _numbers(history: tuple[list, Side]) -> list[int]:
    return [result for result in history[0] if isinstance(result, int)]


def test_histories_are_those_of_keys_derived_at_once():
    """Found pages, free and cached pages and evictions are the same after every operation."""
    evicted = hashed = 0
    for seed in range(60):
        found, side = played(6 + seed % 40, seed, defers=True)
        expected, at_once = played(6 + seed % 40, seed, defers=False)
        assert found == expected, seed
        assert side.pool.num_used == 0
        evicted += side.pool.evictions["capacity"]
        hashed += at_once.keys.hashed - side.keys.hashed
    assert evicted > 500
    assert hashed > 0


def test_what_is_found_was_computed_for_these_tokens():
    """Prompts of one token only, which differ in length: many pages have the same content, and the beginning of what is
    cached is often reclaimed before its end."""
    found = sum(
        number for seed in range(60) for number in _numbers(played(12 + seed % 60, seed, defers=True, num_ids=1))
    )
    assert found > 1000


def test_a_request_that_nobody_follows_has_one_page_hashed():
    side = Side(64)
    side.start(range(40))
    side.compute(0, 12)
    side.compute(0, 28)
    side.finish(0, [7, 7, 7, 7])
    assert side.pool.num_cached == 22
    assert side.keys.hashed == 1
    side.state()


def test_a_look_up_hashes_about_as_many_pages_as_it_finds():
    side = Side(1024)
    side.start(range(1000))
    side.compute(0, 1000)
    side.finish(0, [])
    before = side.keys.hashed
    assert side.start([*range(20), -1, -1, -1]) == 10
    assert side.keys.hashed - before <= 4 * 10
    side.finish(0, [])
    assert side.start(range(1002)) == 500


def test_a_prompt_is_found_while_it_is_computed():
    side = Side(64)
    side.start(range(40))
    side.compute(0, 12)
    assert len(side.cache.find(side.sequence(range(40)))) == 6
    side.compute(0, 12)
    assert len(side.cache.find(side.sequence(range(40)))) == 12


def test_pages_without_keys_are_reclaimed_from_the_end_and_the_oldest_request_first():
    side = Side(22)
    for first in (0, 100):
        side.start(range(first, first + 12))
        side.compute(0, 12)
        side.finish(0, [])
    taken = side.pool.allocate(side.pool.num_free + 4)
    assert taken is not None
    assert [side.pool.state(page) for page in taken] == [PageState.ACTIVE] * len(taken)
    found = [len(side.cache.find(side.sequence(range(first, first + 14)))) for first in (0, 100)]
    assert found == [2, 6]
    side.pool.release(taken)
    assert side.pool.evictions["capacity"] == 4


@pytest.mark.parametrize("policy", ["lfu", "cost"])
def test_orders_that_weigh_pages_have_their_keys_at_once(policy):
    side = Side(64, policy=policy)
    side.start(np.arange(12).tolist())
    side.compute(0, 12)
    assert side.keys.hashed == 6


@pytest.mark.parametrize("sampled", [False, True])
def test_a_prompt_that_two_compute_at_once_is_cached_once(sampled):
    for defers in (True, False):
        side = Side(64, defers=defers)
        for second in (False, True):
            side.start(range(24), second and sampled)
        side.compute(0, 24)
        side.compute(1, 24)
        for _ in range(2):
            side.finish(0, [])
        assert side.pool.num_cached == 12
        assert len(side.cache.find(side.sequence(range(26)))) == 12
        side.state()


def test_pages_found_behind_others_that_were_reclaimed_are_cached_once():
    """The end of a prompt is cached, its beginning is reclaimed and computed again: a look-up then finds both ends."""
    for defers in (True, False):
        side = Side(64, defers=defers)
        side.start(range(8))
        side.start(range(16))
        side.compute(0, 8)
        side.compute(1, 16)
        side.finish(0, [])
        side.finish(0, [])
        taken = side.pool.allocate(side.pool.num_free + 4)
        assert taken is not None
        side.pool.release(taken)
        assert side.start(range(24)) == 0
        side.compute(0, 24)
        side.finish(0, [])
        assert side.start(range(26)) == 12
        assert side.pool.num_cached == 0
        side.state()
        side.finish(0, [])
        assert side.pool.num_cached == 12
        side.state()


def test_a_running_prompt_behind_a_page_that_another_caches_stays_findable():
    """The found copy of a page in the middle is reclaimed while a sequence that has another one still runs."""
    side = Side(64)
    side.start(range(6))
    side.start(range(8))
    side.compute(0, 6)
    side.compute(1, 8)
    side.finish(0, [])
    side.finish(0, [])
    taken = side.pool.allocate(side.pool.num_free + 3)
    assert taken is not None
    side.pool.release(taken)
    assert side.start(range(24)) == 0
    side.compute(0, 24)
    assert len(side.cache.find(side.sequence(range(5)))) == 2
    taken = side.pool.allocate(side.pool.num_available)
    assert taken is not None
    side.finish(0, [])
    side.pool.release(taken)
    assert len(side.cache.find(side.sequence(range(26)))) == 12
    side.state()
