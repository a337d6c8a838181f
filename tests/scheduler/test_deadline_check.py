"""Deadlines that cannot be met end a request before anything is computed for it, under every policy."""

from __future__ import annotations

import dataclasses

import pytest

from jaxserve.config.scheduling import DEADLINE_CHECKS, POLICIES, AdmissionConfig, SchedulerConfig
from jaxserve.request import FinishReason
from jaxserve.scheduler import Scheduler, StepResult
from tests.scheduler.drive import make_scheduler, request


def config(rule: str = "needed", policy: str = "fcfs") -> SchedulerConfig:
    return SchedulerConfig(
        max_num_seqs=2, max_num_batched_tokens=8, policy=policy, admission=AdmissionConfig(deadline_check=rule)
    )


def seconds_a_step(scheduler: Scheduler, seconds: float, steps: int = 20) -> float:
    """Decodes alone for a while, a step every so many seconds; returns the time."""
    now = 0.0
    scheduler.add(request("warm", 3, steps))
    while scheduler.unfinished:
        plan = scheduler.schedule(now)
        if plan is not None:
            scheduler.update(plan, StepResult(tuple(1 for _ in range(plan.num_sampled))))
        now += seconds
    scheduler.schedule(now)
    return now


def needing(name: str, prompt: int, needed: int, deadline: float):
    return dataclasses.replace(request(name, prompt, 100, deadline=deadline), needed_tokens=needed)


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "deadline"])
def test_what_the_fastest_steps_cannot_compute_in_time_is_dropped(policy):
    scheduler = make_scheduler(config(policy=policy))
    now = seconds_a_step(scheduler, 0.5)
    # A prompt of 20 tokens takes 3 steps of 8, the last of which gives the first token.
    cases = {"no": (20, 1, 1.4), "yes": (20, 1, 1.6), "no output": (3, 10, 4.9), "output": (3, 10, 5.1)}
    for name, (prompt, needed, seconds) in cases.items():
        scheduler.add(needing(name, prompt, needed, now + seconds))
    ended = {update.sequence.request_id: update for update in scheduler.expire(now)}
    assert ended.keys() == {"no", "no output"}
    assert {update.finish_reason for update in ended.values()} == {FinishReason.DEADLINE}
    assert ended["no output"].error == (
        "deadline is in 4.900 s and cannot be met: a prompt of 3 and 10 output tokens take at least 5.000 s; allow "
        "more time, shorten the prompt or lower max_tokens"
    )
    assert scheduler.pool.num_used == 0


@pytest.mark.parametrize("rule", DEADLINE_CHECKS)
def test_the_rule_decides_how_much_must_fit(rule):
    """Outputs of 20 tokens are expected; the first alone would fit."""
    scheduler = make_scheduler(config(rule))
    now = 0.0
    for _ in range(20):
        now += seconds_a_step(scheduler, 0.5)
    scheduler.add(dataclasses.replace(request("r", 3, 100, deadline=now + 4.0), arrival_time=now))
    dropped = bool(scheduler.expire(now))
    assert dropped == (rule == "expected")
    scheduler.add(dataclasses.replace(request("s", 3, 100, deadline=now + 0.4), arrival_time=now))
    assert bool(scheduler.expire(now)) == (rule != "past")


def test_a_server_that_has_computed_nothing_drops_nothing_that_is_not_past():
    scheduler = make_scheduler(config())
    scheduler.add(needing("r", 20, 100, 0.001))
    assert scheduler.expire(0.0) == []


def test_a_slow_time_does_not_count_against_later_requests():
    scheduler = make_scheduler(config())
    seconds_a_step(scheduler, 0.1)
    now = seconds_a_step(scheduler, 5.0)
    scheduler.add(needing("r", 3, 10, now + 1.5))
    assert scheduler.expire(now) == []
