"""Stands before every route: who calls, and whether another request may be opened."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.serving.http_port.errors import error_answer, problem_answer
from jaxserve.serving.http_port.exchange import Exchange
from jaxserve.serving.http_port.http_connections import HttpConnections
from jaxserve.serving.problem import RETRY_SECONDS, Code, Problem
from jaxserve.serving.served_model import ServedModel

PROBES = frozenset(("/health", "/health/live", "/health/ready"))
"""Paths that are answered without a key, and whatever else is at its limit."""


class Gate:
    """Identifies the caller of every request, as scope["caller"], and bounds the open ones; an ASGI application.

    Args:
        app: what answers.
        served: tells who calls.
        connections: counts the open requests.
    """

    def __init__(self, app: ASGIApp, served: ServedModel, connections: HttpConnections):
        self._app = app
        self._served = served
        self._connections = connections

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        exchange = Exchange(scope, receive, send, 0)
        if refusal := self._connections.refusal():
            answer = problem_answer(Problem(Code.RESOURCE_EXHAUSTED, refusal, RETRY_SECONDS))
            await exchange.answer(answer.status, answer.body, answer.headers)
            return
        try:
            scope["caller"] = self._served.callers.identify(exchange.header("authorization"))
        except Exception as error:
            answer = error_answer(error)
            await exchange.answer(answer.status, answer.body, answer.headers)
            return
        self._connections.request_opened()
        try:
            await self._app(scope, receive, send)
        finally:
            self._connections.request_closed()
