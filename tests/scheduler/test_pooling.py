"""Prompts that are embedded, through the scheduler and the fake runner: whatever happens to them, the pooled hidden
states are those of the prompt computed by hand, and requests that generate give the tokens that they give alone."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import numpy as np
import pytest

from jaxserve.config.scheduling import PreemptionConfig, SchedulerConfig
from jaxserve.request import EngineRequest, FinishReason, Pooling
from jaxserve.runner.fake import FakeRunner, hidden_state
from jaxserve.scheduler import StepResult
from jaxserve.scheduler.sequence import Sequence
from tests.scheduler.drive import alone, dispatch, drive, make_scheduler, preempt, request
from tests.scheduler.history import History

CONFIG = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16)


def embedded(name: str, prompt: int, pooling: Pooling) -> EngineRequest:
    return dataclasses.replace(request(name, prompt, 1), pooling=pooling)


def pooled_by_hand(one: EngineRequest) -> np.ndarray:
    ids = one.prompt_token_ids
    states = np.array([hidden_state(ids[: end + 1]) for end in range(len(ids))], np.float64)
    return {Pooling.LAST: states[-1], Pooling.CLS: states[0], Pooling.MEAN: states.mean(axis=0)}[one.pooling]


def sequences_of(scheduler, requests) -> dict[str, Sequence]:
    """Follows the sequences, which the scheduler forgets at their end."""
    found = {}
    add = scheduler.add

    def adding(one, *arguments):
        found[one.request_id] = add(one, *arguments)
        return found[one.request_id]

    scheduler.add = adding
    return found


def check(scheduler, requests, runner=None, before_step=None) -> None:
    sequences = sequences_of(scheduler, requests)
    run = drive(scheduler, requests, runner, before_step)
    for one in requests:
        if one.pooling is None:
            assert (run.tokens[one.request_id], run.reasons[one.request_id]) == alone(one)
            continue
        assert run.tokens[one.request_id] == []
        assert run.reasons[one.request_id] is FinishReason.STOP
        vector = sequences[one.request_id].pooled.vector(len(one.prompt_token_ids))
        assert vector.tolist() == pooled_by_hand(one).tolist(), one.request_id
    assert scheduler.predictor.num_observed == sum(one.pooling is None for one in requests)


def mixture() -> list[EngineRequest]:
    """Prompts shorter and longer than a step, beside requests that generate."""
    embeds = [embedded(f"{kind.value}-{length}", length, kind) for kind in Pooling for length in (1, 2, 5, 16, 17, 40)]
    generating = [request(f"g{number}", 3 + 7 * number, 5 + number) for number in range(6)]
    return [one for pair in zip(embeds, [*generating, *[None] * len(embeds)], strict=False) for one in pair if one]


@pytest.mark.parametrize("mode", ["continuous", "static", "dynamic", "separated", "none"])
def test_pooled_beside_generating_rows(mode):
    check(make_scheduler(dataclasses.replace(CONFIG, mode=mode)), mixture())


@pytest.mark.parametrize("policy", ["fcfs", "sjf", "priority", "fair", "deadline"])
def test_pooled_under_every_policy(policy):
    check(make_scheduler(dataclasses.replace(CONFIG, policy=policy)), mixture())


@pytest.mark.parametrize("host_pages", [0, 40])
def test_pooled_after_preemption(host_pages):
    """Every few steps somebody loses its place, prompts in the middle too; with host pages it is swapped."""
    config = dataclasses.replace(CONFIG, preemption=PreemptionConfig(preemption_mode="swap"))
    scheduler = make_scheduler(config, num_pages=40, num_host_pages=host_pages)
    runner = FakeRunner(num_pages=40, num_host_pages=host_pages)
    kinds: set[str] = set()

    def take_place(step: int) -> None:
        # Outside of a step, so without the copies of a swap, which the scheduler would put into its plan.
        victims = [one.request_id for one in scheduler._queues.running.prefilling.values()]
        if step % 3 == 2 and victims and not host_pages:
            preempt(scheduler, victims[0])
            kinds.add("recompute")

    check(scheduler, mixture(), runner, take_place)
    assert kinds == (set() if host_pages else {"recompute"})


def test_swapped_prompt_goes_on_where_it_was():
    """Pages run out under a long prompt, which is swapped between two of its chunks."""
    config = SchedulerConfig(
        max_num_seqs=4,
        max_num_batched_tokens=8,
        preemption=PreemptionConfig(preemption_mode="swap"),
    )
    scheduler = make_scheduler(config, num_pages=12, num_host_pages=32)
    runner = FakeRunner(num_pages=12, num_host_pages=32)
    check(
        scheduler,
        [request("g", 16, 20), embedded("mean", 40, Pooling.MEAN), embedded("cls", 33, Pooling.CLS)],
        runner,
    )
    assert scheduler.num_preemptions_by_kind["swap"] > 0


def test_slot_and_pages_are_free_before_the_result_is_read():
    scheduler, runner = make_scheduler(CONFIG), FakeRunner()
    scheduler.add(embedded("e", 5, Pooling.MEAN))
    plan = scheduler.schedule()
    pending = dispatch(runner, plan)
    assert plan.num_sampled == plan.row_bucket == 0
    assert scheduler.num_running == 1
    assert scheduler.schedule() is None
    assert scheduler.num_running == scheduler.pool.num_used == 0
    (update,) = scheduler.update(plan, runner.collect(pending)).others
    assert update.finish_reason is FinishReason.STOP
    assert not scheduler.unfinished


@pytest.mark.parametrize("steps_before", [0, 1, 2])
def test_aborted(steps_before):
    scheduler, runner = make_scheduler(CONFIG), FakeRunner()
    scheduler.add(embedded("e", 20, Pooling.MEAN))
    plans = [scheduler.schedule() for _ in range(steps_before)]
    pending = [dispatch(runner, plan) for plan in plans]
    assert scheduler.abort("e").finish_reason is FinishReason.ABORT
    for plan, step in zip(plans, pending, strict=True):
        assert scheduler.update(plan, runner.collect(step)).others == []
    scheduler.check_integrity()
    assert scheduler.pool.num_used == 0


def test_lost_steps_are_computed_again():
    """The device loses its pages while the first or the last chunk is in flight."""
    for lost in range(3):
        scheduler, runner = make_scheduler(CONFIG), FakeRunner()
        one = embedded("e", 40, Pooling.MEAN)
        sequence = scheduler.add(one)
        for step in range(3):
            plan = scheduler.schedule()
            pending = dispatch(runner, plan)
            if step == lost:
                break
            scheduler.update(plan, runner.collect(pending))
        if lost == 2:
            assert scheduler.schedule() is None  # it holds nothing any more
        assert scheduler.restart(()) == [sequence]
        runner.reset()
        while scheduler.unfinished:
            plan = scheduler.schedule()
            scheduler.update(plan, runner.collect(dispatch(runner, plan)))
            scheduler.check_integrity()
        assert sequence.pooled.vector(40).tolist() == pooled_by_hand(one).tolist()


def test_not_finite_fails_alone():
    scheduler, runner = make_scheduler(CONFIG), FakeRunner()
    for one in (embedded("bad", 3, Pooling.LAST), embedded("good", 3, Pooling.LAST)):
        scheduler.add(one)
    plan = scheduler.schedule()
    result = runner.collect(dispatch(runner, plan))
    pooled = result.pooled.copy()
    pooled[0] = np.nan
    bad, good = scheduler.update(plan, StepResult((), pooled=pooled)).others
    assert (bad.finish_reason, good.finish_reason) == (FinishReason.ERROR, FinishReason.STOP)
    assert "hidden states are not finite" in bad.error


def test_parts_of_a_step_keep_their_pooled_rows():
    scheduler = make_scheduler(CONFIG)
    for number, kind in enumerate((Pooling.MEAN, None, Pooling.LAST)):
        one = request(f"r{number}", 4, 2)
        scheduler.add(one if kind is None else dataclasses.replace(one, pooling=kind))
    plan = scheduler.schedule()
    parts = plan.parts(1, scheduler._buckets)
    assert [part.num_pooled for part in parts] == [1, 0, 1]
    assert [row.request_id for part in parts for row in part.pooled_rows] == ["r0", "r2"]
    assert [row.request_id for row in plan.pooled_rows] == ["r0", "r2"]


class PooledHistory(History):
    """A random history in which every third request is embedded."""

    def __init__(self, rng: random.Random, mode: str, policy: str):
        super().__init__(rng, mode, "greedy", policy)
        add, kinds = self.scheduler.add, random.Random(f"kinds {rng.getstate()[1][0]}")

        def add_some_pooled(one: EngineRequest) -> Sequence:
            if kinds.random() < 1 / 3:
                pooling = kinds.choice(list(Pooling))
                one = dataclasses.replace(one, pooling=pooling, max_tokens=1, min_tokens=0, stop_token_ids=())
            return add(one)

        self.scheduler.add = add_some_pooled

    def arrive(self) -> None:
        super().arrive()
        self.requests = {name: sequence.request for name, sequence in self.sequences.items()}

    def check_answers(self) -> None:
        everything, pooled = self.requests, {}
        self.requests = {name: one for name, one in everything.items() if one.pooling is None}
        pooled = {name: one for name, one in everything.items() if one.pooling is not None}
        reasons = {name: self.reasons.pop(name) for name in pooled}
        super().check_answers()
        for name, reason in reasons.items():
            assert self.tokens[name] == []
            assert reason in (FinishReason.STOP, FinishReason.ABORT, FinishReason.DEADLINE)
            if reason is FinishReason.STOP:
                self.events["embedded"] += 1
                self.events["embedded after preemption"] += self.sequences[name].num_preemptions > 0
                vector = self.sequences[name].pooled.vector(len(pooled[name].prompt_token_ids))
                assert vector.tolist() == pooled_by_hand(pooled[name]).tolist()


@pytest.mark.parametrize("mode", ["none", "static", "dynamic", "continuous", "separated"])
def test_histories(mode):
    """Whatever happens to a prompt, it is embedded as by hand, and the others generate what they generate alone."""
    events: Counter[str] = Counter()
    for policy in ("fcfs", "sjf", "priority", "fair", "deadline"):
        for seed in range(2):
            history = PooledHistory(random.Random(f"{mode} {policy} {seed}"), mode, policy)
            history.run(50)
            events.update(history.events)
    assert events["embedded"] > 40
    assert mode != "continuous" or events["embedded after preemption"], events
