"""The simulated engine: times by hand, stretches against single steps, and the loop of the real engine."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config.scheduling import FORMATIONS, MODES, VICTIMS
from jaxserve.planning.step_cost_models import HostCosts
from jaxserve.scheduler.policies.named import POLICIES
from jaxserve.simulator.fast_forward import stretch_times
from jaxserve.simulator.simulated_engine import SimulatedEngine
from jaxserve.simulator.simulation import ClientRule, SimulationResult, TraceRequests, simulate
from jaxserve.simulator.simulation_report import report
from jaxserve.simulator.traces import Trace, make_trace
from jaxserve.telemetry.batch_metrics import run_metrics
from jaxserve.telemetry.recorder import Recorder, StepRecorded
from jaxserve.telemetry.timings import request_timings
from tests.budgets import budget
from tests.simulator.helpers import SimpleCosts, make_config, make_device


def test_one_request_step_by_step():
    trace = make_trace("one", [0.0], 10, 4)
    result = simulate(make_config(), trace, SimpleCosts(), make_device())
    # The prompt takes the first second; a token comes at the end of each.
    assert result.token_times[0].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert result.ttft.tolist() == [1.0]
    assert result.tpot.tolist() == [1.0]
    assert result.e2e.tolist() == [4.0]
    assert result.reasons == ("stop",)
    # Whether it stops at token 4 is seen when step 5 is dispatched already.
    assert len(result.steps[0]["begin"]) == 5


def test_a_known_length_needs_no_further_step():
    trace = make_trace("one", [0.0], 10, 4)
    result = simulate(make_config(), trace, SimpleCosts(), make_device(), client=ClientRule("exact"))
    assert result.token_times[0].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert result.reasons == ("length",)
    assert len(result.steps[0]["begin"]) == 4


def test_a_request_that_comes_during_a_step_waits_for_the_next_turn():
    trace = make_trace("two", [0.0, 0.5], 10, 8)
    result = simulate(make_config(), trace, SimpleCosts(), make_device())
    # At 0 the steps of the first second and of the one after are dispatched, the latter without the newcomer; when the
    # first ends, at 1, the third is dispatched with it. It ends at 3.
    assert result.scheduled.tolist() == [0.0, 1.0]
    assert result.first_token.tolist() == [1.0, 3.0]


def test_the_host_adds_what_the_device_does_not_hide():
    host = HostCosts(before=0.25, after=0.125)
    trace = make_trace("one", [0.0], 10, 3)
    hidden = simulate(make_config(), trace, SimpleCosts(host=host), make_device())
    assert hidden.token_times[0].tolist() == [1.25, 2.25, 3.25]
    slow = simulate(make_config(), trace, SimpleCosts(step=0.125, host=host), make_device())
    # The first turn dispatches at 0.25, the second at 0.5 and takes in the first; then a turn takes 0.375.
    assert slow.token_times[0].tolist() == [0.5, 0.875, 1.25]


def test_a_step_that_samples_nothing_is_not_waited_for():
    trace = make_trace("long", [0.0], 96, 1)
    result = simulate(make_config(), trace, SimpleCosts(), make_device(), client=ClientRule("exact"))
    assert result.steps[0]["begin"].tolist() == [0.0, 0.0, 0.0]
    assert result.steps[0]["end"].tolist() == [1.0, 2.0, 3.0]
    assert result.ttft.tolist() == [3.0]


def test_a_full_queue_refuses_and_a_deadline_ends():
    config = make_config(max_num_seqs=1, max_num_waiting=1)
    trace = make_trace("three", [0.0, 0.1, 0.2], 10, 6, deadlines=[np.inf, 2.0, np.inf])
    result = simulate(config, trace, SimpleCosts(), make_device())
    assert result.reasons == ("stop", "deadline", "refused")
    assert result.completed.tolist() == [True, False, False]
    assert np.isnan(result.first_token).tolist() == [False, True, True]


def test_requests_that_cannot_be_served_are_counted():
    trace = make_trace("t", [0.0, 1.0, 2.0], [10, 256, 250], [5, 5, 20])
    assert simulate(make_config(), trace, SimpleCosts(), make_device()).num_skipped == 1
    exact = simulate(make_config(), trace, SimpleCosts(), make_device(), client=ClientRule("exact"))
    assert exact.num_skipped == 2


def test_the_scheduler_is_not_told_the_true_length():
    config, device = make_config(), make_device()
    trace = make_trace("t", [0.0, 1.0], 10, [5, 20], max_tokens=[16, 16])
    requests = list(TraceRequests(trace, device, config, ClientRule()))
    assert [(ready.request.max_tokens, ready.output_tokens) for ready in requests] == [(16, 5), (16, 16)]
    context = list(TraceRequests(make_trace("t", [0.0], 10, 5), device, config, ClientRule()))
    assert context[0].request.max_tokens == 246


@given(st.data())
def test_times_of_a_stretch_are_those_of_its_turns(data):
    seconds = data.draw(st.lists(st.floats(1e-4, 1e-2), min_size=1, max_size=40))
    before, after = data.draw(st.floats(0, 1e-2)), data.draw(st.floats(0, 1e-2))
    now = data.draw(st.floats(0, 1e4))
    end = now + data.draw(st.floats(-1e-2, 1e-2))
    begins, starts, ends = stretch_times(now, end, np.array(seconds), before, after)
    for turn, each in enumerate(seconds):
        assert begins[turn] == now
        assert starts[turn] == max(now + before, end)
        end = starts[turn] + each
        assert ends[turn] == end
        now = starts[turn] + after


@st.composite
def cases(draw):
    mode = draw(st.sampled_from(MODES))
    options = {
        "mode": mode,
        "policy": draw(st.sampled_from(list(POLICIES))),
        "formation": "greedy" if mode == "dynamic" else draw(st.sampled_from(FORMATIONS)),
        "max_num_seqs": draw(st.sampled_from([1, 3, 8])),
        "max_num_batched_tokens": draw(st.sampled_from([16, 64])),
        "batch_size": draw(st.sampled_from([2, 4])),
        "max_wait_seconds": draw(st.sampled_from([0.0, 0.03, 0.4])),
        "watermark": draw(st.sampled_from([0.0, 0.2])),
        "page_reservation": draw(st.sampled_from(["none", "none", "max_tokens"])),
        "scheduler_delay_factor": draw(st.sampled_from([0.0, 0.5])),
        "preemption_mode": draw(st.sampled_from(["recompute", "swap", "auto"])),
        "victim": draw(st.sampled_from(VICTIMS)),
        "preempt_length_ratio": draw(st.sampled_from([None, 4.0])),
        "load_profile": draw(st.booleans()),
        "adaptive_batch_size": draw(st.booleans()),
    }
    count = draw(st.integers(1, 14))
    gaps = draw(st.lists(st.sampled_from([0.0, 0.01, 0.1, 1.0]), min_size=count, max_size=count))
    lengths = st.lists(st.integers(1, 60), min_size=count, max_size=count)
    trace = make_trace(
        "drawn",
        np.cumsum(gaps),
        draw(lengths),
        draw(lengths),
        max_tokens=draw(st.sampled_from([0, 60])),
        tenants=draw(st.lists(st.sampled_from(["a", "b"]), min_size=count, max_size=count)),
        priorities=draw(st.lists(st.integers(0, 9), min_size=count, max_size=count)),
        deadlines=draw(st.lists(st.sampled_from([np.inf, np.inf, 0.3]), min_size=count, max_size=count)),
    )
    host = draw(
        st.sampled_from([HostCosts(0, 0, 0, 0), HostCosts(1e-3, 1e-5, 1e-3, 1e-5), HostCosts(0.02, 0, 0.01, 0)])
    )
    costs = SimpleCosts(step=0.01, token=1e-4, position=1e-6, host=host)
    device = make_device(draw(st.sampled_from([12, 40])), draw(st.sampled_from([0, 10])))
    return make_config(**options), trace, costs, device


@budget(60)
@given(cases())
def test_stretches_change_nothing(case):
    config, trace, costs, device = case
    whole, single = Recorder(capacity=10**6), Recorder(capacity=10**6)
    taken = simulate(config, trace, costs, device, recorder=whole)
    stepped = simulate(config, trace, costs, device, recorder=single, stretches=False)
    assert_equal(taken, stepped)
    assert [_comparable(event) for event in whole] == [_comparable(event) for event in single]
    ended = sum(reason in ("stop", "length") for reason in taken.reasons)
    assert ended == sum(taken.completed)
    assert all(taken.reasons), "a request never ended"


def test_long_decodes_are_taken_in_few_stretches():
    """Otherwise the test above would prove nothing."""
    config, trace = make_config(), make_trace("t", [0.0, 0.0], 10, [200, 180])
    taken: list[int] = []

    class Counting(SimulatedEngine):
        def _carry_out(self, previous, shape, begins, starts, ends):
            taken.append(len(begins))
            super()._carry_out(previous, shape, begins, starts, ends)

    engine = Counting(config, make_device(), SimpleCosts(position=1e-5))
    for ready in TraceRequests(trace, make_device(), config, ClientRule()):
        engine.submit(*ready)
    engine.run_until()
    assert sum(taken) > 190
    assert len(taken) <= 3


def test_recorded_events_say_what_the_result_says():
    trace = make_trace("t", np.arange(12) * 0.7, 20, np.arange(12) * 5 + 1)
    recorder = Recorder(capacity=10**6)
    result = simulate(make_config(), trace, SimpleCosts(step=0.1), make_device(), recorder=recorder)
    timings = {int(each.request_id): each for each in request_timings(recorder)}
    for index, times in enumerate(result.token_times):
        assert list(timings[index].token_times) == times.tolist()
        assert timings[index].ttft == pytest.approx(result.ttft[index])
        assert timings[index].e2e == pytest.approx(result.e2e[index])
        assert timings[index].queue_time == pytest.approx(result.queue_time[index])
    steps = [event for event in recorder if isinstance(event, StepRecorded)]
    for name in ("prefill_tokens", "decode_tokens", "rows", "token_bucket", "pages_used", "waiting", "running"):
        assert [getattr(step, name) for step in steps] == result.steps[0][name].tolist()


def test_the_device_is_not_used_while_there_are_no_requests():
    """By the events and by the result: of 16 s the device computed 4 tokens of one request and 4 of another."""
    recorder = Recorder(capacity=10**6)
    trace = make_trace("two", [0.0, 12.0], 10, 4)
    result = simulate(make_config(), trace, SimpleCosts(), make_device(), client=ClientRule("exact"), recorder=recorder)
    steps = run_metrics(recorder).steps
    assert steps is not None
    assert steps.device_utilization == pytest.approx(8 / 16)
    assert report(result).device_utilization == pytest.approx(8 / 16)
    unused = [event.unused_seconds for event in recorder if isinstance(event, StepRecorded)]
    assert unused == [0.0] * 4 + [8.0] + [0.0] * 3


def _comparable(event):
    return (
        dataclasses.replace(event, idle_seconds=0.0, update_seconds=0.0, schedule_seconds=0.0)
        if isinstance(event, StepRecorded)
        else event
    )


def assert_equal(taken: SimulationResult, stepped: SimulationResult) -> None:
    for mine, other in zip(taken.token_times, stepped.token_times, strict=True):
        assert mine.tolist() == other.tolist()
    assert taken.reasons == stepped.reasons
    for name in ("scheduled", "first_token", "finished", "output_tokens", "preemptions"):
        np.testing.assert_array_equal(getattr(taken, name), getattr(stepped, name))
    for name, column in taken.steps[0].items():
        np.testing.assert_array_equal(column, stepped.steps[0][name], err_msg=name)


def test_a_trace_without_requests():
    empty = make_trace("none", [], [], [])
    result = simulate(make_config(), empty, SimpleCosts(), make_device())
    assert isinstance(result.trace, Trace)
    assert result.seconds == 0.0
