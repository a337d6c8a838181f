"""Records the engine's events in a bounded buffer and passes them on to listeners.

Metrics, traces, plots and the timings of `timings.py` all read these events and nothing else. Times are seconds of the
engine's monotonic clock; `Recorder.origin` relates that clock to the calendar.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, slots=True)
class RequestArrived:
    """The engine accepted a request. max_tokens: maximum number of output tokens."""

    time: float
    request_id: str
    prompt_tokens: int
    max_tokens: int
    tenant: str
    priority: int


@dataclasses.dataclass(frozen=True, slots=True)
class RequestScheduled:
    """A step computes tokens of the request for the first time: its queue time ends. Not repeated after preemption."""

    time: float
    request_id: str


@dataclasses.dataclass(frozen=True, slots=True)
class FirstToken:
    """The host has the first output token, which the `TokensProduced` of the same step counts."""

    time: float
    request_id: str


@dataclasses.dataclass(frozen=True, slots=True)
class TokensProduced:
    """The host has the output tokens of a step: one for each entry of `request_ids`."""

    time: float
    request_ids: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class RequestPreempted:
    """The request lost its pages. kind: to be recomputed, or swapped to host memory."""

    time: float
    request_id: str
    kind: Literal["recompute", "swap"]


@dataclasses.dataclass(frozen=True, slots=True)
class DecodeGapsExceeded:
    """A step came later than max_decode_gap allows. cause: one of `scheduler.gap_monitor.CAUSES`. count: requests that
    waited so long for their next token; longest_seconds: the longest that one did."""

    time: float
    cause: str
    count: int
    longest_seconds: float


@dataclasses.dataclass(frozen=True, slots=True)
class RequestFinished:
    """The request ended. reason: a value of `FinishReason`. output_tokens, preemptions: totals over its life."""

    time: float
    request_id: str
    reason: str
    prompt_tokens: int
    output_tokens: int
    preemptions: int


@dataclasses.dataclass(frozen=True, slots=True)
class StepRecorded:
    """One step of the engine loop.

    Attributes:
        time: when it began.
        prefill_tokens: useful tokens computed.
        decode_tokens: useful tokens computed.
        rows: requests in the step.
        token_bucket: the shape that its forward program was compiled for.
        row_bucket: the shape that its sample program was compiled for.
        padding: token_bucket less the useful tokens.
        pages_used: pages of the device in this state, null page not counted; so are pages_free and pages_cached.
        pages_swapped: pages in host memory.
        waiting: requests; so are running and swapped. Those swapped wait for their pages to be swapped in.
        *_seconds: host time of the four parts of the loop; collect is the wait for the previous step.
        pack_seconds: the part of dispatch_seconds in which the step's vectors were packed; 0 where it is not known.
        rows_together: rows that were decided to read shared pages together, in what the device has begun since the step
            before was recorded, where that is counted (`Runner.shared_reads`).
        idle_seconds: upper bound of the device's idle time between the previous step and this one; 0 when it was still
            busy at dispatch, or when no step was in flight then.
        unused_seconds: time without a step in flight, since the previous step was collected; 0 when there was none
            before.
    """

    time: float
    step: int
    prefill_tokens: int
    decode_tokens: int
    rows: int
    token_bucket: int
    row_bucket: int
    padding: int
    pages_used: int
    pages_free: int
    pages_cached: int
    waiting: int
    running: int
    schedule_seconds: float
    dispatch_seconds: float
    collect_seconds: float
    update_seconds: float
    idle_seconds: float
    pages_swapped: int = 0
    swapped: int = 0
    unused_seconds: float = 0.0
    pack_seconds: float = 0.0
    rows_together: int = 0

    @property
    def seconds(self) -> float:
        """Host time of the whole step: approximately until the next begins, while there is one."""
        return self.schedule_seconds + self.dispatch_seconds + self.collect_seconds + self.update_seconds


Event = (
    RequestArrived
    | RequestScheduled
    | FirstToken
    | TokensProduced
    | RequestPreempted
    | DecodeGapsExceeded
    | RequestFinished
    | StepRecorded
)
Listener = Callable[[Event], object]

_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        RequestArrived,
        RequestScheduled,
        FirstToken,
        TokensProduced,
        RequestPreempted,
        DecodeGapsExceeded,
        RequestFinished,
        StepRecorded,
    )
}
_VALUES = {kind: operator.attrgetter(*(field.name for field in dataclasses.fields(kind))) for kind in _KINDS.values()}


def event_row(event: Event) -> tuple[Any, ...]:
    """Returns an event as plain values, for a message: its kind, then its fields in order."""
    kind = type(event)
    return (kind.__name__, *_VALUES[kind](event))


def event_of_row(row: Sequence[Any]) -> Event:
    """Returns the event of which `event_row` made a row. Raises ValueError for anything else."""
    try:
        kind, values = _KINDS[row[0]], row[1:]
        if kind is TokensProduced:
            return TokensProduced(values[0], tuple(values[1]))
        return kind(*values)
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"an event is {str(row)[:60]}, which is none: {error}") from error


@dataclasses.dataclass(frozen=True)
class Origin:
    """Relates both clocks at one moment: an event's date is unix_time + (event.time - clock_time)."""

    clock_time: float
    unix_time: float


class Recorder:
    """Keeps the last events, of `capacity` entries in all, and passes every event to the listeners.

    An event is one entry, a `TokensProduced` as many as it has tokens, so that capacity bounds memory. A full buffer
    loses its oldest events to each new one, and `dropped` counts them: consumers that need all events subscribe.
    `record` takes constant time besides what the listeners take. A recorder has no length, so that an empty one is not
    false: `recorder or Recorder()` is safe.

    Args:
        clock: the clock that event times are read from.
        wall_clock: seconds since 1970. Both are read once, for `origin`.
    """

    def __init__(
        self,
        capacity: int = 100_000,
        *,
        clock: Callable[[], float] = time.perf_counter,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        if capacity < 1:
            raise ValueError(f"capacity is {capacity}; it must be at least 1")
        self.origin = Origin(clock_time=clock(), unix_time=wall_clock())
        self._capacity = capacity
        self._entries = 0
        self._events: deque[Event] = deque()
        self._num_recorded = 0
        self._listeners: tuple[Listener, ...] = ()

    @property
    def capacity(self) -> int:
        """Maximum number of entries kept."""
        return self._capacity

    @property
    def num_recorded(self) -> int:
        """Number of events recorded so far, the dropped ones included."""
        return self._num_recorded

    @property
    def dropped(self) -> int:
        """Number of events that the buffer no longer holds."""
        return self._num_recorded - len(self._events)

    def record(self, event: Event) -> None:
        """Keeps the event, then calls the listeners in order of subscription.

        An exception of a listener is raised here, when the event is already kept.
        """
        self._events.append(event)
        self._num_recorded += 1
        self._entries += entries(event)
        while self._entries > self._capacity:
            self._entries -= entries(self._events.popleft())
        for listener in self._listeners:
            listener(event)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Calls `listener` with every event from now on; returns a function that ends it.

        Listeners run inside the engine loop: they count and return, and leave slow work to another thread.
        Subscribing one twice, which would count everything twice, is a ValueError.
        """
        if listener in self._listeners:
            raise ValueError(f"listener {listener!r} is subscribed already")
        # A new tuple each time: a listener may subscribe or unsubscribe while events are being handed out.
        self._listeners = (*self._listeners, listener)

        def unsubscribe() -> None:
            self._listeners = tuple(other for other in self._listeners if other != listener)

        return unsubscribe

    def __iter__(self) -> Iterator[Event]:
        """Iterates over the events kept, oldest first, as of now: recording may continue meanwhile."""
        return iter(tuple(self._events))

    def to_jsonl(self, path: str | os.PathLike[str]) -> None:
        """Writes the events kept, one JSON object a line, over what the file held.

        The first line describes the recording: {"event": "Recording", "clock_time", "unix_time", "dropped"}.
        """
        header = {"event": "Recording", **dataclasses.asdict(self.origin), "dropped": self.dropped}
        with open(path, "w", encoding="utf-8") as file:
            file.write(json.dumps(header) + "\n")
            for event in self:
                file.write(json.dumps({"event": type(event).__name__, **dataclasses.asdict(event)}) + "\n")


@dataclasses.dataclass(frozen=True)
class Recording:
    """Holds the content of a file that `Recorder.to_jsonl` wrote. dropped: events lost before the first of `events`."""

    origin: Origin
    dropped: int
    events: tuple[Event, ...]


def read_jsonl(path: str | os.PathLike[str]) -> Recording:
    """Reads a file that `Recorder.to_jsonl` wrote; a ValueError names the file and the line that cannot be from one."""
    number = 1
    try:
        with open(path, encoding="utf-8") as file:
            header = _fields(file.readline(), "Recording")
            origin, dropped = Origin(header["clock_time"], header["unix_time"]), header["dropped"]
            events = []
            for text in file:
                number += 1
                fields = _fields(text)
                if "request_ids" in fields:
                    fields["request_ids"] = tuple(fields["request_ids"])
                events.append(_KINDS[fields.pop("event")](**fields))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{os.fspath(path)} line {number} is not an event of a recording: {error}") from error
    return Recording(origin, dropped, tuple(events))


def entries(event: Event) -> int:
    """Returns how many entries of a recorder an event takes."""
    return len(event.request_ids) if type(event) is TokensProduced else 1


def _fields(text: str, kind: str | None = None) -> dict[str, Any]:
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise TypeError(f"{text.strip()[:40]} is no object")
    if kind is not None and fields.get("event") != kind:
        raise ValueError(f"event is {fields.get('event')!r}, not {kind!r}")
    return fields
