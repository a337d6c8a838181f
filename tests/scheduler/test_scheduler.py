"""The scheduler against worked examples and against the answers worked out alone."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config.settings import SchedulerConfig
from jaxserve.request import EngineRequest, FinishReason
from jaxserve.scheduler import Scheduler, StepResult
from jaxserve.scheduler.admission_order import Greedy
from jaxserve.scheduler.keyed_queue import KeyedQueue
from jaxserve.scheduler.plan import NO_DECODES, NO_SAMPLES
from tests.budgets import budget
from tests.scheduler.drive import alone, columns, drive, make_scheduler, preempt, request, start_decoding


def test_long_prefill_threshold_leaves_budget_to_others():
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64, long_prefill_token_threshold=16)
    scheduler = make_scheduler(config, 64, 16)
    run = drive(scheduler, [request("long", 100, 2), request("short", 10, 2)])
    assert [(row.request_id, row.num_tokens) for row in run.plans[0].rows] == [("long", 16), ("short", 10)]
    assert run.finish_step["short"] < run.finish_step["long"]


def test_running_requests_decode_before_any_chunk():
    scheduler = make_scheduler(SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=8), 64, 16)
    start_decoding(scheduler, request("A", 2, 9), request("B", 2, 9))
    scheduler.add(request("long", 100, 2))
    plan = scheduler.schedule()
    assert plan is not None
    assert [(row.request_id, row.num_tokens) for row in plan.rows] == [("A", 1), ("B", 1), ("long", 6)]


def test_preemption_takes_the_latest_and_brings_it_back_first():
    scheduler = make_scheduler(SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64), num_pages=9, page_size=4)
    requests = [request("first", 8, 20), request("second", 8, 20), request("third", 8, 4)]
    run = drive(scheduler, requests)
    assert scheduler.num_preemptions > 0
    for one in requests:
        assert (run.tokens[one.request_id], run.reasons[one.request_id]) == alone(one)
    assert run.finish_step["first"] < run.finish_step["second"]


def test_the_predictor_is_told_what_it_expected_when_the_request_came(monkeypatch: pytest.MonkeyPatch):
    scheduler = make_scheduler(SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=64), 64, 16)
    told: list[tuple[str, float | None]] = []
    observe = scheduler.predictor.observe

    def listen(one: EngineRequest, output_tokens: int, expected: float | None = None) -> None:
        told.append((one.request_id, expected))
        observe(one, output_tokens, expected)

    monkeypatch.setattr(scheduler.predictor, "observe", listen)
    requests = [dataclasses.replace(request(name, 8, 5), max_tokens=100) for name in "abc"]
    requests = [dataclasses.replace(one, stop_token_ids=tuple(range(50))) for one in requests]  # they end soon
    before = [(one.request_id, scheduler.predictor.expected(one)) for one in requests]
    drive(scheduler, requests)
    assert told == before
    assert scheduler.predictor.expected(requests[0]) != before[0][1]  # it has learned meanwhile


def test_a_preempted_sequence_can_outgrow_a_step_without_chunked_prefill():
    config = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=16, enable_chunked_prefill=False)
    scheduler = make_scheduler(config, num_pages=13, page_size=4)
    requests = [request("first", 14, 26), request("second", 14, 26)]
    run = drive(scheduler, requests)
    assert scheduler.num_preemptions > 0
    assert all((run.tokens[one.request_id], run.reasons[one.request_id]) == alone(one) for one in requests)


def test_a_sequence_that_outgrew_a_step_is_not_starved_by_newcomers():
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16, enable_chunked_prefill=False)
    scheduler = make_scheduler(config, num_pages=60)
    old = request("old", 8, 40)
    run = drive_with_newcomers(scheduler, old, preempt_at=22)
    assert (run.tokens["old"], run.reasons["old"]) == alone(old)
    assert run.finish_step["old"] < 22 + 40


def drive_with_newcomers(scheduler: Scheduler, old: EngineRequest, preempt_at: int):
    """Runs `old`, preempts it once, and keeps the queue full of short requests of staggered lengths."""

    def before_step(step: int) -> None:
        if step == preempt_at:
            preempt(scheduler, "old")
        if step >= preempt_at and step < 300 and scheduler.num_waiting < 4:
            scheduler.add(request(f"new{step}", 3 + step % 5, 2 + step % 7))

    return drive(scheduler, [old], before_step=before_step)


def test_cancelled_requests_leave_the_waiting_queue():
    scheduler = make_scheduler(SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=8))
    scheduler.add(request("first", 3, 5))
    for i in range(5_000):
        scheduler.add(request(f"r{i}", 3, 5))
        scheduler.abort(f"r{i}")
    assert scheduler.num_waiting == 1
    waiting = scheduler._queues.waiting
    assert len(waiting.new._heap) < 200
    assert isinstance(waiting._formation, Greedy)
    assert isinstance(waiting._formation._queue, KeyedQueue)
    assert len(waiting._formation._queue._heap) < 200


def test_not_finite_logits_end_that_request_alone():
    scheduler = make_scheduler(SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16))
    scheduler.add(request("bad", 3, 5))
    scheduler.add(request("good", 3, 5))
    plan = scheduler.schedule()
    assert plan is not None
    bad, good = scheduler.update(plan, StepResult((-1, 4))).others
    assert bad.finish_reason is FinishReason.ERROR
    assert "not finite" in bad.error
    assert good.finish_reason is None
    assert good.token_ids == (4,)
    scheduler.check_integrity()


def test_duplicate_ids_and_a_full_queue_are_refused():
    scheduler = make_scheduler(SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=8, max_num_waiting=1))
    scheduler.add(request("a", 3, 5))
    with pytest.raises(ValueError, match="request_id 'a' is in use"):
        scheduler.add(request("a", 3, 5))
    scheduler.add(request("b", 3, 5))
    with pytest.raises(ValueError, match="2 requests are unfinished; max_num_seqs 1 and max_num_waiting 1"):
        scheduler.add(request("c", 3, 5))


def test_a_deadline_that_passes_in_the_queue_costs_no_prefill():
    scheduler = make_scheduler(SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=8))
    scheduler.add(request("late", 3, 5, deadline=10.0))
    assert scheduler.expire(9.0) == []
    (update,) = scheduler.expire(10.5)
    assert update.finish_reason is FinishReason.DEADLINE
    assert "deadline" in update.error
    assert scheduler.schedule() is None


def test_an_id_used_again_does_not_take_the_old_ones_token():
    scheduler = make_scheduler(SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=8))
    scheduler.add(request("a", 3, 5))
    plan = scheduler.schedule()
    scheduler.abort("a")
    again = scheduler.add(request("a", 4, 5))
    assert plan is not None
    update = scheduler.update(plan, StepResult((9,)))
    assert (update.request_ids, update.others) == ((), [])
    assert again.output_token_ids == []


requests_strategy = st.lists(
    st.tuples(
        st.integers(1, 40),  # prompt
        st.integers(1, 25),  # output
        st.sampled_from([0.0, 1.0]),
        st.integers(0, 5),  # min_tokens
        st.sets(st.integers(0, 100), max_size=8),  # stop ids
    ),
    min_size=1,
    max_size=12,
)


@budget(150)
@given(
    drawn=requests_strategy,
    max_num_seqs=st.integers(1, 6),
    budget=st.integers(8, 64),
    threshold=st.sampled_from([0, 1, 5, 16]),
    num_pages=st.integers(18, 60),
    aborts=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 11)), max_size=4),
)
def test_tokens_do_not_depend_on_scheduling(drawn, max_num_seqs, budget, threshold, num_pages, aborts):
    """Batched, chunked and preempted equals alone, for any limits; aborted ones give a prefix; all pages come back."""
    requests = [
        EngineRequest(
            f"r{i}",
            tuple((i * 31 + j * 17) % 101 for j in range(prompt)),
            max_tokens=output,
            temperature=temperature,
            seed=i,
            min_tokens=min(least, output),
            stop_token_ids=tuple(sorted(stops)),
        )
        for i, (prompt, output, temperature, least, stops) in enumerate(drawn)
    ]
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=budget, long_prefill_token_threshold=threshold
    )
    scheduler = make_scheduler(config, num_pages)
    aborted: set[str] = set()

    def abort(step: int) -> None:
        for when, which in aborts:
            if when == step and (update := scheduler.abort(f"r{which}")) is not None:
                assert update.finish_reason is FinishReason.ABORT
                aborted.add(f"r{which}")

    run = drive(scheduler, requests, before_step=abort)
    for one in requests:
        tokens, reason = alone(one)
        if one.request_id in aborted:
            assert one.request_id not in run.reasons
            assert run.tokens[one.request_id] == tokens[: len(run.tokens[one.request_id])]
        else:
            assert (run.tokens[one.request_id], run.reasons[one.request_id]) == (tokens, reason)
    for plan in run.plans:
        assert plan.num_tokens <= budget
        assert plan.num_rows == len(plan.rows) <= max_num_seqs
        assert plan.num_tokens == sum(row.num_tokens for row in plan.rows)
        assert plan.num_sampled == len(plan.sampled)
        assert plan.token_bucket >= plan.num_tokens
        assert plan.row_bucket >= len(plan.sampled)
    assert scheduler.pool.num_free == scheduler.pool.num_usable


def test_plans_are_reproducible():
    def plans() -> list:
        scheduler = make_scheduler(SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=16), 20)
        run = drive(scheduler, [request(str(i), 3 + 5 * i, 12) for i in range(6)])
        rest = {"decodes": NO_DECODES, "samples": NO_SAMPLES}
        return [(plan.rows, columns(plan), dataclasses.replace(plan, **rest)) for plan in run.plans]

    assert plans() == plans()


def test_importing_the_scheduler_does_not_load_jax():
    code = "import sys, jaxserve.scheduler, jaxserve.config.settings, jaxserve.request; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
