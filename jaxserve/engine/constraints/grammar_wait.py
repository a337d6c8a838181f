"""Keeps the requests whose grammar is being compiled, so that they hold nobody up."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from jaxserve.request import EngineRequest

LOOK_SECONDS = 0.002
"""Interval, in seconds, at which an engine that has nothing else to do looks whether a grammar is compiled."""


class GrammarWait:
    """Holds requests in order of arrival, each until its grammar is compiled."""

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[EngineRequest, Future[Any]]] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def request_ids(self) -> list[str]:
        return list(self._waiting)

    def add(self, request: EngineRequest, compiled: Future[Any]) -> None:
        self._waiting[request.request_id] = request, compiled

    def remove(self, request_id: str) -> EngineRequest | None:
        """Gives up a request; returns None when it does not wait here."""
        found = self._waiting.pop(request_id, None)
        return None if found is None else found[0]

    def ready(self) -> list[tuple[EngineRequest, str]]:
        """Removes the requests whose grammar is compiled, and returns each with a line that says why that failed, or
        with "" where it did not."""
        done = [name for name, (_, compiled) in self._waiting.items() if compiled.done()]
        ready = []
        for name in done:
            request, compiled = self._waiting.pop(name)
            error = compiled.exception()
            ready.append((request, "" if error is None else str(error)))
        return ready
