"""Replays of a prefix cache without an engine, against sets of prefixes, a pool of real keys and the engine."""

import dataclasses
import json
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.kv_cache.content_keys import ContentKeys
from jaxserve.kv_cache.page_pool import PagePool
from jaxserve.simulator.cache_replay import block_bound, infinite_cache, page_keys, replay_cache
from jaxserve.simulator.conversations import ConversationConfig, conversation_trace
from jaxserve.simulator.prompt_content import Content, answer_content
from jaxserve.simulator.simulation import simulate
from jaxserve.simulator.trace_files import read_trace
from jaxserve.simulator.traces import Trace, make_trace
from tests.budgets import budget
from tests.simulator.helpers import SimpleCosts, make_config, make_device

SIZE = 4


@st.composite
def traces(draw) -> Trace:
    runs = st.lists(st.tuples(st.integers(2, 4), st.integers(1, 9)), min_size=1, max_size=5)
    prompts = [Content.of(each) for each in draw(st.lists(runs, min_size=1, max_size=12))]
    outputs = draw(st.lists(st.integers(1, 9), min_size=len(prompts), max_size=len(prompts)))
    tenants = draw(st.lists(st.sampled_from(["", "a"]), min_size=len(prompts), max_size=len(prompts)))
    return make_trace(
        "drawn",
        np.arange(float(len(prompts))),
        [len(prompt) for prompt in prompts],
        outputs,
        tenants=tenants,
        prompts=prompts,
        answers=10 + np.arange(len(prompts)),
    )


def said(trace: Trace, index: int) -> tuple[int, ...]:
    answer = answer_content(int(trace.answers[index]), int(trace.output_tokens[index]))
    return trace.prompts[index].token_ids() + answer.token_ids()[:-1]


def pages(trace: Trace, index: int) -> list[tuple]:
    """The tenant and every prefix of whole pages of what was said."""
    ids = said(trace, index)
    return [(trace.tenants[index], ids[:end]) for end in range(SIZE, len(ids) + 1, SIZE)]


def longest(known, prefixes: list[tuple], prompt_tokens: int) -> int:
    found = 0
    while found < (prompt_tokens - 1) // SIZE and prefixes[found] in known:
        found += 1
    return found


@given(traces())
def test_a_cache_without_end_finds_what_was_said_before(trace):
    known, hits = set(), []
    for index, length in enumerate(trace.prompt_tokens.tolist()):
        prefixes = pages(trace, index)
        hits.append(longest(known, prefixes, length))
        known |= set(prefixes)
    figures = infinite_cache(trace, SIZE)
    assert figures.hit_tokens == sum(hits) * SIZE
    assert figures.hits == np.count_nonzero(hits)
    assert figures.hit_rate == sum(hits) * SIZE / trace.prompt_tokens.sum()
    large = replay_cache(trace, PagePool(2000, SIZE))
    assert (large.hit_tokens, large.hits, large.skipped) == (figures.hit_tokens, figures.hits, 0)


@given(traces(), st.integers(2, 14))
def test_a_small_pool_finds_what_the_least_recently_used_pages_leave(trace, usable):
    """Against a list of prefixes of which the oldest go first, the end of a table before its beginning."""
    cached: OrderedDict[tuple, None] = OrderedDict()
    hit_tokens = skipped = 0
    for index, length in enumerate(trace.prompt_tokens.tolist()):
        prefixes = pages(trace, index)
        needed = -(-len(said(trace, index)) // SIZE)
        found = longest(cached, prefixes, length)
        if needed > usable:
            skipped += 1
            for prefix in reversed(prefixes[:found]):
                cached.move_to_end(prefix)
            continue
        for prefix in prefixes[:found]:
            del cached[prefix]
        while len(cached) > usable - needed:
            cached.popitem(last=False)
        for prefix in reversed(prefixes):
            cached[prefix] = None
        hit_tokens += found * SIZE
    pool = PagePool(usable + 1, SIZE)
    figures = replay_cache(trace, pool)
    pool.check_integrity(())
    assert (figures.hit_tokens, figures.skipped) == (hit_tokens, skipped)
    assert pool.num_used == 0


@given(traces(), st.integers(2, 14), st.integers(0, 6))
def test_host_memory_finds_what_the_pool_has_lost(trace, usable, host):
    """With room for everything, all that a cache without end finds; with less, no more than that."""
    bound = infinite_cache(trace, SIZE).hit_tokens
    alone = replay_cache(trace, PagePool(usable + 1, SIZE))
    for pages_of_host in (host, 2000):
        pool = PagePool(usable + 1, SIZE, pages_of_host, caches_on_host=True)
        figures = replay_cache(trace, pool)
        pool.check_integrity(())
        assert (figures.skipped, figures.host_tokens) == (alone.skipped, pages_of_host * SIZE)
        assert figures.host_hit_tokens <= figures.hit_tokens <= bound
        if not host and not pages_of_host:
            assert figures == alone
    if not figures.skipped:
        assert figures.hit_tokens == bound


@given(traces())
def test_keys_are_equal_where_those_of_token_ids_are(trace):
    chain = ContentKeys(b"0" * 16)
    seen: dict[int, bytes] = {}
    for index in range(len(trace)):
        ids, key = said(trace, index), chain.root(trace.tenants[index], "")
        for place, number in enumerate(page_keys(trace, index, SIZE)):
            key = chain.link(key, ids[place * SIZE : (place + 1) * SIZE])
            assert seen.setdefault(number, key) == key
    assert len(set(seen.values())) == len(seen)


@given(traces())
def test_seconds_are_those_of_the_pages_found(trace):
    cost = [1.0, 2.0, 4.0, 7.0, 11.0, 16.0] + [30.0] * 20
    known, found_seconds, seconds = set(), 0.0, 0.0
    for index, length in enumerate(trace.prompt_tokens.tolist()):
        prefixes = pages(trace, index)
        found_seconds += sum(cost[: longest(known, prefixes, length)])
        seconds += sum(cost[: length // SIZE])
        known |= set(prefixes)
    figures = infinite_cache(trace, SIZE, cost.__getitem__)
    assert (figures.hit_seconds, figures.prompt_seconds) == (found_seconds, seconds)
    assert replay_cache(trace, PagePool(2000, SIZE), page_seconds=cost.__getitem__) == dataclasses.replace(
        figures, pool_tokens=1999 * SIZE
    )
    assert infinite_cache(trace, SIZE).saved == 0.0


@budget(20)
@given(traces(), st.integers(1, 3))
def test_requests_in_flight_keep_their_pages(trace, in_flight):
    pool = PagePool(60, SIZE)
    few, many = replay_cache(trace, pool, in_flight), replay_cache(trace, PagePool(2000, SIZE), in_flight)
    pool.check_integrity(())
    assert few.hit_tokens <= many.hit_tokens == infinite_cache(trace, SIZE).hit_tokens


def test_the_engine_finds_as_much_where_requests_come_one_by_one():
    small = ConversationConfig(sessions=8, turns=4, shared=24, first=12, later=9, output=14, max_length=200, seed=5)
    trace = conversation_trace(dataclasses.replace(small, rate=1e-6, pause=1e-3))
    figures = infinite_cache(trace, 16)
    result = simulate(make_config(), trace, SimpleCosts(step=1e-6), make_device(2000))
    assert figures.hit_tokens == result.cached_tokens.sum() > 0


def test_the_bound_of_blocks_is_that_of_their_hashes(tmp_path):
    blocks = [[1, 2, 3], [1, 2, 4], [5], [1, 4, 3], [1, 2, 3]]
    lengths = [1100, 1200, 100, 1536, 1100]
    rows = [
        {"timestamp": place, "input_length": length, "output_length": 5, "hash_ids": ids}
        for place, (ids, length) in enumerate(zip(blocks, lengths, strict=True))
    ]
    (tmp_path / "cake.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    bound = block_bound(read_trace(tmp_path / "cake.jsonl"))
    assert (bound.blocks, bound.hit_blocks) == (13, 2 + 1 + 3)
    assert (bound.tokens, bound.hit_tokens) == (sum(lengths), 1024 + 512 + 1100)


def test_a_trace_without_content_finds_nothing():
    trace = make_trace("t", np.arange(4.0), 40, 5)
    assert infinite_cache(trace, 16).hit_rate == 0.0
    assert replay_cache(trace, PagePool(50, 16)).hit_tokens == 0
    assert block_bound(trace).blocks == 0


def test_faults_name_the_field():
    trace = make_trace("t", [0.0], 40, 5)
    with pytest.raises(ValueError, match="in_flight is 0"):
        replay_cache(trace, PagePool(50, 16), in_flight=0)
    with pytest.raises(ValueError, match="page_size is 0"):
        infinite_cache(trace, 0)
