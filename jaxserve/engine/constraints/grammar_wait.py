"""Keeps the requests whose grammar is being compiled, so that they hold nobody up."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

from jaxserve.request import EngineRequest

LOOK_SECONDS = 0.002
"""Interval, in seconds, at which an engine that has nothing else to do looks whether a grammar is compiled."""


class GrammarWait:
    """Holds requests in order of arrival, the samples of a prompt together, each until its grammar is compiled."""

    def __init__(self) -> None:
        self._waiting: dict[str, tuple[dict[str, EngineRequest], Future[Any]]] = {}  # samples of one prompt share one

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def request_ids(self) -> list[str]:
        return list(self._waiting)

    def add(self, samples: Sequence[EngineRequest], compiled: Future[Any]) -> None:
        """Adds the samples of a prompt, which are at least one."""
        together = {request.request_id: request for request in samples}
        for request_id in together:
            self._waiting[request_id] = together, compiled

    def remove(self, request_id: str) -> bool:
        """Gives up a request; returns whether it waited here."""
        found = self._waiting.pop(request_id, None)
        if found is not None:
            del found[0][request_id]
        return found is not None

    def ready(self) -> list[tuple[list[EngineRequest], str]]:
        """Removes the requests whose grammar is compiled, and returns the samples of each prompt with a line that says
        why that failed, or with "" where it did not."""
        ready = []
        for together, compiled in {id(found[0]): found for found in self._waiting.values()}.values():
            if not compiled.done():
                continue
            for request_id in together:
                del self._waiting[request_id]
            error = compiled.exception()
            ready.append((list(together.values()), "" if error is None else str(error)))
        return ready
