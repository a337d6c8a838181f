"""Figures of a run, calculated by hand from a short history."""

import dataclasses
import json

import numpy as np
import pytest

from jaxserve.telemetry.batch_metrics import Spread, run_metrics, table
from jaxserve.telemetry.recorder import (
    Event,
    FirstToken,
    RequestArrived,
    RequestFinished,
    RequestPreempted,
    RequestScheduled,
    StepRecorded,
    TokensProduced,
)

STEP = StepRecorded(
    time=0.0,
    step=0,
    prefill_tokens=0,
    decode_tokens=0,
    rows=0,
    token_bucket=8,
    row_bucket=8,
    padding=0,
    pages_used=0,
    pages_free=10,
    pages_cached=0,
    waiting=0,
    running=0,
    schedule_seconds=0.125,
    dispatch_seconds=0.125,
    collect_seconds=0.5,
    update_seconds=0.25,
    idle_seconds=0.0,
)


def step(time: float, prefill: int, decode: int, rows: int, **fields) -> StepRecorded:
    padding = 8 - prefill - decode
    return dataclasses.replace(
        STEP, time=time, prefill_tokens=prefill, decode_tokens=decode, rows=rows, padding=padding, **fields
    )


# Two requests of 6 and 4 prompt tokens; "b" loses its pages once and ends by a stop id after two tokens.
HISTORY: tuple[Event, ...] = (
    RequestArrived(0.0, "a", prompt_tokens=6, max_tokens=3, tenant="t", priority=0),
    RequestArrived(0.5, "b", prompt_tokens=4, max_tokens=9, tenant="t", priority=0),
    RequestScheduled(1.0, "a"),
    step(1.0, prefill=6, decode=0, rows=1, pages_used=2, pages_free=8, waiting=1, running=1),
    RequestScheduled(2.0, "b"),
    FirstToken(2.0, "a"),
    TokensProduced(2.0, ("a",)),
    step(2.0, prefill=4, decode=1, rows=2, pages_used=4, pages_free=6, running=2),
    FirstToken(3.0, "b"),
    TokensProduced(3.0, ("a", "b")),
    RequestPreempted(3.0, "b", kind="swap"),
    step(3.0, prefill=0, decode=1, rows=1, pages_used=1, pages_free=9, running=1, swapped=1, idle_seconds=0.5),
    TokensProduced(4.0, ("a",)),
    RequestFinished(4.0, "a", "length", 6, 3, preemptions=0),
    step(4.0, prefill=0, decode=1, rows=1, pages_used=1, pages_free=8, pages_cached=1, running=1),
    TokensProduced(8.0, ("b",)),
    RequestFinished(8.0, "b", "stop", 4, 2, preemptions=1),
)


def test_figures_of_requests():
    run = run_metrics(HISTORY)
    requests = run.requests
    assert run.seconds == 8.0
    assert (run.requests_per_second, run.output_tokens_per_second, run.total_tokens_per_second) == (
        2 / 8,
        5 / 8,
        15 / 8,
    )
    assert requests.finished == {"length": 1, "stop": 1}
    assert (requests.prompt_tokens, requests.output_tokens) == (10, 5)
    means = {name: getattr(requests, name).mean for name in ("queue_time", "ttft", "tpot", "itl", "e2e")}
    assert means == {"queue_time": 1.25, "ttft": 2.25, "tpot": 3.0, "itl": pytest.approx(7 / 3), "e2e": 5.75}
    assert requests.itl is not None
    assert requests.itl.count == 3  # of every token after a first one, not of every request


def test_figures_of_steps():
    steps = run_metrics(HISTORY).steps
    assert steps is not None
    assert (steps.steps, steps.prefill_tokens, steps.decode_tokens) == (4, 10, 3)
    assert steps.utilization == 13 / 32
    # The first is dispatched at 1.25 and the last token comes at 8; half a second was without work.
    assert steps.device_utilization == (8.0 - 1.25 - 0.5) / 8.0
    assert steps.preemptions == {"recompute": 0, "swap": 1}
    means = {
        name: getattr(steps, name).mean
        for name in ("sequences", "tokens", "padding", "prefill_share", "waiting", "running", "swapped", "page_use")
    }
    assert means == {
        "sequences": 1.25,
        "tokens": 3.25,
        "padding": 4.75,
        "prefill_share": (1 + 0.8) / 4,
        "waiting": 0.25,
        "running": 1.25,
        "swapped": 0.25,
        "page_use": 0.2,
    }
    assert steps.gap_seconds.mean == 0.125


def test_time_without_requests_is_no_use_of_the_device():
    """A request at 0 and one at 100, of which a step of a token takes a second."""
    events: list[Event] = []
    for begin, unused in ((0.0, 0.0), (100.0, 99.0)):
        name = f"at {begin}"
        events += [
            RequestArrived(begin, name, prompt_tokens=2, max_tokens=1, tenant="", priority=0),
            step(begin, prefill=2, decode=0, rows=1, collect_seconds=0.0, update_seconds=0.0, unused_seconds=unused),
            TokensProduced(begin + 1.25, (name,)),
            RequestFinished(begin + 1.25, name, "length", 2, 1, preemptions=0),
        ]
    steps = run_metrics(events).steps
    assert steps is not None
    assert steps.device_utilization == pytest.approx(2 / 101.25)  # from 0.25 to 1.25, from 100.25 to 101.25


def test_an_aborted_request_is_no_throughput():
    ended = RequestFinished(8.0, "c", "abort", 5, 0, preemptions=0)
    events = (*HISTORY, RequestArrived(5.0, "c", prompt_tokens=5, max_tokens=3, tenant="t", priority=0), ended)
    run = run_metrics(events)
    assert run.requests_per_second == 2 / 8
    assert run.requests.finished == {"abort": 1, "length": 1, "stop": 1}


def test_nothing_recorded_has_no_figures():
    run = run_metrics(())
    assert run.steps is None
    assert run.requests.ttft is None
    assert (run.seconds, run.requests_per_second) == (0.0, 0.0)
    assert len(table(run)) == 2


def test_spread():
    assert Spread.of([]) is None
    spread = Spread.of(np.arange(101.0))
    assert spread == Spread(count=101, mean=50.0, p50=50.0, p90=90.0, p99=99.0)


def test_figures_are_plain_values_and_a_table():
    run = run_metrics(HISTORY)
    assert json.loads(json.dumps(run.to_dict()))["steps"]["page_use"]["mean"] == 0.2
    lines = table(run)
    assert any(
        line.startswith("TTFT, ms") and line.split()[2:] == ["2250.00", "2250.00", "2450.00", "2495.00"]
        for line in lines
    )
    assert any("batch utilization 40.6 %" in line and "1 by swap" in line for line in lines)
