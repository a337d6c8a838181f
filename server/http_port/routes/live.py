"""Streams the figures of the page at `/` as server-sent events: `GET /live`.

The first event, `server`, describes what is served once the model is loaded; then `samples` holds a list of samples, at
first those of the last two minutes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from jaxserve.serving.access.callers import Caller
from jaxserve.serving.http_port.errors import ErrorAnswer, problem_answer
from jaxserve.serving.http_port.live_stats import LiveStats, TooManyWatchersError
from jaxserve.serving.problem import Code, Problem
from jaxserve.serving.served_model import ServedModel

_SEND_SECONDS = 15.0
"""Seconds after which a client that reads nothing is given up."""
_RETRY_SECONDS = 10.0


def router(served: ServedModel, live: LiveStats | None = None) -> APIRouter:
    """Returns the route. served: the model. live: its figures; None makes them."""
    routes = APIRouter()
    stats = live or LiveStats(served)

    @routes.get("/live", include_in_schema=False)
    async def live_events(request: Request) -> Response:
        """Streams what the server is doing; holds no content of requests."""
        caller = request.scope.get("caller", Caller())
        return _LiveResponse(stats, sees_cache=caller.is_admin)

    return routes


class _LiveResponse(Response):
    """Streams events until the client goes away, reads nothing for long, or the server has ended."""

    media_type = "text/event-stream"

    def __init__(self, stats: LiveStats, *, sees_cache: bool):
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._stats = stats
        self._sees_cache = sees_cache

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._stats.watching():
                await self._stream(receive, send)
        except TooManyWatchersError as error:
            refusal = problem_answer(Problem(Code.RESOURCE_EXHAUSTED, str(error), _RETRY_SECONDS))
            await _response(refusal)(scope, receive, send)

    async def _stream(self, receive: Receive, send: Send) -> None:
        writing = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({writing, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (writing, gone):
                task.cancel()
            results = await asyncio.gather(writing, gone, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception) and not isinstance(result, TimeoutError | OSError):
                raise result

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events():
            async with asyncio.timeout(_SEND_SECONDS):
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        told = False
        async for samples in self._stats.follow():
            if not told and (server := self._stats.server()) is not None:
                told = True
                yield _event("server", server)
            shown = samples if self._sees_cache else [one.without_cache() for one in samples]
            yield _event("samples", shown)
            if samples[-1].state == "failed":
                return


def _response(answer: ErrorAnswer) -> Response:
    return Response(answer.body, answer.status, dict(answer.headers), "application/json")


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(name: str, value: object) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (name.encode(), msgspec.json.encode(value))
