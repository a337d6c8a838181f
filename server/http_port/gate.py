"""Bounds the open requests of the HTTP port."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.serving.http_port.errors import problem_answer
from jaxserve.serving.http_port.exchange import Exchange
from jaxserve.serving.http_port.guard import PROBES
from jaxserve.serving.http_port.http_connections import HttpConnections
from jaxserve.serving.problem import RETRY_SECONDS, Code, Problem


class Gate:
    """Wraps an ASGI application; probes are answered whatever else is at its limit.

    Args:
        app: what answers.
        connections: counts the open requests.
    """

    def __init__(self, app: ASGIApp, connections: HttpConnections):
        self._app = app
        self._connections = connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        if refusal := self._connections.refusal():
            answer = problem_answer(Problem(Code.RESOURCE_EXHAUSTED, refusal, RETRY_SECONDS))
            await Exchange(scope, receive, send, 0).answer(answer.status, answer.body, answer.headers)
            return
        self._connections.request_opened()
        try:
            await self._app(scope, receive, send)
        finally:
            self._connections.request_closed()
