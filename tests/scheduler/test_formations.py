"""Formations: whom they offer, against worked examples and a search of all that wait."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config.scheduling import AdmissionConfig, PolicyConfig, SchedulerConfig
from jaxserve.request import EngineRequest, RequestOptions
from jaxserve.scheduler.admission_order import FORMATIONS, tier
from jaxserve.scheduler.policies.named import POLICIES
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.step_time_estimator import StepTimeEstimator
from tests.scheduler.drive import make_scheduler, request


def joined(formation: str, requests: list[EngineRequest], now: float = 0.0, seqs: int = 3, **admission) -> list[str]:
    """Who joins the first step, in order."""
    config = SchedulerConfig(
        max_num_seqs=seqs,
        max_num_batched_tokens=2_000,
        formation=formation,
        admission=AdmissionConfig(**admission),
    )
    scheduler = make_scheduler(config, 1_000)
    for one in requests:
        scheduler.add(one)
    plan = scheduler.schedule(now)
    assert plan is not None
    return [row.request_id for row in plan.chunks]


def test_greedy_takes_the_queue_until_a_limit():
    requests = [request(name, prompt, 5) for name, prompt in (("a", 100), ("b", 3), ("c", 1_000), ("d", 3))]
    assert joined("greedy", requests) == ["a", "b", "c"]


def test_length_balanced_is_within_the_tolerance_of_the_anchor():
    """The anchor is the first of the queue: 100 tokens, so 80 to 120; then the next first is the anchor."""
    prompts = {"anchor": 100, "short": 70, "low": 82, "high": 118, "long": 130, "equal": 100}
    requests = [request(name, prompt, 5) for name, prompt in prompts.items()]
    assert joined("length_balanced", requests) == ["anchor", "low", "high"]
    assert joined("length_balanced", requests, seqs=6) == ["anchor", "low", "high", "equal", "short", "long"]
    assert joined("length_balanced", requests, length_tolerance=0.0) == ["anchor", "equal", "short"]


def test_priority_takes_the_highest_first():
    requests = [request(f"{priority}", 3, 5, priority=priority) for priority in (1, 9, 4, 9_000)]
    assert joined("priority", requests) == ["9000", "9", "4"]


@pytest.mark.parametrize(("priority", "expected"), [(-1, 0), (3, 0), (4, 1), (7, 1), (8, 2), (100, 2)])
def test_tiers(priority: int, expected: int):
    assert tier(priority) == expected


def test_hybrid_is_tiers_balanced_inside():
    requests = [
        request("low", 100, 5, priority=3),
        request("mid", 100, 5, priority=4),
        request("top", 100, 5, priority=8),
        request("top long", 300, 5, priority=12),
        request("top near", 110, 5, priority=9),
        request("mid high", 300, 5, priority=7),
        request("mid near", 90, 5, priority=4),
    ]
    in_order = ["top", "top near", "top long", "mid", "mid near", "mid high", "low"]
    assert joined("hybrid", requests, seqs=7) == in_order


def test_throughput_aware_takes_the_smallest_prompt_and_expected_output():
    requests = [request(name, prompt, output) for name, prompt, output in (("a", 9, 9), ("b", 15, 2), ("c", 1, 12))]
    assert joined("throughput", requests) == ["c", "b", "a"]


@pytest.mark.parametrize("formation", ["priority", "hybrid", "throughput"])
def test_nobody_is_passed_over_for_longer_than_allowed(formation: str):
    """The first of the queue is low and large; the others arrive later and suit the formation better."""
    requests = [request("old", 50, 50, arrival_time=0.0)]
    requests += [request(f"new{i}", 3, 3, priority=9, arrival_time=1.0) for i in range(5)]
    assert "old" not in joined(formation, requests, now=10.0)
    assert joined(formation, requests, now=10.1)[0] == "old"
    assert joined(formation, requests, now=2.0, max_passed_over_seconds=1.5)[0] == "old"


def draw_sequence(rng: random.Random, order: int) -> Sequence:
    one = EngineRequest(
        str(order),
        (1,) * rng.choice((rng.randint(1, 9), rng.randint(20, 60))),
        max_tokens=rng.randint(1, 30),
        options=RequestOptions(priority=rng.randint(0, 10)),
        arrival_time=order / 10,
    )
    return Sequence(one, order, float(one.max_tokens))


@pytest.mark.parametrize("policy", ["fcfs", "sjf"])
@pytest.mark.parametrize("formation", FORMATIONS)
@given(seed=st.integers(0, 2**32))
def test_offers_against_a_search_of_all_that_wait(formation: str, policy: str, seed: int):
    """Pushes and removals at random; now and then all offers of a step, each with what a search would choose."""
    rng = random.Random(seed)
    config = SchedulerConfig(formation=formation, admission=AdmissionConfig(max_passed_over_seconds=3.0))
    ordering = POLICIES[policy](PolicyConfig(), StepTimeEstimator())
    made = FORMATIONS[formation](ordering, config)
    waiting: list[Sequence] = []
    for order in range(80):
        now = order / 10
        if waiting and rng.random() < 0.25:
            gone = waiting.pop(rng.randrange(len(waiting)))
            made.remove(gone)
        else:
            waiting.append(draw_sequence(rng, order))
            made.push(waiting[-1])
        if rng.random() > 0.1:
            continue
        anchors: list[Sequence] = []
        count = rng.randint(1, len(waiting) + 1)
        for offered, _ in zip(made.candidates(now), range(count), strict=False):
            waiting.sort(key=lambda one: (*ordering.priority_key(one), one.order))
            assert offered in _wanted(formation, waiting, anchors, now)
            anchors.append(offered)
            waiting.remove(offered)
            made.remove(offered)
        if count > len(waiting) and not waiting:
            assert next(made.candidates(now), None) is None


def _wanted(formation: str, waiting: list[Sequence], offered: list[Sequence], now: float) -> list[Sequence]:
    """Whom a search of all would offer next, after those `offered` in this step; several where the rule leaves a
    choice. `waiting` is in the order of the queue."""
    passed_over = formation not in ("greedy", "length_balanced") and now - waiting[0].request.arrival_time > 3.0
    if formation == "greedy" or passed_over:
        return waiting[:1]
    if formation == "length_balanced":
        same = [one for one in waiting if offered and one.num_prompt_tokens == offered[-1].num_prompt_tokens]
        return _near(waiting, offered) if same else [*waiting[:1], *_near(waiting, offered)]
    if formation == "throughput":
        return [min(waiting, key=lambda one: (one.num_prompt_tokens + one.expected_output, one.order))]
    level = (lambda one: one.priority) if formation == "priority" else (lambda one: tier(one.priority))
    highest = max(map(level, waiting))
    members = [one for one in waiting if level(one) == highest]
    if formation == "priority":
        return members[:1]
    return [*members[:1], *_near(members, [one for one in offered if level(one) == highest])]


def _near(waiting: list[Sequence], anchors: list[Sequence]) -> list[Sequence]:
    """Those as long as one of the anchors, within the tolerance."""
    lengths = [anchor.num_prompt_tokens for anchor in anchors]
    return [one for one in waiting if any(0.8 * length <= one.num_prompt_tokens <= 1.2 * length for length in lengths)]
