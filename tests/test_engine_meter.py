"""What is counted of steps and requests, against sums and buckets worked out one value at a time."""

from __future__ import annotations

import bisect
import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.engine.idle import IdleMeter
from jaxserve.request import FinishReason
from jaxserve.telemetry.engine_meter import STEP_HISTOGRAMS, EngineMeter
from jaxserve.telemetry.histograms import Histogram, decades, no_counts, powers_of_two
from jaxserve.telemetry.recorder import Recorder, RequestArrived, RequestFinished, RequestScheduled
from jaxserve.telemetry.request_meter import RequestMeter, RequestRecord
from tests.test_recorder import STEP


def test_bounds():
    assert decades(-1, 1) == (0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0)
    assert powers_of_two(3) == (0.0, 1.0, 2.0, 4.0, 8.0)
    for bounds in STEP_HISTOGRAMS.values():
        assert list(bounds) == sorted(set(bounds))
        assert len(bounds) < 40


@given(st.lists(st.sampled_from([0.0, 0.05, 0.1, 0.2, 1.0, 7.0, 10.0, 11.0]), max_size=20))
def test_a_histogram_counts_each_value_once_whichever_way_it_comes(values):
    bounds = decades(-1, 1)
    one_by_one, together = Histogram(bounds), Histogram(bounds)
    for value in values:
        one_by_one.observe(value)
    together.observe_all(np.array(values, np.float64))
    expected = [0] * (len(bounds) + 1)
    for value in values:
        expected[next((place for place, bound in enumerate(bounds) if value <= bound), len(bounds))] += 1
    for histogram in (one_by_one, together):
        assert histogram.read().counts == tuple(expected)
        assert histogram.read().total == pytest.approx(sum(values))
    assert one_by_one.read().num_values == len(values)
    if not values:
        assert one_by_one.read() == no_counts(bounds)


def test_steps_are_counted_by_what_they_took_and_computed():
    recorder, meter = Recorder(), EngineMeter()
    recorder.subscribe(meter)
    steps = [dataclasses.replace(STEP, prefill_tokens=number, idle_seconds=number * 1e-5) for number in range(5000)]
    for step in steps:
        recorder.record(step)
    masked = [0.0002, 0.003, 0.003]
    for seconds in masked:
        meter.masked(seconds)
    found = meter.step_histograms()
    values = {
        "step_time_seconds": [step.seconds for step in steps],
        "step_host_overhead_seconds": [step.seconds - step.collect_seconds for step in steps],
        "step_gap_seconds": [step.idle_seconds for step in steps],
        "iteration_tokens": [step.prefill_tokens + step.decode_tokens for step in steps],
        "prefill_tokens": [step.prefill_tokens for step in steps],
        "decode_tokens": [step.decode_tokens for step in steps],
        "mask_seconds": masked,
    }
    assert found.keys() == values.keys() == STEP_HISTOGRAMS.keys()
    for name, bounds in STEP_HISTOGRAMS.items():
        counts = [0] * (len(bounds) + 1)
        for value in values[name]:
            counts[bisect.bisect_left(bounds, value)] += 1
        assert found[name].counts == tuple(counts), name
        assert found[name].total == pytest.approx(sum(values[name])), name
    assert meter.step_histograms() == found  # and not a second time


def test_phases_of_a_request_and_nothing_is_kept_of_one_that_ended():
    meter = EngineMeter()
    for name in ("a", "b"):
        meter(RequestArrived(1.0, name, prompt_tokens=5, max_tokens=3, tenant="", priority=0))
    meter(RequestScheduled(1.5, "a"))
    assert meter.phases("a", 3.0) == (0.5, 1.5)
    for name in ("a", "b"):
        meter(RequestFinished(4.0, name, "stop", prompt_tokens=5, output_tokens=3, preemptions=0))
    assert not meter._arrived
    assert not meter._scheduled


def test_busy_seconds_are_those_between_dispatch_and_end_less_the_gaps():
    meter = IdleMeter()
    assert meter.busy_seconds(5.0) == 0.0
    meter.dispatched(10.0)
    assert meter.busy_seconds(12.0) == 2.0
    meter.dispatched(13.0, 0.5)  # half a second of the three it had nothing to do
    assert meter.busy_seconds(14.0) == 3.5
    meter.emptied(15.0)
    assert meter.busy_seconds(100.0) == 4.5
    meter.dispatched(20.0, meter.unused(20.0))
    assert meter.busy_seconds(21.0) == 5.5


def test_a_request_is_measured_by_both_clocks():
    """The front end's from arrival, the engine's between tokens."""
    now, ended = [100.0], []
    metrics = RequestMeter(clock=lambda: now[0], wall_clock=lambda: 1e9)
    metrics.on_finished = ended.append
    life = metrics.begin("r", prompt_tokens=7, max_tokens=9, arrived=99.0, trace=None)
    life.tokens(0, 4.0)
    now[0] = 102.0
    life.phases(0.25, 0.5)
    life.tokens(1, 5.0)
    life.tokens(2, 5.5)
    life.charged(2)
    life.tokens(1, 7.0)
    now[0] = 110.0
    life.finish(FinishReason.LENGTH, 4, cached_tokens=3)
    totals = {name: (counts.num_values, counts.total) for name, counts in metrics.histograms().items()}
    assert totals == {
        "time_to_first_token_seconds": (1, 3.0),
        "inter_token_latency_seconds": (3, 2.0),
        "request_time_per_output_token_seconds": (1, pytest.approx(2 / 3)),
        "e2e_request_latency_seconds": (1, 11.0),
        "request_queue_time_seconds": (1, 0.25),
        "request_prefill_time_seconds": (1, 0.5),
        "request_decode_time_seconds": (1, 2.0),
        "request_prompt_tokens": (1, 7.0),
        "request_generation_tokens": (1, 4.0),
    }
    assert (metrics.prompt_tokens, metrics.generation_tokens, metrics.finished["length"]) == (7, 4, 1)
    assert ended == [RequestRecord("r", "length", "", 7, 4, 3, 9, 1e9, 11.0, 3.0, 0.25, 0.5, 2.0)]
