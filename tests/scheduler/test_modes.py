"""Batching modes and what a step may take in: batches, length buckets, phases, shares, reserves, delays."""

from __future__ import annotations

import pytest

from jaxserve.config.scheduling import AdmissionConfig, BatchingConfig, SchedulerConfig
from jaxserve.request import FinishReason
from jaxserve.scheduler import Scheduler, StepPlan, StepResult
from tests.scheduler.drive import drive, make_scheduler, request, start_decoding


def take_step(scheduler: Scheduler, now: float = 0.0) -> StepPlan | None:
    plan = scheduler.schedule(now)
    if plan is not None:
        scheduler.update(plan, StepResult([1] * plan.num_sampled))
    return plan


def rows(plan: StepPlan | None) -> list[tuple[str, int]]:
    return [] if plan is None else [(row.request_id, row.num_tokens) for row in plan.rows]


def batching(mode: str, **settings) -> SchedulerConfig:
    return SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, mode=mode, batching=BatchingConfig(**settings))


def test_a_static_batch_waits_until_it_is_full_or_max_wait_has_passed():
    scheduler = make_scheduler(batching("static", batch_size=3, max_wait_seconds=2.0))
    scheduler.add(request("a", 2, 5, arrival_time=10.0))
    scheduler.add(request("b", 2, 5, arrival_time=11.0))
    assert take_step(scheduler, 11.5) is None
    assert scheduler.wake_at() == 12.0
    assert rows(take_step(scheduler, 12.0)) == [("a", 2), ("b", 2)]
    scheduler.add(request("c", 2, 5, arrival_time=12.0))
    assert rows(take_step(scheduler, 20.0)) == [("a", 1), ("b", 1)]  # nobody joins a batch under way
    full = make_scheduler(batching("static", batch_size=3, max_wait_seconds=2.0))
    for name in "abcd":
        full.add(request(name, 2, 5, arrival_time=10.0))
    assert rows(take_step(full, 10.0)) == [("a", 2), ("b", 2), ("c", 2)]


def test_a_static_batch_computes_its_padding():
    """Prompts are as long as the longest; a row that has ended is computed until the batch ends."""
    scheduler = make_scheduler(batching("static", batch_size=4, max_wait_seconds=0.0))
    run = drive(scheduler, [request(name, prompt, output) for name, prompt, output in
                            (("a", 3, 2), ("b", 9, 3), ("c", 2, 20), ("d", 5, 2))])  # fmt: skip
    assert (run.plans[0].num_tokens, run.plans[0].token_bucket) == (19, 64)  # 4 * 9 = 36 of the buckets 8, 16, 32, 64
    assert [plan.num_tokens for plan in run.plans[1:5]] == [4, 2, 1, 1]
    assert {(plan.token_bucket, plan.row_bucket) for plan in run.plans[1:]} == {(8, 8)}
    config = SchedulerConfig(
        max_num_seqs=32,
        max_num_batched_tokens=64,
        mode="static",
        batching=BatchingConfig(batch_size=20, max_wait_seconds=0.0),
    )
    wide = make_scheduler(config, 200)
    run = drive(wide, [request(f"{i}", 1, 3 + 6 * (i == 0)) for i in range(20)])
    assert {(plan.token_bucket, plan.row_bucket) for plan in run.plans} == {(32, 32)}
    assert run.plans[-1].num_tokens == 1


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_final_answers_come_together(mode: str):
    scheduler = make_scheduler(batching(mode, batch_size=2, max_wait_seconds=0.0))
    run = drive(scheduler, [request(f"{i}", 2, length) for i, length in enumerate((3, 9, 4, 2))])
    assert run.finish_step == {"0": 8, "1": 8, "2": 12, "3": 12}
    assert [len(run.tokens[name]) for name in "0123"] == [3, 9, 4, 2]


def test_an_aborted_member_does_not_hold_the_batch():
    scheduler = make_scheduler(batching("static", batch_size=2, max_wait_seconds=0.0))
    scheduler.add(request("short", 2, 1))
    scheduler.add(request("long", 2, 30))
    take_step(scheduler)
    update = scheduler.abort("long")
    assert update is not None
    assert update.finish_reason is FinishReason.ABORT
    (released,) = scheduler.expire(0.0)
    assert (released.sequence.request_id, released.finish_reason) == ("short", FinishReason.LENGTH)
    assert not scheduler.unfinished


@pytest.mark.parametrize(("length_bucket", "batches"), [(64, [["a", "c"], ["b", "e"], ["d"]]),
                                                        (128, [["a", "b", "c"], ["d", "e"]])])  # fmt: skip
def test_dynamic_batches_hold_prompts_of_one_bucket(length_bucket: int, batches: list[list[str]]):
    """Buckets of 64: 1 to 64, 65 to 128, 129 to 192 tokens; of 128: 1 to 128, 129 to 256."""
    prompts = {"a": 10, "b": 65, "c": 64, "d": 192, "e": 128} if length_bucket == 64 else {
        "a": 10, "b": 65, "c": 128, "d": 192, "e": 129}  # fmt: skip
    config = SchedulerConfig(
        max_num_seqs=8,
        max_num_batched_tokens=1_024,
        mode="dynamic",
        batching=BatchingConfig(batch_size=4, max_wait_seconds=1.0, length_bucket=length_bucket),
    )
    scheduler = make_scheduler(config, 256, 16)
    for name, prompt in prompts.items():
        scheduler.add(request(name, prompt, 1))
    assert take_step(scheduler, 0.5) is None
    assert scheduler.wake_at() == 1.0
    seen = []
    while scheduler.unfinished:
        plan = take_step(scheduler, 1.0)
        assert plan is not None
        seen.append([name for name, _ in rows(plan)])
        longest = max(prompts[name] for name in seen[-1])
        assert plan.token_bucket >= longest * len(seen[-1])
    assert seen == batches


def test_a_full_bucket_runs_before_one_that_waits():
    scheduler = make_scheduler(batching("dynamic", batch_size=2, max_wait_seconds=5.0, length_bucket=8))
    scheduler.add(request("long", 12, 1, arrival_time=0.0))
    scheduler.add(request("a", 3, 1, arrival_time=1.0))
    scheduler.add(request("b", 4, 1, arrival_time=2.0))
    assert rows(take_step(scheduler, 2.0)) == [("a", 3), ("b", 4)]
    assert take_step(scheduler, 4.0) is None
    assert rows(take_step(scheduler, 5.0)) == [("long", 12)]


def test_a_dynamic_batch_is_full_with_as_many_as_can_run():
    config = SchedulerConfig(
        max_num_seqs=2, max_num_batched_tokens=64, mode="dynamic", batching=BatchingConfig(batch_size=32)
    )
    scheduler = make_scheduler(config)
    scheduler.add(request("a", 3, 1))
    scheduler.add(request("b", 3, 1))
    assert rows(take_step(scheduler, 0.0)) == [("a", 3), ("b", 3)]


@pytest.mark.parametrize(
    ("order", "phases"),
    [("prefill_first", "PPPPDDD"), ("alternating", "PDPDPDPDDD"), ("decode_first", "PDDDPDDDPDDDPDDD")],
)
def test_phases_in_separate_steps(order: str, phases: str):
    """Four prompts of a step each, of four tokens each (the first one of the prompt's step)."""
    config = SchedulerConfig(
        max_num_seqs=4,
        max_num_batched_tokens=8,
        mode="separated",
        batching=BatchingConfig(phase_order=order, max_prefill_seqs=1),
    )
    scheduler = make_scheduler(config)
    for name in "abcd":
        scheduler.add(request(name, 8, 4))
    seen = ""
    while scheduler.unfinished:
        plan = take_step(scheduler)
        assert plan is not None
        assert not (len(plan.decodes) and plan.chunks)
        seen += "D" if len(plan.decodes) else "P"
    assert seen[: len(phases)] == phases


def test_caps_of_each_phase():
    def most(prefill: int, decode: int) -> tuple[int, int]:
        config = SchedulerConfig(
            max_num_seqs=300,
            max_num_batched_tokens=600,
            mode="separated",
            batching=BatchingConfig(max_prefill_seqs=prefill, max_decode_seqs=decode),
        )
        scheduler = make_scheduler(config, 2_000)
        for i in range(300):
            scheduler.add(request(f"{i}", 2, 12))
        plans = [take_step(scheduler) for _ in range(20)]
        return max(len(plan.chunks) for plan in plans if plan), max(len(plan.decodes) for plan in plans if plan)

    assert most(32, 256) == (32, 256)
    assert most(5, 40) == (5, 40)


@pytest.mark.parametrize(("share", "tokens"), [(0.2, 20), (0.5, 50), (1.0, 96)])
def test_prefill_share_of_a_step_that_decodes(share: float, tokens: int):
    config = SchedulerConfig(
        max_num_seqs=8,
        max_num_batched_tokens=100,
        admission=AdmissionConfig(prefill_share=share, fill_buckets=False),
    )
    scheduler = make_scheduler(config, 200)
    start_decoding(scheduler, *(request(name, 3, 90) for name in "abcd"))
    scheduler.add(request("long", 300, 5))
    plan = take_step(scheduler)
    assert plan is not None
    assert (len(plan.decodes), plan.num_prefill_tokens) == (4, tokens)


def test_a_step_with_a_share_of_prompts_ends_with_a_bucket():
    """20 % of 64 tokens are 12. 5 + 12 would take a bucket of 32: prompts have 11, up to 16. Where the bucket below
    leaves them less than half of the 12, they fill the one above."""

    def plan_of(fill: bool, decodes: str) -> StepPlan:
        config = SchedulerConfig(
            max_num_seqs=16,
            max_num_batched_tokens=64,
            admission=AdmissionConfig(prefill_share=0.2, fill_buckets=fill),
        )
        scheduler = make_scheduler(config, 200)
        start_decoding(scheduler, *(request(name, 3, 90) for name in decodes))
        scheduler.add(request("long", 90, 5))
        plan = take_step(scheduler)
        assert plan is not None
        return plan

    def shown(fill: bool, decodes: str) -> tuple[int, int]:
        plan = plan_of(fill, decodes)
        return plan.num_prefill_tokens, plan.padding

    assert (shown(False, "abcde"), shown(True, "abcde")) == ((12, 15), (11, 0))
    assert (shown(False, "abcdefghijkl"), shown(True, "abcdefghijkl")) == ((12, 8), (20, 0))


@pytest.mark.parametrize(
    ("budget", "share", "prefill"), [(512, 0.5, 246), (512, 1.0, 502), (4096, 0.7, 2038), (512, 0.19, 97)]
)
def test_shares_differ_with_the_default_settings(budget: int, share: float, prefill: int):
    """Filling is on and buckets are powers of two, as on a GPU."""
    config = SchedulerConfig(
        max_num_seqs=16, max_num_batched_tokens=budget, admission=AdmissionConfig(prefill_share=share)
    )
    scheduler = make_scheduler(config, 6000)
    start_decoding(scheduler, *(request(f"d{number}", 3, 90) for number in range(10)))
    scheduler.add(request("long", 5000, 5))
    plan = take_step(scheduler)
    assert plan is not None
    assert (len(plan.decodes), plan.num_prefill_tokens) == (10, prefill)


@pytest.mark.parametrize(("fill", "prefill"), [(False, {"a": 12}), (True, {"a": 12, "b": 8})])
def test_new_prompts_fill_what_the_bucket_would_pad(fill: bool, prefill: dict[str, int]):
    """12 of 64 tokens are prompts' beside decodes; 12 + 12 take a bucket of 32, whose other 8 take another prompt."""
    config = SchedulerConfig(
        max_num_seqs=16, max_num_batched_tokens=64, admission=AdmissionConfig(prefill_share=0.2, fill_buckets=fill)
    )
    scheduler = make_scheduler(config)
    start_decoding(scheduler, *(request(name, 3, 90) for name in "lmnopqrsuvwx"))
    for name, tokens in (("a", 12), ("b", 9), ("c", 8)):
        scheduler.add(request(name, tokens, 5))
    plan = take_step(scheduler)
    assert plan is not None
    assert {chunk.request_id: chunk.num_tokens for chunk in plan.chunks} == prefill
    assert len(plan.decodes) == 12


@pytest.mark.parametrize(("chunk", "steps"), [(0, [64, 64, 22]), (40, [40, 40, 40, 30])])
def test_chunk_size(chunk: int, steps: list[int]):
    config = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=64, long_prefill_token_threshold=chunk)
    run = drive(make_scheduler(config), [request("long", 150, 1)])
    assert [plan.num_tokens for plan in run.plans] == steps


def test_only_long_prompts_are_chunked():
    """Up to the threshold a prompt waits for a step that has room for all of it."""
    config = SchedulerConfig(
        max_num_seqs=4,
        max_num_batched_tokens=2_500,
        long_prefill_token_threshold=512,
        admission=AdmissionConfig(chunked_prefill_min_tokens=2_000),
    )
    scheduler = make_scheduler(config, 1_000, 16)
    for name, prompt in (("whole", 2_000), ("chunked", 2_001), ("late", 600)):
        scheduler.add(request(name, prompt, 3))
    assert rows(take_step(scheduler)) == [("whole", 2_000), ("chunked", 500)]
    assert rows(take_step(scheduler)) == [("whole", 1), ("chunked", 512), ("late", 600)]


def test_watermark_is_left_free_while_others_run():
    config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=64, admission=AdmissionConfig(watermark=0.25))
    scheduler = make_scheduler(config, num_pages=21)  # 20 to use: 5 are kept
    scheduler.add(request("first", 64, 3))  # alone it may use all: 16 pages
    assert rows(take_step(scheduler)) == [("first", 64)]
    scheduler.add(request("second", 1, 3))
    assert rows(take_step(scheduler)) == [("first", 1)]
    scheduler.abort("first")
    assert rows(take_step(scheduler)) == [("second", 1)]
    scheduler.add(request("too much", 57, 3))
    scheduler.add(request("behind", 1, 3))
    assert rows(take_step(scheduler)) == [("second", 1)]
    scheduler.abort("too much")
    scheduler.add(request("fits", 52, 3))
    assert rows(take_step(scheduler)) == [("second", 1), ("behind", 1), ("fits", 52)]


@pytest.mark.parametrize(
    ("reservation", "held", "running"), [("none", 2, 4), ("max_tokens", 6, 3), ("max_model_len", 10, 2)]
)
def test_page_reservations(reservation: str, held: int, running: int):
    """Prompts of 8 tokens and max_tokens 17 in pages of 4, up to 40 tokens a sequence, 20 pages: what is reserved
    decides how many run, and none of them is ever preempted."""
    config = SchedulerConfig(
        max_num_seqs=4, max_num_batched_tokens=64, admission=AdmissionConfig(page_reservation=reservation)
    )
    scheduler = make_scheduler(config, num_pages=21, max_model_len=40)
    for i in range(4):
        scheduler.add(request(f"{i}", 8, 17))
    take_step(scheduler)
    assert scheduler.num_running == running
    assert scheduler.pool.num_used == held * running
    while scheduler.unfinished:
        take_step(scheduler)
        scheduler.check_integrity()
    assert (scheduler.num_preemptions > 0) == (reservation == "none")


def test_a_delay_lets_prompts_come_together():
    """No prompt joins before the first has waited 2 times as long as the last step with a prefill took."""
    config = SchedulerConfig(
        max_num_seqs=4, max_num_batched_tokens=64, admission=AdmissionConfig(scheduler_delay_factor=2.0)
    )
    scheduler = make_scheduler(config)
    scheduler.add(request("a", 8, 50, arrival_time=0.0))
    assert rows(take_step(scheduler, 0.0)) == [("a", 8)]  # nothing runs: no delay
    scheduler.add(request("b", 8, 9, arrival_time=0.5))
    assert rows(take_step(scheduler, 0.5)) == [("a", 1)]  # the step with the prefill took 0.5: until 1.5
    scheduler.add(request("c", 8, 9, arrival_time=1.4))
    assert rows(take_step(scheduler, 1.4)) == [("a", 1)]
    assert rows(take_step(scheduler, 1.5)) == [("a", 1), ("b", 8), ("c", 8)]


def test_one_at_a_time():
    scheduler = make_scheduler(SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, mode="none"))
    run = drive(scheduler, [request(name, 3, 5) for name in "abc"])
    assert [len(plan.rows) for plan in run.plans] == [1] * 15
    assert run.finish_step == {"a": 4, "b": 9, "c": 14}
