"""Policies: the order of those that wait, against sorting and against plain counters; the bounds they state."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config import scheduling
from jaxserve.config.scheduling import PolicyConfig, PreemptionConfig, SchedulerConfig
from jaxserve.request import EngineRequest, FinishReason, RequestOptions
from jaxserve.scheduler import Scheduler, StepPlan, StepResult, admission_order, modes
from jaxserve.scheduler.keyed_queue import PriorityKey
from jaxserve.scheduler.policies.fair import Fair
from jaxserve.scheduler.policies.named import LATE_FACTOR, POLICIES
from jaxserve.scheduler.policies.policy import Policy
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.step_time_estimator import StepTimeEstimator
from tests.scheduler.drive import make_scheduler, request


def take_step(scheduler: Scheduler, now: float = 0.0) -> StepPlan:
    plan = scheduler.schedule(now)
    assert plan is not None
    scheduler.update(plan, StepResult([1] * plan.num_sampled))
    return plan


def order_of_service(policy: str, requests: list[EngineRequest], now: float = 0.0, **ordering) -> list[str]:
    """Who is served first when one runs at a time."""
    config = SchedulerConfig(
        max_num_seqs=1,
        max_num_batched_tokens=64,
        policy=policy,
        ordering=PolicyConfig(**ordering),
        preemption=PreemptionConfig(preempt_priority_gap=None),
    )
    scheduler = make_scheduler(config)
    for one in requests:
        scheduler.add(one)
    seen = []
    while scheduler.unfinished:
        seen += [row.request_id for row in take_step(scheduler, now).chunks if row.admit]
    return seen


def test_first_come_first_served():
    assert order_of_service("fcfs", [request("a", 3, 9), request("b", 3, 1), request("c", 3, 5, priority=9)]) == [
        *"abc"
    ]


def test_shortest_job_first_and_what_waiting_makes_up_for():
    """Without stop ids max_tokens is expected. At 10 tokens a second, 2 seconds make up for 20 tokens."""
    requests = [
        request("long", 3, 40, arrival_time=0.0),
        request("short", 3, 19, arrival_time=2.0),
        request("as long", 3, 20, arrival_time=2.0),
        request("shortest", 3, 1, arrival_time=4.0),
    ]
    assert order_of_service("sjf", requests) == ["short", "long", "as long", "shortest"]
    assert order_of_service("sjf", requests, sjf_ageing=1.0) == ["shortest", "short", "as long", "long"]


@pytest.mark.parametrize(
    ("priority", "waited", "expected", "score"), [(0, 0, 1, -1), (3, 0, 50, -20), (5, 100, 20, 40)]
)
def test_score_of_priority(priority: int, waited: float, expected: int, score: float):
    """10 x priority + 0.1 x seconds waited - expected length, as it is at a time."""
    policy = POLICIES["priority"](PolicyConfig(), StepTimeEstimator())
    now = 1_000.0
    one = Sequence(request("a", 3, expected, priority=priority, arrival_time=now - waited), 0, float(expected))
    assert -policy.priority_key(one)[0] + 0.1 * now == pytest.approx(score)


def test_priority_ages_and_long_requests_pay():
    requests = [
        request("low", 3, 10, priority=0, arrival_time=0.0),
        request("high", 3, 10, priority=1, arrival_time=99.0),
        request("higher", 3, 30, priority=3, arrival_time=99.5),
        request("later", 3, 10, priority=1, arrival_time=101.0),
    ]
    assert order_of_service("priority", requests) == ["high", "higher", "low", "later"]


class LastComeFirstServed(Policy):
    def priority_key(self, sequence: Sequence) -> PriorityKey:
        return (-sequence.order,)


def test_a_policy_is_a_class_and_its_lines(monkeypatch):
    with pytest.raises(ValueError, match="policy is 'lcfs'; it must be one of fcfs, sjf, priority, fair, deadline"):
        SchedulerConfig(policy="lcfs")
    monkeypatch.setattr("jaxserve.config.scheduling.POLICIES", (*POLICIES, "lcfs"))
    monkeypatch.setitem(POLICIES, "lcfs", LastComeFirstServed)
    assert order_of_service("lcfs", [request(name, 3, 1) for name in "abc"]) == ["c", "b", "a"]


def test_settings_name_every_class():
    """The settings have names alone, so that they import no scheduler."""
    assert tuple(POLICIES) == scheduling.POLICIES
    assert tuple(admission_order.FORMATIONS) == scheduling.FORMATIONS
    assert tuple(modes.MODES) == scheduling.MODES


def test_weights_of_priority_are_settings():
    requests = [request("a", 3, 50, priority=1), request("b", 3, 1)]
    assert order_of_service("priority", requests) == ["b", "a"]
    assert order_of_service("priority", requests, priority_length_weight=0.1) == ["a", "b"]


def test_earliest_deadline_first():
    """Without a deadline of its own a request is due ttft_target after it arrived."""
    requests = [
        request("target", 3, 5, arrival_time=0.0),
        request("soon", 3, 5, arrival_time=0.5, deadline=0.9),
        request("late", 3, 5, arrival_time=0.2, deadline=50.0),
        request("next", 3, 5, arrival_time=0.7),
    ]
    assert order_of_service("deadline", requests) == ["soon", "target", "next", "late"]


def test_a_request_that_missed_its_target_is_served_after_those_that_can_meet_it():
    config = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=64, policy="deadline")
    scheduler = make_scheduler(config)
    for name, arrival in (("missed", 0.0), ("can", 1.5)):
        scheduler.add(request(name, 3, 1, arrival_time=arrival))
    assert scheduler.expire(2.0) == []
    assert take_step(scheduler, 2.0).rows[0].request_id == "can"
    scheduler.add(request("much later", 3, 1, arrival_time=LATE_FACTOR * 1.0 + 0.5))
    assert take_step(scheduler, 10.6).rows[0].request_id == "missed"


@pytest.mark.parametrize("settings", [{}, {"formation": "throughput"}, {"formation": "hybrid"}, {"mode": "dynamic"}])
def test_what_cannot_be_met_is_dropped_where_that_is_set(settings: dict[str, Any]):
    """Also where the formation offers another first, or nobody yet."""
    config = SchedulerConfig(
        max_num_seqs=1, max_num_batched_tokens=64, policy="deadline", ordering=PolicyConfig(drop_late=True), **settings
    )
    scheduler = make_scheduler(config)
    for name, arrival, prompt in (("missed", 0.0, 9), ("missed too", 0.5, 7), ("can", 1.5, 3)):
        scheduler.add(request(name, prompt, 1, arrival_time=arrival, priority=8 if name == "can" else 0))
    ended = scheduler.expire(2.0)
    assert [update.sequence.request_id for update in ended] == ["missed", "missed too"]
    assert {update.finish_reason for update in ended} == {FinishReason.DEADLINE}


@pytest.mark.parametrize(("tpot_target", "first"), [(2.0, "short"), (0.75, "long")])
def test_the_target_of_a_token_counts_where_steps_are_slower(tpot_target: float, first: str):
    """Steps take a second. Two per token are kept by all; with 0.75 an output of 21 tokens falls 5 seconds behind, so
    it must start 5 seconds sooner than one of a token that came 3 seconds before it."""
    config = SchedulerConfig(
        max_num_seqs=1,
        max_num_batched_tokens=64,
        policy="deadline",
        ordering=PolicyConfig(ttft_target=50.0, tpot_target=tpot_target),
    )
    scheduler = make_scheduler(config)
    scheduler.add(request("running", 3, 5))
    for second in range(4):
        take_step(scheduler, float(second))
    scheduler.add(request("short", 3, 1, arrival_time=1.0))
    scheduler.add(request("long", 3, 21, arrival_time=4.0))
    seen = []
    for second in range(4, 8):
        seen += [row.request_id for row in take_step(scheduler, float(second)).rows]
    assert next(name for name in seen if name != "running") == first


def test_a_deadline_out_of_reach_ends_a_request_before_it_costs_a_prefill():
    """Ten decodes of a second each do not fit into five seconds; the pace is that of the steps before."""
    config = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=64, policy="deadline")
    scheduler = make_scheduler(config)
    scheduler.add(request("first", 3, 30))
    for second in range(4):
        take_step(scheduler, float(second))
    scheduler.add(request("hopeless", 3, 11, arrival_time=3.0, deadline=8.0))
    scheduler.add(request("fits", 3, 2, arrival_time=3.0, deadline=8.0))
    assert [update.sequence.request_id for update in scheduler.expire(3.0)] == ["hopeless"]
    assert "fits" in [row.request_id for row in take_step(scheduler, 4.0).rows]


def test_least_served_tenant_first_by_weight():
    """Prompts of 10 tokens and one output token cost 12; tenant `b` has weight 2: it gets two for one of `a`."""
    requests = [request(f"a{i}", 10, 1, tenant="a") for i in range(4)]
    requests += [request(f"b{i}", 10, 1, tenant="b") for i in range(6)]
    served = order_of_service("fair", requests, tenant_weights={"b": 2.0})
    assert [name[0] for name in served] == list("abbabbabba")
    assert [name for name in served if name[0] == "a"] == ["a0", "a1", "a2", "a3"]


def test_a_tenant_that_comes_back_has_saved_nothing():
    config = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=64, policy="fair")
    scheduler = make_scheduler(config)
    for i in range(6):
        scheduler.add(request(f"a{i}", 10, 1, tenant="a"))
    for _ in range(4):
        take_step(scheduler)
    for i in range(3):
        scheduler.add(request(f"b{i}", 10, 1, tenant="b"))
    assert [take_step(scheduler).rows[0].request_id for _ in range(5)] == ["a4", "b0", "a5", "b1", "b2"]


KEYS = {
    "fcfs": lambda one, config: (),
    "sjf": lambda one, config: (one.expected_output + config.sjf_ageing * one.request.arrival_time,),
    "priority": lambda one, config: (
        one.expected_output + 0.1 * one.request.arrival_time - 10.0 * one.priority,
    ),
    "deadline": lambda one, config: (
        (one.request.arrival_time + config.ttft_target)
        if one.request.options.deadline is None
        else one.request.options.deadline,
    ),
}  # fmt: skip


def tenant_of(sequence: Sequence) -> str:
    return sequence.request.options.tenant


def draw_sequence(rng: random.Random, order: int) -> Sequence:
    one = EngineRequest(
        str(order),
        (1,) * rng.randint(1, 9),
        max_tokens=rng.randint(1, 30),
        arrival_time=order * rng.choice((0.0, 0.25)),
        options=RequestOptions(
            priority=rng.randint(0, 12),
            tenant=rng.choice("abc"),
            deadline=order + rng.randint(1, 9) if rng.random() < 0.3 else None,
        ),
    )
    return Sequence(one, order, float(one.max_tokens))


@pytest.mark.parametrize("policy", KEYS)
@given(seed=st.integers(0, 2**32))
def test_a_queue_is_a_sorted_list(policy: str, seed: int):
    """Pushes, removals from anywhere and looks at the best, against sorting everything each time."""
    rng = random.Random(seed)
    config = PolicyConfig()
    queue = POLICIES[policy](config, StepTimeEstimator()).queue()
    members: list[Sequence] = []
    for order in range(120):
        if members and rng.random() < 0.45:
            victim = rng.choice((members[0], rng.choice(members)))
            members.remove(victim)
            queue.remove(victim)
        else:
            members.append(draw_sequence(rng, order))
            queue.push(members[-1])
        members.sort(key=lambda one: (*KEYS[policy](one, config), one.order))
        assert len(queue) == len(members)
        assert queue.peek() is (members[0] if members else None)
        assert bool(queue) == bool(members)


@given(seed=st.integers(0, 2**32))
def test_fair_counters_against_a_plain_implementation(seed: int):
    """Arrivals, admissions in the order of the queue, departures and output tokens, each counted one by one."""
    rng = random.Random(seed)
    weights = {"a": 1.0, "b": 2.0, "c": 0.5}
    policy = Fair(PolicyConfig(tenant_weights=weights), StepTimeEstimator())
    queue = policy.queue()
    counters: dict[str, float] = {}
    waiting: list[Sequence] = []
    running: list[Sequence] = []
    departed = 0.0

    def leaves(one: Sequence) -> None:
        nonlocal departed
        waiting.remove(one)
        queue.remove(one)
        policy.dequeued(one)
        if all(tenant_of(other) != tenant_of(one) for other in waiting):
            departed = counters[tenant_of(one)]

    for order in range(150):
        action = rng.random()
        if action < 0.4:
            one = draw_sequence(rng, order)
            tenant = tenant_of(one)
            one.tenant_number = policy.tenant_number(tenant)
            if all(tenant_of(other) != tenant for other in waiting):
                floor = min((counters[tenant_of(other)] for other in waiting), default=departed)
                counters[tenant] = max(counters.get(tenant, 0.0), floor)
            waiting.append(one)
            policy.queued(one)
            queue.push(one)
        elif action < 0.6 and waiting:
            best = queue.peek()
            assert best is not None
            assert counters[tenant_of(best)] == min(counters[tenant_of(other)] for other in waiting)
            assert best.order == min(one.order for one in waiting if tenant_of(one) == tenant_of(best))
            counters[tenant_of(best)] += best.num_prompt_tokens / weights[tenant_of(best)]
            policy.admitted(best)
            leaves(best)
            running.append(best)
        elif action < 0.7 and waiting:
            one = rng.choice(waiting)
            leaves(one)
            policy.ended(one)
        elif action < 0.75 and running:
            policy.ended(running.pop(rng.randrange(len(running))))
        elif running:
            rows = [one for one in running if rng.random() < 0.7]
            times = rng.choice((1, 5))
            for one in rows:
                counters[tenant_of(one)] += times * 2.0 / weights[tenant_of(one)]
            policy.decoded(np.array([one.tenant_number for one in rows], np.int32), times)
        assert {tenant: policy.service(tenant) for tenant in counters} == counters
