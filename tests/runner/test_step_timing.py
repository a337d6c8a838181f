"""Step times measured at warm-up: which steps are measured, what is fitted to them, and that the engine goes on."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from jaxserve.config.settings import CacheConfig
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.request import EngineRequest
from jaxserve.runner import step_timing
from jaxserve.runner.model_runner import ModelRunner, packers
from jaxserve.scheduler.plan import StepPlan
from jaxserve.scheduler.step_shape import StepShape, shape_of
from tests.runner.drive import drive
from tests.runner.test_swap import CONFIG

LARGER = dataclasses.replace(
    CONFIG,
    scheduler=dataclasses.replace(CONFIG.scheduler, max_num_seqs=16, max_num_batched_tokens=64),
    token_buckets=(8, 16, 32, 64),
    row_buckets=(8, 16),
)


@pytest.mark.parametrize("num_pages", [3, 48])
def test_every_bucket_is_measured_by_steps_that_can_be_packed(monkeypatch, num_pages):
    shapes = dataclasses.replace(resolve_shapes(LARGER, "cpu"), num_pages=num_pages)
    forward, sample = packers(shapes)
    clock = [0.0]
    seen: list[StepPlan] = []

    def cost(shape: StepShape) -> float:
        return 0.01 + 1e-3 * shape.token_bucket + 1e-5 * shape.decode_context + 1e-6 * shape.prefill_pairs

    def compute(plan: StepPlan) -> None:
        forward[plan.token_bucket].pack(plan)
        sample[plan.row_bucket].pack(plan)
        assert {page for write in plan.table_writes for page in write.pages} <= set(range(1, num_pages))
        assert all(row.start + row.num_tokens <= shapes.max_model_len for row in plan.rows)
        seen.append(plan)
        clock[0] += cost(shape_of(plan))

    monkeypatch.setattr(step_timing.time, "perf_counter", lambda: clock[0])
    found = step_timing.measure_steps(shapes, compute, 0.0)
    assert {plan.token_bucket for plan in seen} == {8, 16, 32, 64}
    assert {plan.row_bucket for plan in seen} == {8, 16}
    assert {plan.token_bucket for plan in seen if not plan.chunks} == {8, 16}
    assert {plan.token_bucket for plan in seen if not len(plan.decodes)} == {8, 16, 32, 64}
    for plan in seen:
        assert found.seconds(shape_of(plan)) == pytest.approx(cost(shape_of(plan)), rel=0.1)


def test_the_engine_goes_on_as_without(compiled_once):
    """Whatever the measurement left in pages and slots."""
    requests = [EngineRequest(f"r{index}", tuple(range(1, 20 + index)), max_tokens=6, seed=index) for index in range(3)]

    def tokens(**limits: Any) -> tuple[ModelRunner, list[list[int]]]:
        scheduler, cache = dataclasses.replace(CONFIG.scheduler, **limits), CacheConfig(num_pages=48)
        config = dataclasses.replace(CONFIG, scheduler=scheduler, cache=cache)
        runner = ModelRunner(config)
        return runner, drive(runner, CONFIG, requests, poison=False).tokens

    plain, wanted = tokens()
    measured, found = tokens(max_decode_gap=10.0)
    assert found == wanted
    assert measured.num_executables == plain.num_executables
    assert measured.compile_misses == 0
    assert measured.step_costs.largest_seconds >= plain.step_costs.largest_seconds > 0
