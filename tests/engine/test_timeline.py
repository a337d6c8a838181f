"""Timelines: what an engine hands over while a capture is on, and what a viewer gets of it."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from jaxserve.engine.core import EngineCore
from jaxserve.engine.messages import (
    AddRequest,
    CaptureProfile,
    CaptureTimeline,
    EngineFailed,
    EngineStats,
    FromEngine,
    ProfileCaptured,
    TimelineEvents,
    decode,
    encode,
)
from jaxserve.frontend.captures import CapturedTimeline, CaptureError, Captures
from jaxserve.frontend.delta import EngineDeadError
from jaxserve.request import EngineRequest
from jaxserve.telemetry.chrome_trace import DEVICE, HOST, REQUESTS, STEPS, chrome_trace
from jaxserve.telemetry.recorder import Recorder, RequestPreempted, TokensProduced, event_of_row
from jaxserve.telemetry.timeline_capture import TimelineCapture
from jaxserve.telemetry.timings import request_timings
from tests.engine.test_core import make_core
from tests.trace_format import check_trace


def request(name: str, prompt_tokens: int, max_tokens: int) -> EngineRequest:
    return EngineRequest(name, tuple(range(1, prompt_tokens + 1)), max_tokens=max_tokens)


def captured(messages: list[FromEngine]) -> list:
    """The events of messages that have been on the wire."""
    found = [decode(encode(message)) for message in messages if isinstance(message, TimelineEvents)]
    return [event_of_row(row) for message in found for row in message.rows]


def finish(core: EngineCore) -> list[FromEngine]:
    messages: list[FromEngine] = []
    while core.busy:
        messages += core.step()
    return messages


@pytest.fixture(scope="module")
def capture() -> tuple[EngineCore, list]:
    """One request before the capture, one that is running when it begins, three within it, one after it."""
    ticks = itertools.count()
    core = make_core(num_pages=30, clock=lambda: next(ticks) * 1e-4)
    core.handle(AddRequest(request("before", 5, 3)))
    finish(core)
    core.handle(AddRequest(request("running", 5, 30)))
    for _ in range(4):
        core.step()
    messages = core.handle(CaptureTimeline(True))
    for number in range(3):
        core.handle(AddRequest(request(f"new {number}", 20, 40)))
    messages += finish(core)
    messages += core.handle(CaptureTimeline(False))
    assert [message.last for message in messages if isinstance(message, TimelineEvents)][-1]
    core.handle(AddRequest(request("after", 5, 3)))
    assert not captured(finish(core))
    return core, captured(messages)


def test_events_are_those_of_the_capture(capture):
    core, events = capture
    recorded = list(core.recorder)
    start = recorded.index(events[0])
    assert recorded[start : start + len(events)] == events
    assert any(isinstance(event, RequestPreempted) for event in events), "the pool was to be too small"


def test_a_viewer_can_open_it(capture):
    check_trace(chrome_trace(capture[1], model="m"))
    check_trace(chrome_trace(()))


def test_steps_are_slices_with_their_tokens_and_buckets(capture):
    core, events = capture
    steps = [event for event in core.recorder if event in events and hasattr(event, "token_bucket")]
    shown = chrome_trace(events)["traceEvents"]
    for thread in (HOST, DEVICE):
        found = [one for one in shown if one["ph"] == "X" and one["tid"] == thread and one["name"].startswith("step ")]
        assert [one["args"]["token_bucket"] for one in found] == [step.token_bucket for step in steps]
        tokens = [one["args"]["prefill_tokens"] + one["args"]["decode_tokens"] for one in found]
        assert tokens == [step.prefill_tokens + step.decode_tokens for step in steps]
    host = [one for one in shown if one["ph"] == "X" and one["tid"] == HOST]
    parts = {name: sum(one["dur"] for one in host if one["name"] == name) / 1e6 for name in ("schedule", "collect")}
    assert parts["schedule"] == pytest.approx(sum(step.schedule_seconds for step in steps))
    assert parts["collect"] == pytest.approx(sum(step.collect_seconds for step in steps))
    for name in ("pack", "dispatch", "update"):
        assert sum(one["name"] == name for one in host) == len(steps)
    assert {one["pid"] for one in shown if one["ph"] == "C"} == {STEPS}


def test_the_device_computes_one_step_at_a_time_and_rests_while_it_is_idle(capture):
    _, events = capture
    shown = chrome_trace(events)["traceEvents"]
    slices = [one for one in shown if one["ph"] == "X" and one["tid"] == DEVICE]
    steps = [event for event in events if hasattr(event, "token_bucket")]
    for (before, after), step in zip(itertools.pairwise(slices), steps[1:], strict=True):
        gap = after["ts"] - before["ts"] - before["dur"]
        assert gap >= -0.002
        assert gap <= 1e6 * (step.idle_seconds + step.unused_seconds) + 0.01


def test_requests_are_tracks_as_long_as_they_took(capture):
    _, events = capture
    shown = [one for one in chrome_trace(events)["traceEvents"] if one["pid"] == REQUESTS and one["ph"] in "be"]
    spans: dict[str, dict[str, float]] = {}
    names = {
        one["id2"]["local"]: one["args"]["request_id"]
        for one in shown
        if one["name"].startswith("request ") and one["ph"] == "b"
    }
    for one in shown:
        phase = one["name"].split()[0]
        sign = -1 if one["ph"] == "b" else 1
        track = spans.setdefault(names[one["id2"]["local"]], {})
        track[phase] = track.get(phase, 0.0) + sign * one["ts"] / 1e6
    assert set(spans) == {"running", "new 0", "new 1", "new 2"}
    assert set(spans["running"]) == {"request", "decode"}  # nothing is known of what was before
    for timing in request_timings(events):
        track = spans[timing.request_id]
        assert track["request"] == pytest.approx(timing.e2e)
        assert track["queue"] == pytest.approx(timing.queue_time)
        assert track["prefill"] == pytest.approx(timing.prefill_time)
        assert track["decode"] == pytest.approx(timing.decode_time)


def test_a_request_in_prefill_when_the_capture_begins():
    core = make_core()
    core.handle(AddRequest(request("long", 60, 3)))
    core.step()
    messages = core.handle(CaptureTimeline(True)) + finish(core) + core.handle(CaptureTimeline(False))
    trace = chrome_trace(captured(messages))
    check_trace(trace)
    phases = [one["name"] for one in trace["traceEvents"] if one["ph"] == "b"]
    assert phases == ["request long", "prefill", "decode"]


def test_a_capture_is_bounded():
    recorder = Recorder()
    capture = TimelineCapture(recorder, max_entries=5)
    capture.start()
    for number in range(4):
        recorder.record(TokensProduced(float(number), ("a", "b")))
    rows, dropped = capture.take()
    assert (len(rows), dropped) == (2, 2)
    capture.stop()
    recorder.record(TokensProduced(9.0, ("a",)))
    assert capture.take() == ((), 0)
    capture.start()
    recorder.record(TokensProduced(10.0, ("a",)))
    assert len(capture.take().rows) == 1


@pytest.mark.parametrize("row", [[], ["Nothing", 1.0], ["FirstToken"], ["FirstToken", 1.0, "a", "b"]], ids=str)
def test_a_row_that_is_no_event_is_refused(row):
    with pytest.raises(ValueError, match="an event is "):
        event_of_row(row)


def test_an_engine_without_a_process_of_its_own_says_so():
    (answer,) = make_core().handle(CaptureProfile("somewhere", 1.0))
    assert isinstance(answer, ProfileCaptured)
    assert "engine_process" in answer.error


def test_one_capture_at_a_time_and_none_of_a_dead_engine():
    async def body() -> None:
        sent: list = []
        captures = Captures(sent.append)
        first = asyncio.ensure_future(captures.timeline(0.01))
        await asyncio.sleep(0)
        for other in (captures.timeline(0.01), captures.profile("d", 0.01)):
            with pytest.raises(CaptureError, match="a timeline is being captured"):
                await other
        while len(sent) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        captures.handle(EngineStats())
        captures.handle(TimelineEvents((("FirstToken", 1.0, "a"),), last=False, dropped=2))
        captures.handle(TimelineEvents((("FirstToken", 2.0, "b"),), last=True, dropped=1))
        found: CapturedTimeline = await first
        assert ([event.time for event in found.events], found.dropped) == ([1.0, 2.0], 3)
        assert sent == [CaptureTimeline(True), CaptureTimeline(False)]
        left = asyncio.ensure_future(captures.timeline(60.0))
        await asyncio.sleep(0)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        assert sent[2:] == [CaptureTimeline(True), CaptureTimeline(False)]
        failing = asyncio.ensure_future(captures.profile("d", 0.001))
        await asyncio.sleep(0)
        captures.handle(ProfileCaptured("another"))  # of one that was given up
        captures.handle(ProfileCaptured("d", "no room"))
        with pytest.raises(CaptureError, match="no room"):
            await failing
        dying = asyncio.ensure_future(captures.profile("d", 60.0))
        await asyncio.sleep(0)
        captures.handle(EngineFailed("gone"))
        for capture in (dying, captures.timeline(1.0)):
            with pytest.raises(EngineDeadError, match="gone"):
                await capture

    asyncio.run(body())
