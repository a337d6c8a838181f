"""The event recorder: what it keeps, what it hands on, and that nothing is lost unsaid."""

import dataclasses
import json

import pytest

from jaxserve.telemetry.recorder import (
    FirstToken,
    Origin,
    Recorder,
    RequestArrived,
    RequestFinished,
    RequestPreempted,
    RequestScheduled,
    StepRecorded,
    TokensProduced,
    read_jsonl,
)

STEP = StepRecorded(
    time=1.0,
    step=0,
    prefill_tokens=5,
    decode_tokens=2,
    rows=3,
    token_bucket=8,
    row_bucket=8,
    padding=1,
    pages_used=4,
    pages_free=10,
    pages_cached=1,
    waiting=2,
    running=3,
    schedule_seconds=0.001,
    dispatch_seconds=0.002,
    collect_seconds=0.01,
    update_seconds=0.0005,
    idle_seconds=0.0001,
)
ONE_OF_EACH = (
    RequestArrived(0.5, "line\nbreak", prompt_tokens=5, max_tokens=3, tenant="zürich", priority=-1),
    RequestScheduled(1.0, "line\nbreak"),
    STEP,
    FirstToken(1.1, "line\nbreak"),
    TokensProduced(1.1, ("line\nbreak", "other")),
    RequestPreempted(1.2, "line\nbreak", "swap"),
    RequestFinished(1.5, "line\nbreak", "length", prompt_tokens=5, output_tokens=3, preemptions=1),
)


def recorder_at(clock, wall_clock, capacity=10):
    return Recorder(capacity, clock=lambda: clock, wall_clock=lambda: wall_clock)


def test_events_come_out_in_order():
    recorder = Recorder()
    for event in ONE_OF_EACH:
        recorder.record(event)
    assert tuple(recorder) == ONE_OF_EACH
    assert (recorder.num_recorded, recorder.dropped, recorder.capacity) == (7, 0, 100_000)


def test_a_full_buffer_drops_the_oldest_and_counts_them():
    recorder = Recorder(capacity=3)
    for number in range(3):
        recorder.record(FirstToken(float(number), "r"))
    assert recorder.dropped == 0
    recorder.record(FirstToken(3.0, "r"))
    recorder.record(FirstToken(4.0, "r"))
    assert [event.time for event in recorder] == [2.0, 3.0, 4.0]
    assert (recorder.num_recorded, recorder.dropped) == (5, 2)


def test_listeners_see_every_event_in_order_of_subscription():
    recorder, seen = Recorder(capacity=1), []
    recorder.subscribe(lambda event: seen.append(("first", event)))
    stop = recorder.subscribe(lambda event: seen.append(("second", event)))
    recorder.record(STEP)
    stop()
    stop()
    recorder.record(ONE_OF_EACH[1])
    assert seen == [("first", STEP), ("second", STEP), ("first", ONE_OF_EACH[1])]
    assert recorder.dropped == 1


def test_a_listener_subscribes_once():
    recorder, seen = Recorder(), []
    stop = recorder.subscribe(seen.append)
    with pytest.raises(ValueError, match="is subscribed already"):
        recorder.subscribe(seen.append)
    stop()
    recorder.subscribe(seen.append)
    recorder.record(STEP)
    assert seen == [STEP]


def test_a_listener_may_end_its_subscription_while_called():
    recorder, seen = Recorder(), []

    def once(event):
        seen.append(event)
        stop()

    stop = recorder.subscribe(once)
    recorder.record(STEP)
    recorder.record(STEP)
    assert seen == [STEP]


def test_what_a_listener_raises_is_not_swallowed():
    recorder = Recorder()

    def fail(event):
        raise RuntimeError("no space left")

    recorder.subscribe(fail)
    with pytest.raises(RuntimeError, match="no space left"):
        recorder.record(STEP)
    assert tuple(recorder) == (STEP,)


def test_recording_goes_on_while_events_are_read():
    recorder = Recorder()
    recorder.record(STEP)
    for event in recorder:
        recorder.record(event)
    assert recorder.num_recorded == 2


def test_an_empty_recorder_is_not_false():
    recorder = Recorder()
    assert (recorder or Recorder()) is recorder


@pytest.mark.parametrize("event", ONE_OF_EACH)
def test_events_are_frozen(event):
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.time = 0.0


def test_capacity_is_checked():
    with pytest.raises(ValueError, match="capacity is 0; it must be at least 1"):
        Recorder(capacity=0)


def test_jsonl_brings_every_event_back(tmp_path):
    recorder = recorder_at(clock=2.5, wall_clock=1000.0)
    for event in ONE_OF_EACH:
        recorder.record(event)
    recorder.to_jsonl(tmp_path / "events.jsonl")
    recording = read_jsonl(tmp_path / "events.jsonl")
    assert recording.events == ONE_OF_EACH
    assert recording.origin == Origin(clock_time=2.5, unix_time=1000.0)
    assert recording.dropped == 0


def test_jsonl_lines_say_what_they_are_and_what_is_missing(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text("what was here before")
    recorder = recorder_at(clock=2.5, wall_clock=1000.0, capacity=1)
    recorder.record(STEP)
    recorder.record(RequestScheduled(1.0, "r"))
    recorder.to_jsonl(path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"event": "Recording", "clock_time": 2.5, "unix_time": 1000.0, "dropped": 1},
        {"event": "RequestScheduled", "time": 1.0, "request_id": "r"},
    ]


HEADER = '{"event": "Recording", "clock_time": 0.0, "unix_time": 0.0, "dropped": 0}\n'


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", 1),
        ('{"event": "FirstToken", "time": 1.0, "request_id": "r"}\n', 1),
        ('{"event": "Recording", "clock_time": 0.0}\n', 1),
        (HEADER + "[1]\n", 2),
        (HEADER + '{"event": "Unknown"}\n', 2),
        (HEADER + '{"event": "FirstToken", "time": 1.0}\n', 2),
        (HEADER + '{"event": "FirstToken", "time": 1.0, "request_id": "r"}\n{"event": "FirstTok', 3),
    ],
)
def test_a_file_that_is_no_recording_is_refused_by_line(tmp_path, text, line):
    path = tmp_path / "events.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"events\.jsonl line {line} is not an event of a recording"):
        read_jsonl(path)
