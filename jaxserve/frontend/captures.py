"""Asks an engine for captures of what it does: the events of its steps and requests, or a profile of its process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

from jaxserve.engine.messages import (
    CaptureProfile,
    CaptureTimeline,
    EngineFailed,
    FromEngine,
    ProfileCaptured,
    TimelineEvents,
    ToEngine,
)
from jaxserve.frontend.delta import EngineDeadError, FrontEndError
from jaxserve.telemetry.recorder import Event, event_of_row

ANSWER_SECONDS = 120.0
"""Seconds within which an engine must hand over what it has captured. Writing a profile takes many of them where the
cores are busy."""


class CaptureError(FrontEndError):
    """A capture is not possible now, or has failed."""


class CaptureBusyError(CaptureError):
    """Another capture is being taken."""


class CapturedTimeline(NamedTuple):
    """Holds the events of a capture, in order of recording. dropped: those for which there was no room."""

    events: tuple[Event, ...]
    dropped: int


class Captures:
    """Takes one capture at a time. Not thread-safe. send: sends a message to the engine."""

    def __init__(self, send: Callable[[ToEngine], None]):
        self._send = send
        self._failure = ""
        self._running = ""
        self._directory = ""  # of the profile that is recorded
        self._rows: list[TimelineEvents] = []
        self._answer: asyncio.Future[None] | None = None

    def handle(self, message: FromEngine) -> None:
        """Takes the engine's messages, those that are about captures."""
        if isinstance(message, TimelineEvents):
            if self._running == "timeline":
                self._rows.append(message)
                if message.last:
                    self._settle(None)
        elif isinstance(message, ProfileCaptured) and message.directory == self._directory:
            self._settle(CaptureError(f"the profile cannot be recorded: {message.error}") if message.error else None)
        elif isinstance(message, EngineFailed):
            self._failure = message.error
            self._settle(EngineDeadError(f"the engine has ended: {message.error}"))

    async def timeline(self, seconds: float) -> CapturedTimeline:
        """Captures the engine's events for `seconds`. Raises CaptureBusyError while another one is taken."""
        answer = self._begin("timeline")
        try:
            self._send(CaptureTimeline(True))
            await asyncio.wait({answer}, timeout=seconds)  # ends early with the engine
            self._send(CaptureTimeline(False))
            await self._answered(answer)
            rows = [row for message in self._rows for row in message.rows]
            return CapturedTimeline(tuple(map(event_of_row, rows)), sum(message.dropped for message in self._rows))
        except asyncio.CancelledError:
            self._send(CaptureTimeline(False))
            raise
        finally:
            self._end()

    async def profile(self, directory: str, seconds: float) -> None:
        """Lets the engine write a profile of `seconds` into a directory, which exists.

        Raises CaptureBusyError while another capture is taken, and CaptureError where it fails.
        """
        answer = self._begin("profile")
        self._directory = directory
        try:
            self._send(CaptureProfile(directory, seconds))
            await asyncio.wait({answer}, timeout=seconds)
            await self._answered(answer)
        finally:
            self._end()

    def _begin(self, kind: str) -> asyncio.Future[None]:
        if self._failure:
            raise EngineDeadError(f"the engine has ended: {self._failure}")
        if self._running:
            raise CaptureBusyError(f"a {self._running} is being captured; one is taken at a time: try again later")
        self._running = kind
        self._answer = asyncio.get_running_loop().create_future()
        return self._answer

    async def _answered(self, answer: asyncio.Future[None]) -> None:
        try:
            await asyncio.wait_for(answer, ANSWER_SECONDS)
        except TimeoutError:
            raise CaptureError(f"the engine has not answered within {ANSWER_SECONDS:g} s") from None

    def _end(self) -> None:
        self._running, self._answer, self._rows, self._directory = "", None, [], ""

    def _settle(self, error: Exception | None) -> None:
        if self._answer is None or self._answer.done():
            return
        if error is None:
            self._answer.set_result(None)
        else:
            self._answer.set_exception(error)
