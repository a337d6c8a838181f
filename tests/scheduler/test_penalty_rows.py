"""Penalty rows: who holds one, who waits for one, and that each has the ids of its request whatever happens to it.

The fake runner keeps the rows as the device does and compares them with the whole context whenever it samples.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config.scheduling import FORMATIONS, MODES, PreemptionConfig, SchedulerConfig
from jaxserve.request import EngineRequest, FinishReason, RequestStatus
from jaxserve.runner.fake import FakeRunner
from jaxserve.scheduler import Scheduler, StepPlan, StepResult
from jaxserve.scheduler.policies.named import POLICIES
from tests.budgets import budget
from tests.scheduler.drive import alone, dispatch, drive, make_scheduler, request


def penalized(name: str, prompt: int, output: int, **options: Any) -> EngineRequest:
    return dataclasses.replace(request(name, prompt, output, **options), frequency_penalty=0.5)


def config(**fields: Any) -> SchedulerConfig:
    return SchedulerConfig(**{"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_penalty_rows": 1, **fields})


def turn(scheduler: Scheduler, runner: FakeRunner) -> StepPlan:
    """One step and its result."""
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.update(plan, runner.collect(dispatch(runner, plan)))
    scheduler.check_integrity()
    return plan


def running(scheduler: Scheduler) -> set[str]:
    return {one.request_id for one in scheduler._queues.running.sequences}


def test_a_request_beyond_the_rows_waits_and_holds_up_no_others():
    scheduler = make_scheduler(config(max_penalty_rows=2))
    for name in ("p1", "p2", "p3", "p4"):
        scheduler.add(penalized(name, 2, 5))
    scheduler.add(request("plain", 2, 5))
    plan = scheduler.schedule()
    assert plan is not None
    assert running(scheduler) == {"p1", "p2", "plain"}
    assert sorted(write.row for write in plan.penalty_writes) == [0, 1]
    assert {row.request_id: row.penalty_row for row in plan.rows} == {"p1": 0, "p2": 1, "plain": None}
    assert scheduler.num_waiting == 2
    scheduler.check_integrity()
    update = scheduler.abort("p1")
    assert update is not None
    plan = scheduler.schedule()
    assert plan is not None
    assert running(scheduler) == {"p2", "p3", "plain"}
    (write,) = plan.penalty_writes
    assert (write.row, write.output_token_ids) == (0, ())
    scheduler.check_integrity()


def test_parked_requests_end_and_keep_their_turn():
    scheduler, runner = make_scheduler(config()), FakeRunner()
    first, *others = [penalized(name, 2, 30) for name in ("a", "b", "c", "d")]
    scheduler.add(first)
    turn(scheduler, runner)
    for one in others:
        scheduler.add(one)
    turn(scheduler, runner)
    assert [scheduler._sequences[name].parked for name in "bcd"] == [True] * 3
    scheduler.abort("b")
    scheduler.add(penalized("e", 2, 3, deadline=5.0))
    turn(scheduler, runner)
    assert [update.finish_reason for update in scheduler.expire(6.0)] == [FinishReason.DEADLINE]
    scheduler.check_integrity()
    scheduler.abort("a")
    turn(scheduler, runner)
    assert running(scheduler) == {"c"}
    assert scheduler.num_waiting == 1


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_a_preempted_request_gives_its_row_to_another_and_has_its_ids_again_later(mode):
    """It has a token in flight when it is preempted, whose id the host has read by the time it comes back."""
    scheduler = make_scheduler(config(preemption=PreemptionConfig(preemption_mode=mode)), num_host_pages=16)
    runner = FakeRunner(num_pages=64, page_size=4, num_host_pages=16)
    holder, urgent = penalized("holder", 6, 12), penalized("urgent", 3, 4, priority=9)
    holders: list[dict[str, int | None]] = []

    def before_step(step: int) -> None:
        holders.append({one.request_id: one.penalty_row for one in scheduler._queues.running.sequences})
        if step == 4:
            scheduler.add(urgent)

    run = drive(scheduler, [holder], runner, before_step)
    for one in (holder, urgent):
        assert (run.tokens[one.request_id], run.reasons[one.request_id]) == alone(one)
    assert {"urgent": 0} in holders
    assert scheduler.num_preemptions_by_kind[mode] == 1
    writes = [write for plan in run.plans for write in plan.penalty_writes]
    assert [write.prompt_token_ids for write in writes] == [one.prompt_token_ids for one in (holder, urgent, holder)]
    assert [write.output_token_ids for write in writes[:2]] == [(), ()]
    assert len(writes[2].output_token_ids) == 4
    assert list(writes[2].output_token_ids) == alone(holder)[0][:4]


def test_an_urgent_request_takes_the_row_of_one_far_below_and_of_no_other():
    scheduler = make_scheduler(config())
    scheduler.add(request("plain", 2, 9))
    scheduler.add(penalized("holder", 2, 9))
    runner = FakeRunner()
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.update(plan, runner.collect(dispatch(runner, plan)))
    scheduler.add(penalized("equal", 2, 3))
    scheduler.schedule()
    assert running(scheduler) == {"plain", "holder"}
    scheduler.add(penalized("urgent", 2, 3, priority=9))
    scheduler.schedule()
    assert running(scheduler) == {"plain", "urgent"}
    assert scheduler._sequences["holder"].status in (RequestStatus.PREEMPTED, RequestStatus.SWAPPED)
    scheduler.check_integrity()
    scheduler.add(penalized("more urgent", 2, 3, priority=12))  # not by more than the gap
    scheduler.schedule()
    assert running(scheduler) == {"plain", "urgent"}


def test_rows_of_ended_requests_are_there_at_once():
    """A row is free when the last token is sampled, before its id is read."""
    scheduler = make_scheduler(config())
    scheduler.add(penalized("a", 2, 1))
    scheduler.add(penalized("b", 2, 1))
    assert scheduler.schedule() is not None
    plan = scheduler.schedule()
    assert plan is not None
    assert [write.row for write in plan.penalty_writes] == [0]
    assert plan.request_ids == ("b",)


def test_a_restart_writes_every_row_anew():
    scheduler = make_scheduler(config(max_penalty_rows=2))
    for name in ("a", "b"):
        scheduler.add(penalized(name, 3, 8))
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.update(plan, StepResult((4, 5)))
    scheduler.schedule()
    assert len(scheduler.restart(())) == 2
    scheduler.check_integrity()
    plan = scheduler.schedule()
    assert plan is not None
    assert {write.output_token_ids for write in plan.penalty_writes} == {(4,), (5,)}


@pytest.mark.parametrize("mode", MODES)
@budget(24)
@given(seed=st.integers(0, 2**32))
def test_tokens_are_those_alone_whatever_the_rows(mode, seed):
    """Few rows, slots and pages; priorities, chunks, aborts and both kinds of preemption."""
    rng = random.Random(seed)
    scheduler = make_scheduler(
        config(
            mode=mode,
            policy=rng.choice(list(POLICIES)),
            formation="greedy" if mode == "dynamic" else rng.choice(FORMATIONS),
            max_num_seqs=rng.randint(1, 5),
            max_penalty_rows=rng.randint(1, 3),
            max_num_batched_tokens=rng.choice((8, 16, 40)),
            preemption=PreemptionConfig(
                preemption_mode=rng.choice(("recompute", "swap")),
                preempt_length_ratio=rng.choice((None, 2.0)),
                preempt_for_pages=rng.random() < 0.4,
            ),
        ),
        num_pages=rng.randint(12, 24),
        num_host_pages=rng.choice((0, 6, 24)),
    )
    runner = FakeRunner(num_pages=scheduler.pool.num_pages, page_size=4, num_host_pages=24)
    requests = [
        (penalized if rng.random() < 0.6 else request)(
            f"r{number}", rng.randint(1, 20), rng.randint(1, 16), priority=rng.choice((0, 0, 3, 8, 12))
        )
        for number in range(rng.randint(4, 14))
    ]
    first, later = requests[: len(requests) // 2], requests[len(requests) // 2 :]
    aborted: set[str] = set()
    tokens: dict[str, list[int]] = {one.request_id: [] for one in requests}
    now, in_flight, steps = 0.0, None, 0
    for one in first:
        scheduler.add(one)
    while later or scheduler.unfinished or in_flight is not None:
        steps, now = steps + 1, now + 0.1
        assert steps < 3_000, f"no progress: {scheduler.request_ids}"
        if later and rng.random() < 0.3:
            scheduler.add(later.pop())
        if scheduler.request_ids and rng.random() < 0.02:
            aborted.add(name := rng.choice(scheduler.request_ids))
            scheduler.abort(name)
        for update in scheduler.expire(now):
            tokens[update.sequence.request_id].extend(update.token_ids)
        plan = scheduler.schedule(now)
        scheduler.check_integrity()
        dispatched = None if plan is None else (plan, dispatch(runner, plan))
        if in_flight is not None:
            update = scheduler.update(in_flight[0], runner.collect(in_flight[1]))
            for name, token in zip(update.request_ids, update.token_ids, strict=True):
                tokens[name].append(token)
            for other in update.others:
                tokens[other.sequence.request_id].extend(other.token_ids)
            scheduler.check_integrity()
        in_flight = dispatched
    for one in requests:
        expected = alone(one)[0]
        found = tokens[one.request_id]
        assert found == (expected[: len(found)] if one.request_id in aborted else expected)
