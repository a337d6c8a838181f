"""max_decode_gap: chunks that keep the bound, what they cost, and the causes of the gaps that exceed it."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config.scheduling import (
    FORMATIONS,
    PHASE_ORDERS,
    AdaptationConfig,
    AdmissionConfig,
    BatchingConfig,
    PreemptionConfig,
    SchedulerConfig,
)
from jaxserve.scheduler import StepPlan
from jaxserve.scheduler.buckets import Buckets, close, powers
from jaxserve.scheduler.corrected_step_costs import CorrectedStepCosts
from jaxserve.scheduler.decode_gap import mixed_step
from jaxserve.scheduler.gap_limit import FORCED_EVERY, PROMISED_SHARE, TOLERANCE, largest_chunk
from jaxserve.scheduler.gap_monitor import CAUSES
from jaxserve.scheduler.policies.named import POLICIES
from jaxserve.scheduler.step_shape import StepShape
from tests.budgets import budget
from tests.scheduler.drive import make_scheduler
from tests.scheduler.gap_drive import FakeCosts, VirtualEngine, request

LONGEST = 2000
COSTS = FakeCosts()


def least_bound(costs: FakeCosts, rows: int, buckets: Buckets, *, separated: bool) -> float:
    """The bound that every step keeps: decodes of the longest contexts are within the promised share of it, and leave
    time for the smallest chunk of the longest prompt."""
    alone = costs.seconds(mixed_step(rows, rows * LONGEST, 0, 0, buckets))
    tokens = buckets.token_bucket(min(rows + buckets.tokens[0], buckets.tokens[-1]))
    chunk = mixed_step(0, 0, tokens, LONGEST, buckets)
    beside = chunk._replace(decode_rows=rows, decode_context=float(rows * LONGEST))
    return max(alone / PROMISED_SHARE, alone + costs.seconds(chunk) if separated else costs.seconds(beside))


def requests_of(rng: random.Random, rows: int, count: int) -> list:
    """Streams with long outputs, then prompts that arrive while they decode."""
    found = [request(f"s{number}", rng.randint(1, 60), rng.randint(20, 90)) for number in range(rng.randint(1, rows))]
    at = 0.0
    for number in range(count):
        at += rng.choice((0.0, 0.01, 0.1))
        prompt, output = rng.choice((rng.randint(1, 50), rng.randint(200, 900))), rng.randint(1, 40)
        found.append(
            request(f"p{number}", prompt, output, at, priority=rng.choice((0, 3, 9)), tenant=rng.choice(("a", "b")))
        )
    return found


@st.composite
def cases(draw):
    rng = random.Random(draw(st.integers(0, 10**6)))
    mode, rows = draw(st.sampled_from(["continuous", "continuous", "separated"])), draw(st.sampled_from([2, 6, 12]))
    sizes = draw(st.sampled_from([powers, close]))
    costs = FakeCosts(
        fixed=draw(st.sampled_from([1e-4, 3e-3])),
        token=draw(st.sampled_from([1e-6, 1e-5, 2e-4])),
        position=draw(st.sampled_from([0.0, 1e-7])),
        pair=draw(st.sampled_from([0.0, 1e-8, 3e-7])),
        read=draw(st.sampled_from([0.0, 1e-6])),
    )
    tokens = draw(st.sampled_from([64, 512, 2048]))
    buckets = Buckets(sizes(tokens), sizes(rows))
    bound = least_bound(costs, rows, buckets, separated=mode == "separated") * draw(st.sampled_from([1.01, 1.5, 4.0]))
    config = SchedulerConfig(
        max_num_seqs=rows,
        max_num_batched_tokens=tokens,
        max_decode_gap=bound,
        mode=mode,
        formation=draw(st.sampled_from(FORMATIONS)),
        policy=draw(st.sampled_from(list(POLICIES))),
        long_prefill_token_threshold=draw(st.sampled_from([0, 0, 100])),
        batching=BatchingConfig(phase_order=draw(st.sampled_from(PHASE_ORDERS))),
        admission=AdmissionConfig(
            prefill_share=draw(st.sampled_from([1.0, 1.0, 0.3])),
            chunked_prefill_min_tokens=draw(st.sampled_from([0, 2000])),
            scheduler_delay_factor=draw(st.sampled_from([0.0, 1.0])),
        ),
        preemption=PreemptionConfig(preempt_length_ratio=draw(st.sampled_from([None, 4.0]))),
        adaptation=AdaptationConfig(load_profile=draw(st.booleans())),
    )
    pages = draw(st.sampled_from([4096, 2 * LONGEST // 16]))
    engine = VirtualEngine(config, costs.seconds, num_pages=pages, max_model_len=LONGEST, sizes=sizes)
    return engine, requests_of(rng, rows, draw(st.integers(1, 6))), bound


@budget(30)
@given(cases())
def test_no_gap_exceeds_the_bound(case):
    engine, requests, bound = case
    engine.run(requests)
    assert engine.ended == {one.request_id for one in requests}
    gaps = engine.all_gaps(preempted=False)
    assert gaps.max(initial=0.0) <= TOLERANCE * bound
    exceeded = engine.scheduler.num_gaps_exceeded
    assert sum(exceeded.values()) == exceeded["preemption"]


@budget(15)
@given(st.integers(0, 10**6), st.sampled_from(["continuous", "separated"]), st.sampled_from([0.2, 0.7, 1.2, 3.0]))
def test_gaps_by_cause_are_all_gaps(seed, mode, share):
    """On a device of random speed, with stalls, copies, preemptions and aborts."""
    rng = random.Random(seed)
    bound = share * least_bound(COSTS, 6, Buckets(powers(256), powers(6)), separated=mode == "separated")

    def device(shape: StepShape) -> float:
        return COSTS.seconds(shape) * rng.lognormvariate(0.2, 0.3) * rng.choice((1,) * 50 + (6,))

    def abort(engine: VirtualEngine) -> None:
        if rng.random() < 0.01 and engine.scheduler.unfinished:
            engine.scheduler.abort(rng.choice(engine.scheduler.request_ids))

    config = SchedulerConfig(
        max_num_seqs=6,
        max_num_batched_tokens=256,
        max_decode_gap=max(bound, 1.05 * COSTS.seconds(mixed_step(1, 1, 7, 0, Buckets(powers(256), powers(6))))),
        mode=mode,
        preemption=PreemptionConfig(preemption_mode=rng.choice(("swap", "recompute"))),
    )
    engine = VirtualEngine(
        config, COSTS.seconds, device, num_pages=150, num_host_pages=200, max_model_len=LONGEST, before_step=abort
    )
    engine.run(requests_of(rng, 6, 8))
    assert config.max_decode_gap is not None
    exceeded = int((engine.all_gaps() > TOLERANCE * config.max_decode_gap).sum())
    assert sum(engine.scheduler.num_gaps_exceeded.values()) == exceeded
    by_cause = dict.fromkeys(CAUSES, 0)
    for gap in engine.gaps:
        by_cause[gap.cause] += gap.count
        assert gap.longest_seconds > TOLERANCE * config.max_decode_gap
    assert by_cause == engine.scheduler.num_gaps_exceeded


def streams(count: int = 16, output: int = 3000) -> list:
    return [request(f"s{number}", 20, output) for number in range(count)]


def config_of(bound: float | None, **options) -> SchedulerConfig:
    sizes: dict[str, Any] = {"max_num_seqs": 32, "max_num_batched_tokens": 2048} | options
    return SchedulerConfig(max_decode_gap=bound, **sizes)


@pytest.mark.parametrize("policy", ["fcfs", "deadline"])
def test_the_p99_gap_is_kept_when_the_model_of_the_device_is_wrong(policy):
    """The device is up to 2.5 times slower than predicted, differently for each bucket, and its times scatter."""
    rng = np.random.default_rng(5)
    slower = {size: rng.uniform(0.7, 2.5) for size in powers(2048)}

    def device(shape: StepShape) -> float:
        wrong = 1.6 * COSTS.pair * shape.prefill_pairs
        return (COSTS.seconds(shape) * slower[shape.token_bucket] + wrong) * float(rng.lognormal(0.0, 0.08))

    prompts = [request(f"p{number}", 1500, 2, 0.2 + 0.05 * number) for number in range(60)]
    engine = VirtualEngine(config_of(0.02, policy=policy), COSTS.seconds, device).run([*streams(), *prompts])
    assert np.quantile(engine.all_gaps(), 0.99) <= TOLERANCE * 0.02
    chunks = [chunk.num_tokens for plan in engine.plans for chunk in plan.chunks if len(plan.decodes)]
    assert np.mean(chunks) > 100, "the bound is kept by doing next to nothing"


def test_prompts_progress_beside_decodes_that_exceed_the_bound():
    bound = 0.5 * COSTS.seconds(mixed_step(16, 16 * 20, 0, 0, Buckets(powers(2048), powers(32))))
    slow = dataclasses.replace(COSTS, fixed=1e-5, position=2e-6)
    prompts = [request(f"p{number}", 300, 2, 0.5) for number in range(4)]
    engine = VirtualEngine(config_of(bound), slow.seconds).run([*streams(output=300), *prompts])
    assert {"p0", "p3"} <= engine.ended
    exceeded = engine.scheduler.num_gaps_exceeded
    assert exceeded["decodes"] > 0
    assert exceeded["decodes"] == sum(exceeded.values())
    with_chunks = [plan for plan in engine.plans if len(plan.decodes) and plan.chunks]
    assert {plan.num_prefill_tokens for plan in with_chunks} <= set(range(1, 17))


def test_a_chunk_that_breaks_the_promise_is_rare():
    """Decodes alone are well within the bound, and even the smallest chunk is not: its program is slower."""

    def seconds(shape: StepShape) -> float:
        return 0.004 + (0.01 if shape.prefill_tokens and shape.decode_rows > 1 else 0.0)

    prompts = [request("p0", 40, 1, 0.1), request("p1", 10, 1, 0.2)]
    engine = VirtualEngine(config_of(0.01), seconds).run([*streams(output=1200), *prompts])
    gaps = engine.all_gaps()
    assert np.quantile(gaps, 0.99) <= TOLERANCE * 0.01
    mixed = [number for number, plan in enumerate(engine.plans) if len(plan.decodes) and plan.chunks]
    assert len(mixed) == 4  # 40 + 10 tokens, 16 at a time: those of one bucket beside the decodes
    assert min(np.diff(mixed)) > FORCED_EVERY
    assert engine.scheduler.num_gaps_exceeded == dict.fromkeys(CAUSES, 0) | {"minimum_chunk": 4 * 16}


def test_each_cause_by_hand():
    """A stall, a larger program than planned and a preemption, each of one step."""
    slow: dict[int, float] = {}

    def run(change) -> dict[str, int]:
        engine = VirtualEngine(
            config_of(0.02), COSTS.seconds, lambda shape: COSTS.seconds(shape) + slow.pop(len(engine.plans), 0.0)
        )
        change(engine)
        engine.run(streams(4, 60))
        return {cause: count for cause, count in engine.scheduler.num_gaps_exceeded.items() if count}

    assert run(lambda engine: None) == {}
    slow[30] = 0.1
    assert run(lambda engine: None) == {"stall": 4}

    def preempt_once(engine: VirtualEngine) -> None:
        def before_step(engine: VirtualEngine) -> None:
            if len(engine.plans) == 30:
                slow[33] = 0.1
                (one,) = [s for s in engine.scheduler._queues.running.sequences if s.request_id == "s2"]
                assert engine.scheduler.decode_gap is not None
                engine.scheduler.decode_gap.monitor.preempted(30, [one.order])

        engine._before_step = before_step

    assert run(preempt_once) == {"stall": 4}  # it had a token since
    slow[30] = 0.1

    def larger_program(engine: VirtualEngine) -> None:
        collect = engine._collect

        def padded(plan: StepPlan, end: float) -> None:
            collect(dataclasses.replace(plan, token_bucket=512) if plan.step == 29 else plan, end)

        engine._collect = padded

    assert run(larger_program) == {"missing_program": 4}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_bound_that_nothing_exceeds_changes_no_plan(policy):
    requests = [*streams(8, 100), *(request(f"p{number}", 900, 5, 0.01 * number) for number in range(12))]

    def plans(bound: float | None) -> list:
        engine = VirtualEngine(config_of(bound, policy=policy), COSTS.seconds).run(requests)
        return [(plan.rows, plan.token_bucket, plan.row_bucket) for plan in engine.plans]

    assert plans(None) == plans(1000.0)


def test_the_number_of_predictions_does_not_depend_on_those_that_wait():
    def calls(waiting: int) -> int:
        count = [0]

        def seconds(shape: StepShape) -> float:
            count[0] += 1
            return COSTS.seconds(shape)

        def schedule_once(engine: VirtualEngine) -> None:
            if len(engine.plans) == 5:
                for number in range(waiting):
                    engine.scheduler.add(request(f"w{number}", 1000, 1))
                count[0] = 0
            if len(engine.plans) == 6:
                found.append(count[0])
                for name in engine.scheduler.request_ids:
                    engine.scheduler.abort(name)

        found: list[int] = []
        config = config_of(0.01, max_num_waiting=5000)
        VirtualEngine(config, seconds, COSTS.seconds, before_step=schedule_once).run(streams(4, 20))
        return found[0]

    assert calls(2) == calls(2000) < 60


@pytest.mark.parametrize("seed", range(20))
def test_the_largest_chunk_against_all_of_them(seed):
    rng = random.Random(seed)
    buckets, filled = Buckets(rng.choice((powers, close))(512), (8,)), rng.randint(0, 100)
    costs = FakeCosts(pair=rng.choice((0.0, 1e-6)), token=rng.choice((0.0, 1e-5)))

    def seconds(count: int) -> float:
        return costs.fixed + costs.token * buckets.token_bucket(filled + count) + costs.pair * count * (count + 500)

    for _ in range(30):
        wanted, allowed = rng.randint(1, 512 - filled), rng.uniform(0.0, 1.2) * seconds(512 - filled)
        found = largest_chunk(seconds, wanted, allowed, filled, buckets)
        fitting = [count for count in range(1, wanted + 1) if seconds(count) <= allowed]
        assert (found > 0) == bool(fitting)
        if fitting:
            ends = [count for count in fitting if filled + count in buckets.tokens]
            assert found in {max(fitting), max(ends, default=0)}
            assert found / seconds(found) >= max(fitting) / seconds(max(fitting))


@pytest.mark.parametrize("sigma", [0.02, 0.2, 0.5])
def test_the_margin_is_the_99th_percentile_of_the_error(sigma):
    rng = np.random.default_rng(1)
    costs = CorrectedStepCosts(lambda shape: 0.01)
    shape = mixed_step(4, 400, 60, 0, Buckets((64,), (8,)))
    longer = []
    for _ in range(20_000):
        seconds = 0.025 * float(rng.lognormal(0.0, sigma))
        longer.append(seconds > costs.margin * costs.seconds(shape))
        costs.observe([shape], seconds, near_bound=True)
    assert costs.seconds(shape) == pytest.approx(0.025, rel=0.6)
    assert np.mean(longer[2000:]) <= 0.012
    if sigma == 0.5:
        assert np.mean(longer[2000:]) >= 0.008


def test_a_bound_that_no_step_keeps_is_refused_with_the_figures():
    with pytest.raises(ValueError, match=r"max_decode_gap is 0.001 s; the smallest step, of 8 tokens, takes 0.0012 s"):
        VirtualEngine(config_of(0.001), COSTS.seconds)
    with pytest.raises(ValueError, match="predicts no step times"):
        make_scheduler(config_of(0.01))
    engine = VirtualEngine(config_of(0.0022), COSTS.seconds)
    assert engine.scheduler.decode_gap is not None
    (line,) = engine.scheduler.decode_gap.warnings
    assert "decoding 32 rows alone takes 0.0016 s" in line


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"max_decode_gap": 0.0}, "max_decode_gap is 0.0; it must be finite and at least 0.0001"),
        ({"max_decode_gap": float("nan")}, "max_decode_gap is nan"),
        ({"max_decode_gap": 0.1, "enable_chunked_prefill": False}, "enable_chunked_prefill is False"),
        ({"max_decode_gap": 0.1, "mode": "static"}, "mode is 'static'"),
        ({"max_decode_gap": 0.1, "mode": "dynamic"}, "mode is 'dynamic'"),
    ],
)
def test_settings_that_contradict_the_bound(options, problem):
    with pytest.raises(ValueError, match=problem):
        SchedulerConfig(**options)
