"""Captures the events of an engine for a while, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxserve.telemetry.recorder import Event, Recorder, entries, event_row

MAX_ENTRIES = 200_000
"""Maximum entries of a capture, as `Recorder` counts them; later events are only counted."""


class CapturedEvents(NamedTuple):
    """Holds the events since the last ones were taken, as rows of `event_row`. dropped: events beyond MAX_ENTRIES."""

    rows: tuple[tuple[Any, ...], ...]
    dropped: int


class TimelineCapture:
    """Captures a recorder's events between `start` and `stop`; costs nothing at other times."""

    def __init__(self, recorder: Recorder, max_entries: int = MAX_ENTRIES):
        self._recorder = recorder
        self._max_entries = max_entries
        self._unsubscribe: Callable[[], None] | None = None
        self._events: list[Event] = []
        self._entries = 0
        self._dropped = 0

    @property
    def is_on(self) -> bool:
        return self._unsubscribe is not None

    def start(self) -> None:
        """Starts anew."""
        self.stop()
        self._entries = 0
        self.take()
        self._unsubscribe = self._recorder.subscribe(self._add)

    def stop(self) -> None:
        """Captures no more events; those that are captured can still be taken."""
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None

    def take(self) -> CapturedEvents:
        """Returns the events captured since the last call."""
        taken = CapturedEvents(tuple(map(event_row, self._events)), self._dropped)
        self._events, self._dropped = [], 0
        return taken

    def _add(self, event: Event) -> None:
        self._entries += entries(event)
        if self._entries <= self._max_entries:
            self._events.append(event)
        else:
            self._dropped += 1
