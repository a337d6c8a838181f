"""Choices by step cost about prefixes, on both sides of where they change."""

import itertools

import pytest

from jaxserve.config.settings import EVICTION_POLICIES
from jaxserve.kv_cache.eviction import make_eviction
from jaxserve.scheduler.buckets import Buckets, powers
from jaxserve.scheduler.prefix_costs import chunk_shape, page_seconds, prefill_seconds, wait_and_compute_seconds

BUCKETS = Buckets(powers(64), powers(8))


def by_hand(shape) -> float:
    """A step of 10, and 1 a token of its bucket."""
    return 10.0 + shape.token_bucket


def both(leader: int, shared: int, own: int, pace: int = 64, budget: int = 64) -> tuple[float, float]:
    return wait_and_compute_seconds(
        by_hand, BUCKETS, start=0, leader=leader, shared=shared, own=own, pace=pace, budget=budget
    )


def test_prompts_are_predicted_in_steps():
    assert prefill_seconds(by_hand, 0, 100, 64, BUCKETS) == (10 + 64) + (10 + 64)  # 36 tokens are padded to 64
    assert prefill_seconds(by_hand, 0, 0, 64, BUCKETS) == 0


def test_a_leader_that_takes_the_whole_budget_is_waited_for():
    """Computing beside it is not possible, so it only adds the shared tokens."""
    assert both(leader=128, shared=128, own=16) == (2 * 74 + 26, 2 * 74 + 2 * 74 + 26)


def test_a_short_prefix_is_not_waited_for():
    """One step of both costs less than two steps, of which the second computes four tokens less."""
    assert both(leader=4, shared=4, own=8) == (18 + 18, 26)


def test_the_choice_changes_once_with_the_length_of_the_prefix():
    waits = [waits <= computes for waits, computes in (both(length, length, 8) for length in (4, 8, 16, 32, 64, 128))]
    assert waits == sorted(waits)
    assert waits[0] is False
    assert waits[-1] is True


def test_what_is_nearly_computed_is_waited_for():
    assert both(leader=4, shared=64, own=16, pace=4, budget=8) == (18 + 4 * 18, 18 + 19 * 18)  # padded to 8 a step


def test_both_are_as_slow_where_a_prompt_has_few_tokens_a_step():
    assert both(leader=64, shared=64, own=16, pace=8) == (8 * 18 + 2 * 18, 8 * 26 + 2 * 18)


def test_deeper_pages_cost_more_to_compute_again():
    seconds = page_seconds(lambda shape: shape.prefill_pairs, 16, BUCKETS)
    shape = chunk_shape(10 * 16, 64, BUCKETS)
    assert seconds(10) == pytest.approx(shape.prefill_pairs / 4)
    costs = [seconds(depth) for depth in range(0, 400, 8)]
    assert all(first < second for first, second in itertools.pairwise(costs))


def drained(eviction) -> list[int]:
    return [eviction.pop() for _ in range(len(eviction))]


def release(eviction, pages: list[int], uses: int) -> None:
    """A sequence of these pages ends."""
    later = None
    for depth in reversed(range(len(pages))):
        eviction.add(pages[depth], depth, uses, later)
        later = pages[depth]


@pytest.mark.parametrize("policy", EVICTION_POLICIES)
def test_later_pages_of_a_sequence_go_first(policy):
    eviction = make_eviction(policy, lambda depth: 1.0 + depth)
    release(eviction, [5, 3, 9, 1], uses=2)
    assert drained(eviction) == [1, 9, 3, 5]


def test_each_policy_has_its_order():
    orders = {}
    for policy in EVICTION_POLICIES:
        eviction = make_eviction(policy, lambda depth: 10.0 if depth else 1.0)
        release(eviction, [1, 2], uses=3)  # the page 1 is worth as much as the page behind it
        release(eviction, [3], uses=5)
        release(eviction, [4], uses=1)
        orders[policy] = drained(eviction)
    assert orders == {"lru": [2, 1, 3, 4], "lfu": [4, 2, 1, 3], "cost": [4, 3, 2, 1]}


def test_what_is_not_used_any_more_ages_under_cost_alone():
    for policy, first in (("lfu", 2), ("cost", 1)):
        eviction = make_eviction(policy)
        release(eviction, [1], uses=50)
        for turn in range(60):
            release(eviction, [2], uses=1 + turn % 2)
            if eviction.pop() == 1:
                break
        else:
            release(eviction, [2], uses=1)
        assert eviction.pop() == 2
        assert (1 in eviction) == (first == 2), policy


@pytest.mark.parametrize("policy", EVICTION_POLICIES)
def test_pages_in_use_again_are_not_reclaimed(policy):
    eviction = make_eviction(policy)
    for page in range(500):
        eviction.add(page, 0, 1, None)
        if page % 5:
            eviction.remove(page)
    assert set(eviction) == set(range(0, 500, 5))
    assert len(eviction) == 100
    assert sorted(drained(eviction)) == list(range(0, 500, 5))


def test_an_unknown_policy_is_refused():
    with pytest.raises(ValueError, match="eviction_policy is 'fifo'; it must be lru, lfu or cost"):
        make_eviction("fifo")
