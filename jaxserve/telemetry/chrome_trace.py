"""Formats events of an engine as a timeline in Chrome's trace-event format, which Perfetto and chrome://tracing open.

    process "steps"     a thread "host" with the parts of each step, a thread "device" with what it computes, and
                        counters of tokens, requests and pages
    process "requests"  a track for each request, from arrival to end, with its queue time, prefill and decode

Format: "Trace Event Format", the Chromium project. Times are microseconds since the first event.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

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

STEPS, REQUESTS = 1, 2
"""Process ids."""
HOST, DEVICE = 1, 2
"""Thread ids of the process STEPS."""


def chrome_trace(events: Sequence[Event], *, dropped: int = 0, model: str = "") -> dict[str, Any]:
    """Returns the timeline as plain values, for JSON.

    A request that was already there before the first event begins with it. dropped: events that are missing at the end.
    model: its name.
    """
    origin = min((event.time for event in events), default=0.0)
    found = [
        _name("process_name", STEPS, 0, "steps"),
        _name("thread_name", STEPS, HOST, "host"),
        _name("thread_name", STEPS, DEVICE, "device"),
        _name("process_name", REQUESTS, 0, "requests"),
        *(
            {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}}
            for pid in (STEPS, REQUESTS)
        ),
    ]
    steps = [event for event in events if type(event) is StepRecorded]
    for step in steps:
        found.extend(_host(step, origin))
        found.extend(_counters(step, origin))
    found.extend(_device(steps, events, origin))
    found.extend(_requests(events, origin))
    return {
        "traceEvents": found,
        "displayTimeUnit": "ms",
        "otherData": {"model": model, "steps": len(steps), "events_dropped": dropped},
    }


def _name(kind: str, process: int, thread: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _slice(thread: int, name: str, begin: float, end: float, args: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns a slice of the process STEPS. begin, end: seconds since the first event."""
    return {
        "ph": "X", "name": name, "cat": "step", "pid": STEPS, "tid": thread,
        "ts": _microseconds(begin), "dur": _microseconds(max(0.0, end - begin)), "args": args or {},
    }  # fmt: skip


def _microseconds(seconds: float) -> float:
    return round(1e6 * seconds, 3)


def _details(step: StepRecorded) -> dict[str, Any]:
    return {
        "step": step.step,
        "prefill_tokens": step.prefill_tokens,
        "decode_tokens": step.decode_tokens,
        "rows": step.rows,
        "token_bucket": step.token_bucket,
        "row_bucket": step.row_bucket,
        "padding": step.padding,
    }


def _host(step: StepRecorded, origin: float) -> Iterator[dict[str, Any]]:
    begin = step.time - origin
    yield _slice(HOST, f"step {step.step}", begin, begin + step.seconds, _details(step))
    pack = min(step.pack_seconds, step.dispatch_seconds)
    for name, seconds in (
        ("schedule", step.schedule_seconds),
        ("pack", pack),
        ("dispatch", step.dispatch_seconds - pack),
        ("collect", step.collect_seconds),
        ("update", step.update_seconds),
    ):
        yield _slice(HOST, name, begin, begin + seconds)
        begin += seconds


def _counters(step: StepRecorded, origin: float) -> Iterator[dict[str, Any]]:
    for name, values in (
        ("tokens", {"prefill": step.prefill_tokens, "decode": step.decode_tokens, "padding": step.padding}),
        ("requests", {"running": step.running, "waiting": step.waiting, "swapped": step.swapped}),
        ("pages", {"used": step.pages_used, "cached": step.pages_cached, "free": step.pages_free}),
    ):
        timestamp = _microseconds(step.time - origin)
        yield {"ph": "C", "name": name, "pid": STEPS, "tid": 0, "ts": timestamp, "args": values}


def _device(steps: Sequence[StepRecorded], events: Sequence[Event], origin: float) -> Iterator[dict[str, Any]]:
    """Yields what the device computed. A step begins when it is dispatched and the one before has ended, and ends when
    its ids are there or, at the latest, where the next one found the device idle.
    """
    ended = 0.0
    last_token = max((event.time for event in events if type(event) is TokensProduced), default=origin) - origin
    for step, after in itertools.zip_longest(steps, steps[1:]):
        begin = max(ended, step.time - origin + step.schedule_seconds + step.dispatch_seconds)
        if after is None or after.step != step.step + 1 or after.unused_seconds > 0:
            # The ids came in an iteration without a step of its own, which is not recorded.
            limit = last_token if after is None else after.time - origin - after.unused_seconds
            limit = limit if after is None else limit + after.schedule_seconds + after.dispatch_seconds
        else:
            dispatched = after.time - origin + after.schedule_seconds + after.dispatch_seconds
            collected = dispatched + after.collect_seconds
            limit = dispatched - after.idle_seconds if after.idle_seconds > 0 else collected
        ended = max(begin, limit)
        yield _slice(DEVICE, f"step {step.step}", begin, ended, _details(step))


class _Track:
    """Tracks one request: which slices are open."""

    def __init__(self, number: int, request_id: str, begin: float, args: dict[str, Any]):
        self._id = f"0x{number:x}"
        self._request_id = request_id
        self._phase = ""
        self.found: list[dict[str, Any]] = []
        self._add("b", f"request {request_id}", begin, {"request_id": request_id, **args})

    def enter(self, phase: str, time: float) -> None:
        """Ends the phase under way, and begins another; "" begins none."""
        if self._phase:
            self._add("e", self._phase, time)
        self._phase = phase
        if phase:
            self._add("b", phase, time)

    def mark(self, name: str, time: float) -> None:
        self._add("n", name, time)

    def end(self, time: float, args: dict[str, Any]) -> None:
        self.enter("", time)
        self._add("e", f"request {self._request_id}", time, args)

    def _add(self, kind: str, name: str, time: float, args: dict[str, Any] | None = None) -> None:
        self.found.append(
            {
                "ph": kind, "name": name, "cat": "request", "id2": {"local": self._id}, "pid": REQUESTS, "tid": 0,
                "ts": _microseconds(time), "args": args or {},
            }
        )  # fmt: skip


def _requests(events: Sequence[Event], origin: float) -> list[dict[str, Any]]:
    tracks: list[_Track] = []
    current: dict[str, _Track] = {}
    now = 0.0
    first_here = {event.request_id for event in events if type(event) is FirstToken}

    def track_of(request_id: str, phase: str, begin: float, **args: Any) -> _Track:
        track = current.get(request_id)
        if track is None:
            track = current[request_id] = _Track(len(tracks) + 1, request_id, begin, args)
            track.enter(phase, begin)
            tracks.append(track)
        return track

    for event in events:
        time = event.time - origin
        match event:
            case RequestArrived():
                track_of(
                    event.request_id, "queue", time, prompt_tokens=event.prompt_tokens, max_tokens=event.max_tokens
                )
            case RequestScheduled():
                track_of(event.request_id, "queue", 0.0).enter("prefill", time)
            case FirstToken():
                track_of(event.request_id, "prefill", 0.0).enter("decode", time)
            case TokensProduced():
                for request_id in event.request_ids:
                    if request_id not in current and request_id not in first_here:
                        track_of(request_id, "decode", 0.0)  # it was decoding when the capture began
            case RequestPreempted():
                track_of(event.request_id, "decode", 0.0).mark(f"preempted by {event.kind}", time)
            case RequestFinished():
                track = track_of(event.request_id, "decode" if event.output_tokens else "queue", 0.0)
                track.end(time, {"finish_reason": event.reason, "output_tokens": event.output_tokens})
                del current[event.request_id]
        now = max(now, time)
    for track in current.values():
        track.end(now, {"finish_reason": "", "unfinished": True})
    return [entry for track in tracks for entry in track.found]
