"""The worked examples of batching and scheduling, each exactly, on the real scheduler over the fake runner."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import pytest

from jaxserve.config.scheduling import AdaptationConfig, AdmissionConfig, BatchingConfig, PolicyConfig, SchedulerConfig
from jaxserve.kv_cache.page_pool import PagePool
from jaxserve.request import EngineRequest
from jaxserve.scheduler import Scheduler, StepPlan, StepResult
from jaxserve.scheduler.buckets import Buckets
from tests.scheduler.drive import Run, drive, make_scheduler, request, start_decoding

LENGTHS = [10, 20, 15, 100, 25, 30, 15, 50, 40, 10]


def run_lengths(mode: str, lengths: Sequence[int], batch: int) -> Run:
    """Requests of one prompt token and so many output tokens, a step each, in buckets that pad nothing themselves."""
    config = SchedulerConfig(
        max_num_seqs=batch,
        max_num_batched_tokens=max(8, batch),
        mode=mode,
        batching=BatchingConfig(batch_size=batch, max_wait_seconds=0.0),
    )
    buckets = Buckets(tuple(range(1, config.max_num_batched_tokens + 1)), tuple(range(1, batch + 1)))
    scheduler = Scheduler(config, PagePool(sum(-(-length // 4) for length in lengths) + 1, 4), buckets)
    return drive(scheduler, [request(f"{i}", 1, length) for i, length in enumerate(lengths)])


def latencies(run: Run) -> list[int]:
    """Steps from the first one that served a request to the one whose update brought its final answer."""
    first = {row.request_id: plan.step for plan in reversed(run.plans) for row in plan.rows}
    return [run.finish_step[name] + 1 - first[name] for name in run.finish_step]


@pytest.mark.parametrize(("mode", "steps", "mean"), [("static", 190, 68), ("continuous", 100, 31.5)])
def test_ten_requests_static_and_continuous(mode: str, steps: int, mean: float):
    run = run_lengths(mode, LENGTHS, batch=4)
    assert len(run.plans) == steps
    assert statistics.mean(latencies(run)) == mean
    assert max(latencies(run)) == 100


def test_ten_requests_one_at_a_time():
    run = run_lengths("none", LENGTHS, batch=4)
    assert len(run.plans) == sum(LENGTHS)
    assert sorted(latencies(run)) == sorted(LENGTHS)


@pytest.mark.parametrize(
    ("lengths", "useful", "computed", "mean_idle"),
    [([4, 12, 8], 24, 36, 4), ([10, 20, 50, 100], 180, 400, 55), ([50] * 31 + [500], 2_050, 16_000, 435.9375)],
)
def test_utilization_of_a_static_batch(lengths: list[int], useful: int, computed: int, mean_idle: float):
    """67 % and 45 % of the computed tokens are useful; the third batch has 4.1 useful tokens a step."""
    run = run_lengths("static", lengths, batch=len(lengths))
    assert sum(plan.num_tokens for plan in run.plans) == useful
    assert sum(plan.token_bucket for plan in run.plans) == computed
    assert statistics.mean(len(run.plans) - len(run.tokens[name]) for name in run.tokens) == mean_idle
    if max(lengths) == 500:
        assert useful / len(run.plans) == 4.1


def test_tokens_of_a_mixed_step_worked_example():
    config = SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=1024)
    scheduler = make_scheduler(config, num_pages=256, page_size=16)
    start_decoding(scheduler, *(request(name, 5, 9) for name in "ABC"))
    scheduler.add(request("D", 256, 4))
    scheduler.add(request("E", 512, 4))
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.num_tokens == 771
    assert plan.num_prefill_tokens == 768
    assert plan.token_bucket == 1024
    assert plan.padding == 253


def test_joining_within_budget_and_pages_worked_example():
    config = SchedulerConfig(max_num_seqs=5, max_num_batched_tokens=300, enable_chunked_prefill=False)
    scheduler = make_scheduler(config, num_pages=23, page_size=16)  # D and E hold a page each, 20 are free
    start_decoding(scheduler, request("D", 3, 9), request("E", 3, 9))
    assert scheduler.pool.num_free == 20
    for name, length in (("A", 200), ("B", 150), ("C", 100)):
        scheduler.add(request(name, length, 4))
    plan = scheduler.schedule()
    assert plan is not None
    assert [row.request_id for row in plan.rows] == ["D", "E", "A"]
    assert plan.num_tokens == 202
    assert plan.num_prefill_tokens == 200
    assert len(plan.rows[2].new_pages) == 13
    while scheduler.num_waiting == 2:  # B's 10 pages are free only when A's 13 have come back
        assert "A" in {row.request_id for row in plan.rows}
        scheduler.update(plan, StepResult(tuple(1 for _ in plan.sampled)))
        plan = scheduler.schedule()
        assert plan is not None
    assert [row.request_id for row in plan.rows] == ["D", "E", "B", "C"]


@pytest.mark.parametrize(("prompt", "steps"), [(10_000, 20), (2_000, 4)])
def test_chunks_of_a_long_prompt_worked_example(prompt: int, steps: int):
    scheduler = make_scheduler(SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=512), 800, 16)
    run = drive(scheduler, [request("long", prompt, 1)])
    assert len(run.plans) == steps
    assert [bool(plan.sampled) for plan in run.plans] == [False] * (steps - 1) + [True]


def test_a_whole_prompt_blocks_the_others_and_chunks_do_not():
    """10,000 tokens at once are one step of everybody; in chunks of 512 the others decode in each of the 20 steps."""

    def decodes(budget: int, chunk: int) -> list[int]:
        config = SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=budget, long_prefill_token_threshold=chunk)
        scheduler = make_scheduler(config, 800, 16)
        start_decoding(scheduler, request("D", 3, 90))
        scheduler.add(request("long", 10_000, 4))
        steps = []
        while plan := scheduler.schedule():
            scheduler.update(plan, StepResult([1] * plan.num_sampled))
            if not plan.chunks:
                return steps
            assert plan.decodes.request_ids == ("D",)
            steps.append(plan.num_prefill_tokens)
        raise AssertionError("nothing to do")

    assert decodes(10_240, 0) == [10_000]
    assert decodes(1_024, 512) == [512] * 19 + [272]


@pytest.mark.parametrize("policy", ["fair", "fcfs"])
def test_two_tenants_gap_of_service(policy: str):
    """Under fair service at most 2 * max(w_p * longest prompt, w_q * tokens of the pool) while both wait, without
    preemption; first come, first served, it grows with the queue of who came first."""
    config = SchedulerConfig(
        max_num_seqs=4,
        max_num_batched_tokens=64,
        policy=policy,
        ordering=PolicyConfig(prompt_token_weight=1.0, output_token_weight=2.0),
        admission=AdmissionConfig(page_reservation="max_tokens"),
    )
    scheduler = make_scheduler(config, num_pages=17, page_size=4)
    bound = 2 * max(1.0 * 16, 2.0 * 16 * 4)
    requests = [request(f"flood{i}", 16, 12, tenant="flood") for i in range(150)]
    requests += [request(f"other{i}", 4, 3 + i % 9, tenant="other") for i in range(350)]
    service = {"flood": 0.0, "other": 0.0}
    gaps = []
    tenant = {one.request_id: one.options.tenant for one in requests}

    def count(plan: StepPlan) -> None:
        for row in plan.chunks:
            service[tenant[row.request_id]] += len(row.token_ids)
        for row in plan.sampled:
            service[tenant[row.request_id]] += 2.0
        waiting = {one.options.tenant for one in requests if scheduler_waits(scheduler, one)}
        if len(waiting) == 2:
            gaps.append(abs(service["flood"] - service["other"]))

    serve(scheduler, requests, count)
    assert scheduler.num_preemptions == 0
    if policy == "fair":
        assert len(gaps) > 250
        assert max(gaps) <= bound
    else:
        assert max(gaps) > 10 * bound
        assert gaps == sorted(gaps)


def scheduler_waits(scheduler: Scheduler, one: EngineRequest) -> bool:
    sequence = scheduler._sequences.get(one.request_id)
    return sequence is not None and sequence.waits_new


def serve(scheduler: Scheduler, requests: Sequence[EngineRequest], count) -> None:
    """All requests to their end, a step after the other; `count` sees each plan."""
    for one in requests:
        scheduler.add(one)
    while scheduler.unfinished:
        plan = scheduler.schedule()
        assert plan is not None
        count(plan)
        scheduler.update(plan, StepResult([1] * plan.num_sampled))


@pytest.mark.parametrize(("prompt", "running"), [(512, 16), (4096, 8), (16, 256)])
def test_adaptive_batch_size(prompt: int, running: int):
    """Target 8,192 tokens over the moving average of prompts, from 8 to 256."""
    config = SchedulerConfig(
        max_num_seqs=300, max_num_batched_tokens=50_000, adaptation=AdaptationConfig(adaptive_batch_size=True)
    )
    scheduler = make_scheduler(config, num_pages=3_000, page_size=16)
    for i in range(300):
        scheduler.add(request(f"{i}", prompt, 50))
    scheduler.schedule()
    assert scheduler.num_running == running


def test_load_profile():
    """Load below 0.3: 512 tokens, prompts whole; below 0.7: 2,048; above: 4,096; it changes past a bound by 0.05."""
    config = SchedulerConfig(
        max_num_seqs=100, max_num_batched_tokens=8_192, adaptation=AdaptationConfig(load_profile=True)
    )
    scheduler = make_scheduler(config, num_pages=30_000, page_size=16)
    seen = []
    for unfinished in range(1, 101):
        scheduler.add(request(f"{unfinished}", 1, 900))
        plan = scheduler.schedule()
        assert plan is not None
        scheduler.update(plan, StepResult([1] * plan.num_sampled))
        seen.append(scheduler.profile)
    assert [seen.count(name) for name in ("latency", "balanced", "throughput")] == [34, 40, 26]
    for unfinished in range(100, 0, -1):
        scheduler.abort(f"{unfinished}")
        scheduler.schedule()
        seen.append(scheduler.profile)
    assert [seen[100:].count(name) for name in ("throughput", "balanced", "latency")] == [35, 40, 25]


@pytest.mark.parametrize(("unfinished", "tokens"), [(20, 512), (50, 2_048), (90, 4_096)])
def test_load_profile_bounds_the_step(unfinished: int, tokens: int):
    config = SchedulerConfig(
        max_num_seqs=100, max_num_batched_tokens=8_192, adaptation=AdaptationConfig(load_profile=True)
    )
    scheduler = make_scheduler(config, num_pages=30_000, page_size=16)
    for i in range(unfinished):
        scheduler.add(request(f"{i}", 256, 9))
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.num_tokens == tokens
    long = make_scheduler(config, num_pages=3_000, page_size=16)
    long.add(request("long", 3_000, 9))
    plan = long.schedule()
    assert plan is not None
    assert plan.num_tokens == 3_000  # latency: whole, whatever its length


def test_a_prompt_longer_than_the_share_is_taken_whole_under_latency():
    """Chunking is off there: one of more than 97 tokens runs alone with the decodes, however long it is."""
    config = SchedulerConfig(
        max_num_seqs=100, max_num_batched_tokens=8192, adaptation=AdaptationConfig(load_profile=True)
    )
    scheduler = make_scheduler(config, num_pages=20_000)
    scheduler.add(request("decodes", 3, 100))
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.update(plan, StepResult([1] * plan.num_sampled))
    for name in "ab":
        scheduler.add(request(name, 3_000, 5))
    plan = scheduler.schedule()
    assert plan is not None
    assert (scheduler.profile, len(plan.decodes), [row.num_tokens for row in plan.chunks]) == ("latency", 1, [3_000])


@pytest.mark.parametrize(("unfinished", "prefill"), [(25, 97), (55, 1_024), (90, 2_867)])
def test_load_profile_bounds_the_share_of_prompts(unfinished: int, prefill: int):
    """Beside decodes prompts take less than 20 % of the 512 tokens under latency, 50 % of 2,048, 70 % of 4,096."""
    config = SchedulerConfig(
        max_num_seqs=100,
        max_num_batched_tokens=8192,
        admission=AdmissionConfig(fill_buckets=False),
        adaptation=AdaptationConfig(load_profile=True),
    )
    scheduler = make_scheduler(config, num_pages=20_000)
    scheduler.add(request("decodes", 3, 100))
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.update(plan, StepResult([1] * plan.num_sampled))
    for number in range(unfinished - 1):
        scheduler.add(request(f"r{number}", 97, 5))
    plan = scheduler.schedule()
    assert plan is not None
    assert len(plan.decodes) == 1
    assert plan.num_prefill_tokens == prefill
