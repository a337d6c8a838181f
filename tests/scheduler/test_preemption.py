"""Preemption: when, whom, how, and what comes after."""

from __future__ import annotations

import dataclasses

import pytest

from jaxserve.config.scheduling import PreemptionConfig, SchedulerConfig
from jaxserve.scheduler import Scheduler, StepPlan, StepResult
from jaxserve.scheduler.preemption_costs import PreemptionCosts
from tests.scheduler.drive import alone, drive, make_scheduler, preempt, request, start_decoding


def config(**settings) -> SchedulerConfig:
    return SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=64, preemption=PreemptionConfig(**settings))


def take_step(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.update(plan, StepResult([1] * plan.num_sampled))
    scheduler.check_integrity()
    return plan


def ids(plan: StepPlan) -> list[str]:
    return [row.request_id for row in plan.rows]


def preempted(scheduler: Scheduler) -> list[str]:
    return [sequence.request_id for sequence in scheduler.preempted]


@pytest.mark.parametrize(("priority", "takes"), [(8, False), (9, True)])
def test_a_priority_that_exceeds_a_running_one_by_more_than_five(priority: int, takes: bool):
    scheduler = make_scheduler(config())
    start_decoding(scheduler, request("low", 4, 50, priority=3), request("middle", 4, 50, priority=4))
    scheduler.add(request("urgent", 4, 50, priority=priority))
    plan = take_step(scheduler)
    assert preempted(scheduler) == ["low"] * takes
    assert ids(plan) == (["middle", "urgent"] if takes else ["low", "middle"])


@pytest.mark.parametrize("gap", [None, 20])
def test_the_gap_is_a_setting(gap: int | None):
    scheduler = make_scheduler(config(preempt_priority_gap=gap))
    start_decoding(scheduler, request("low", 4, 50), request("middle", 4, 50))
    scheduler.add(request("urgent", 4, 50, priority=15))
    take_step(scheduler)
    assert preempted(scheduler) == []


@pytest.mark.parametrize(("output", "takes"), [(6, True), (7, False)])
def test_a_request_ten_times_shorter_than_the_longest_that_runs(output: int, takes: bool):
    """Lengths are prompt and expected output: without stop ids, max_tokens. 4 + 6 is a tenth of 20 + 80."""
    scheduler = make_scheduler(config(preempt_length_ratio=10.0))
    start_decoding(scheduler, request("long", 20, 80), request("other", 20, 70))
    scheduler.add(request("short", 4, output))
    plan = take_step(scheduler)
    assert preempted(scheduler) == ["long"] * takes
    assert ("short" in ids(plan)) == takes


@pytest.mark.parametrize("formation", ["greedy", "length_balanced", "throughput"])
@pytest.mark.parametrize(("priority", "output", "loser"), [(9, 90, "other"), (0, 4, "long")])
def test_who_must_go_first_does_so_from_behind_others(formation: str, priority: int, output: int, loser: str):
    """One of far higher priority, or far shorter, takes a place though another is offered before it."""
    settings = dataclasses.replace(config(preempt_length_ratio=10.0), formation=formation)
    scheduler = make_scheduler(settings)
    start_decoding(scheduler, request("long", 20, 80), request("other", 20, 70))
    scheduler.add(request("ahead", 4, 30))
    scheduler.add(request("urgent", 4, output, priority=priority))
    plan = take_step(scheduler)
    assert preempted(scheduler) == [loser]
    assert set(ids(plan)) == {"long", "other", "urgent"} - {loser}


@pytest.mark.parametrize(("priority", "takes"), [(9, False), (10, True)])
def test_who_takes_a_place_passes_only_those_whose_place_it_would_take(priority: int, takes: bool):
    """ "a" of priority 3 has lost its place and stands at 4 until it is back: 9 does not exceed that by more than 5."""
    scheduler = make_scheduler(config())
    start_decoding(scheduler, request("a", 4, 50, priority=3), request("b", 4, 50, priority=3))
    scheduler.add(request("urgent", 4, 50, priority=9))
    take_step(scheduler)
    [lost] = preempted(scheduler)
    scheduler.add(request("next", 4, 50, priority=priority))
    take_step(scheduler)
    assert preempted(scheduler) == [{"a": "b", "b": "a"}[lost]] * takes


@pytest.mark.parametrize(("enabled", "output", "takes"), [(True, 10, True), (True, 60, False), (False, 10, False)])
def test_a_waiting_request_of_better_standing_takes_pages(enabled: bool, output: int, takes: bool):
    """Under sjf a shorter request may take the place of the longest one, if only memory keeps it out."""
    settings = SchedulerConfig(
        max_num_seqs=4,
        max_num_batched_tokens=64,
        policy="sjf",
        preemption=PreemptionConfig(preempt_for_pages=enabled),
    )
    scheduler = make_scheduler(settings, num_pages=10)
    start_decoding(scheduler, request("long", 17, 50), request("other", 15, 20))
    assert scheduler.pool.num_free == 0
    scheduler.add(request("waits", 4, output))
    plan = take_step(scheduler)
    assert preempted(scheduler) == ["long"] * takes
    assert ids(plan) == ["other", "waits" if takes else "long"]


def test_nobody_loses_a_place_where_there_is_room():
    """The step's tokens are spent on a prompt of like urgency: the next one has some for the urgent request."""
    settings = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16)
    scheduler = make_scheduler(settings, num_pages=60)
    start_decoding(scheduler, request("low", 4, 50))
    scheduler.add(request("prompt", 30, 5, priority=9))
    scheduler.add(request("urgent", 4, 5, priority=9))
    assert ids(take_step(scheduler)) == ["low", "prompt"]
    assert scheduler.num_preemptions == 0
    assert ids(take_step(scheduler)) == ["low", "prompt"]
    assert ids(take_step(scheduler)) == ["low", "prompt", "urgent"]
    assert scheduler.num_preemptions == 0


def test_a_sequence_loses_its_place_so_often_at_most():
    scheduler = make_scheduler(config(max_preemptions=2, preemption_boost=0))
    start_decoding(scheduler, request("low", 4, 50), request("other", 4, 50, priority=20))
    for number, lost in enumerate((1, 1, 0)):
        scheduler.add(request(f"urgent{number}", 4, 2, priority=9))
        take_step(scheduler)
        assert len(preempted(scheduler)) == lost
        while "low" not in ids(take_step(scheduler)):
            pass


def test_what_came_with_a_step_is_not_displaced_in_it():
    scheduler = make_scheduler(config(), num_pages=100)
    for name, priority in (("low", 0), ("lower", 0), ("urgent", 12)):
        scheduler.add(request(name, 4, 9, priority=priority))
    assert ids(take_step(scheduler)) == ["low", "lower"]
    assert preempted(scheduler) == []
    assert ids(take_step(scheduler)) == ["low", "urgent"]


def test_each_preemption_raises_the_priority_by_one_up_to_a_bound():
    scheduler = make_scheduler(config(preemption_boost=1, preemption_boost_limit=3))
    start_decoding(scheduler, request("a", 4, 50, priority=2))
    seen = []
    for _ in range(5):
        preempt(scheduler, "a")
        seen.append(scheduler._sequences["a"].priority)
        scheduler.check_integrity()
        take_step(scheduler)
    assert seen == [3, 4, 5, 5, 5]


def test_a_preempted_sequence_is_before_all_that_wait():
    scheduler = make_scheduler(config())
    start_decoding(scheduler, request("a", 4, 50), request("b", 4, 50))
    scheduler.add(request("waits", 4, 5, priority=5))
    preempt(scheduler, "b")
    assert ids(take_step(scheduler)) == ["a", "b"]


VICTIMS = {
    "policy": "late",
    "lowest_priority": "low",
    "most_pages": "large",
    "least_progress": "fresh",
    "cheapest": "short",
}


@pytest.mark.parametrize("victim", VICTIMS)
def test_whose_pages_go_when_memory_is_short(victim: str):
    """Each rule names another of five: `late` arrived last, `low` has the lowest priority, `large` the most tokens,
    `short` the fewest, and `fresh` fewer of its own than the others, for its prompt took five steps."""
    settings = SchedulerConfig(
        max_num_seqs=8,
        max_num_batched_tokens=128,
        long_prefill_token_threshold=8,
        preemption=PreemptionConfig(victim=victim),
    )
    scheduler = make_scheduler(settings, num_pages=60)
    for name, prompt, priority in (("large", 40, 2), ("low", 20, 1), ("short", 5, 2)):
        scheduler.add(request(name, prompt, 50, priority=priority))
    for _ in range(3):
        take_step(scheduler)
    scheduler.add(request("fresh", 36, 50, priority=2))
    scheduler.add(request("late", 12, 50, priority=2))
    for _ in range(6):
        take_step(scheduler)
    assert len(scheduler._queues.running.decoding) == 5
    assert scheduler.pool.allocate(scheduler.pool.num_available) is not None
    while not scheduler.preempted:
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.update(plan, StepResult([1] * plan.num_sampled))
    assert preempted(scheduler)[0] == VICTIMS[victim]


@pytest.mark.parametrize("victim", VICTIMS)
def test_preemption_does_not_go_in_circles(victim: str):
    """Two that need all pages but one each, and neither has swap: one of them always ends."""
    settings = SchedulerConfig(
        max_num_seqs=4, max_num_batched_tokens=8, preemption=PreemptionConfig(victim=victim, preemption_boost=0)
    )
    scheduler = make_scheduler(settings, num_pages=12)
    requests = [request(name, 25, 16) for name in ("a", "bb", "ccc")]
    run = drive(scheduler, requests, max_steps=600)
    assert scheduler.num_preemptions > 0
    assert all((run.tokens[one.request_id], run.reasons[one.request_id]) == alone(one) for one in requests)


def test_recompute_and_swap_by_mode():
    for mode, kind in (("recompute", "recompute"), ("swap", "swap"), ("auto", "recompute")):  # auto: no costs known
        scheduler = make_scheduler(config(preemption_mode=mode), num_host_pages=8)
        start_decoding(scheduler, request("a", 9, 50))
        preempt(scheduler, "a")
        assert scheduler.num_preemptions_by_kind == {"recompute": 0, "swap": 0} | {kind: 1}
        assert (scheduler.num_swapped, scheduler.num_waiting) == ((1, 0) if kind == "swap" else (0, 1))
        assert scheduler.pool.num_host_used == (3 if kind == "swap" else 0)


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [(8, "swap"), (9, "recompute"), (10, "recompute"), (11, "swap"), (12, "swap"), (13, "recompute")],
)
@pytest.mark.parametrize("measured", [True, False])
def test_auto_takes_what_costs_less(prompt: int, kind: str, measured: bool):
    """A token costs 1 ms to compute, a page of 4 tokens 3.5 ms to swap: 8 tokens 8 against 7 ms, 9 tokens 9 against
    10.5 ms. Costs of the settings come before measured ones."""
    set_costs = {} if measured else {"recompute_seconds_per_token": 0.001, "swap_seconds_per_page": 0.0035}
    costs = PreemptionCosts(0.001, 0.0035) if measured else PreemptionCosts(1.0, 0.0 if kind == "recompute" else 9.0)
    scheduler = make_scheduler(config(preemption_mode="auto", **set_costs), num_host_pages=8, costs=costs)
    start_decoding(scheduler, request("a", prompt, 50))
    preempt(scheduler, "a")
    assert scheduler.num_preemptions_by_kind[kind] == 1


def test_without_room_on_the_host_pages_are_computed_again():
    scheduler = make_scheduler(config(preemption_mode="swap"), num_host_pages=2)
    start_decoding(scheduler, request("small", 8, 50), request("large", 9, 50))
    preempt(scheduler, "large")
    preempt(scheduler, "small")
    assert scheduler.num_preemptions_by_kind == {"recompute": 1, "swap": 1}


def test_swapped_sequences_come_back_before_anything_that_waits():
    settings = SchedulerConfig(
        max_num_seqs=3, max_num_batched_tokens=64, preemption=PreemptionConfig(preemption_mode="swap")
    )
    scheduler = make_scheduler(settings, num_pages=9, num_host_pages=8)
    start_decoding(scheduler, request("a", 7, 20), request("b", 7, 20), request("c", 7, 5))
    scheduler.add(request("waits", 1, 5))
    while not scheduler.num_swapped:
        take_step(scheduler)
    seen = []
    while scheduler.unfinished:
        joined = [row.request_id for row in take_step(scheduler).chunks if row.admit is not None]
        seen += joined
    assert seen.index("c") < seen.index("waits")
