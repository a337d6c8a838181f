"""What the largest step is predicted to take, and how steps that were measured correct it."""

from __future__ import annotations

import dataclasses

import pytest

from jaxserve.config.settings import EngineConfig
from jaxserve.engine.step_time import StepTimePrediction
from jaxserve.models.params import make_mesh
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.runner.protocol import StepCosts
from jaxserve.runner.step_cost_model import step_costs
from jaxserve.scheduler.plan import NO_DECODES, NO_SAMPLES, StepPlan
from jaxserve.scheduler.step_shape import shape_of


def plan(tokens: int) -> StepPlan:
    return StepPlan(0, NO_DECODES, (), NO_SAMPLES, token_bucket=tokens, row_bucket=0, num_tokens=tokens)


def test_the_prediction_is_corrected_by_what_is_measured():
    prediction = StepTimePrediction(StepCosts(lambda shape: shape.token_bucket * 0.01, largest_seconds=8.0))
    assert prediction.largest_seconds == 8.0
    for tokens in (10, 400, 30) * 50:
        prediction.observe(plan(tokens), tokens * 0.02)
    assert prediction.largest_seconds == pytest.approx(16.0)
    for tokens in (10, 400, 30) * 200:
        prediction.observe(plan(tokens), tokens * 0.005)
    assert prediction.largest_seconds == pytest.approx(4.0)


def test_long_steps_say_more_than_short_ones():
    prediction = StepTimePrediction(StepCosts(lambda shape: shape.token_bucket * 0.01, largest_seconds=8.0))
    for _ in range(50):
        prediction.observe(plan(1), 0.1)  # ten times what was predicted: what every step costs, however small
        prediction.observe(plan(1000), 10.0)
    assert prediction.largest_seconds == pytest.approx(8.0, rel=0.05)


def test_a_step_that_was_held_up_does_not_hide_the_next():
    prediction = StepTimePrediction(StepCosts(lambda shape: shape.token_bucket * 0.01, largest_seconds=8.0))
    for _ in range(20):
        prediction.observe(plan(10), 0.1)
    prediction.observe(plan(10), 1000.0)
    assert prediction.largest_seconds < 12.0


def test_the_correction_has_a_bound_and_the_shortest_steps_no_say():
    prediction = StepTimePrediction(StepCosts(lambda shape: shape.token_bucket * 0.01, largest_seconds=8.0))
    for _ in range(100):
        prediction.observe(plan(1), 5.0)
    assert prediction.largest_seconds == 8.0
    for _ in range(100):
        prediction.observe(plan(100), 100.0)
    assert prediction.largest_seconds == 80.0


def test_nothing_is_predicted_where_nothing_is_known():
    prediction = StepTimePrediction(None)
    prediction.observe(plan(8), 5.0)
    assert prediction.largest_seconds == 0.0


@pytest.mark.parametrize("more", [{"max_num_seqs": 16}, {"max_num_batched_tokens": 64}, {"max_model_len": 512}])
def test_a_device_is_predicted_to_take_longer_for_more(more):
    def costs(**options: int) -> StepCosts:
        sizes = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "max_model_len": 128} | options
        config = EngineConfig.from_options(model="models/tiny/checkpoint", attention="xla", **sizes)
        shapes = dataclasses.replace(resolve_shapes(config, "cpu"), num_pages=1024)
        return step_costs(shapes, make_mesh())

    few = costs()
    assert 0 < few.seconds(shape_of(plan(8))) < few.largest_seconds < costs(**more).largest_seconds
