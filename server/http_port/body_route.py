"""Answers requests with a body of OpenAI's or vLLM's fields: what its routes have in common."""

from __future__ import annotations

import abc
import logging
import time
from collections.abc import Sequence

from starlette.types import Receive, Scope, Send

from jaxserve.config.shown import shown
from jaxserve.frontend.delta import QueueFullError
from jaxserve.frontend.openai import BodyRequest
from jaxserve.frontend.openai_embeddings import EmbeddingBody
from jaxserve.request import RequestOptions, check_identity
from jaxserve.serving.access.request_headers import request_options
from jaxserve.serving.http_port.errors import check_model
from jaxserve.serving.http_port.exchange import REQUEST_ID, ClientGoneError, Exchange
from jaxserve.serving.served_model import ServedModel
from jaxserve.telemetry.request_trace import TRACE_HEADERS, RequestTrace

WARNING_HEADER = "x-jaxserve-warning"

_log = logging.getLogger("jaxserve.server")


class BodyRoute(abc.ABC):
    """Represents one route; an ASGI application.

    Args:
        served: the model.
        max_body_bytes: of a request.
    """

    def __init__(self, served: ServedModel, max_body_bytes: int):
        self._served = served
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = time.perf_counter()
        exchange = Exchange(scope, receive, send, self._max_body_bytes)
        try:
            await self._serve(exchange)
        except ClientGoneError:
            return
        except Exception as error:
            await exchange.fail(error)
            if isinstance(error, QueueFullError):
                self._served.refusal_times.observe(time.perf_counter() - received)

    @abc.abstractmethod
    async def _serve(self, exchange: Exchange) -> None:
        """Answers one request, or raises what is wrong with it."""

    def _opened(
        self, exchange: Exchange, request_id: str, body: BodyRequest | EmbeddingBody, kind: str
    ) -> tuple[str, RequestOptions, RequestTrace | None]:
        """Checks whose a parsed body is that generates nothing, and tells the client its id and unknown fields.

        Args:
            exchange: with the client.
            request_id: the id where the body has none.
            body: parsed.
            kind: of the request, for the log.

        Returns:
            The request's id, its options and its place in a trace.
        """
        served = self._served
        with served.rejections():
            if body.request_id is not None:
                request_id = body.request_id
                check_identity("request_id", request_id)
            exchange.add_header(REQUEST_ID, request_id)
            check_model(served.name, body.model)
            options = request_options(exchange.caller, exchange.headers, body.options)
        if body.unknown:
            warn_of_unknown(exchange, kind, body.unknown)
        trace = served.trace(((name, exchange.header(name)) for name in TRACE_HEADERS), "embeddings")
        return request_id, options, trace


def warn_of_unknown(exchange: Exchange, kind: str, unknown: Sequence[str]) -> None:
    """Tells the log and the client which fields were passed over. kind: of the request, for the log."""
    names = ", ".join(shown(name) for name in list(unknown)[:8]) + (", ..." if len(unknown) > 8 else "")
    _log.warning("a request %s has unknown fields, which were passed over: %s", kind, names)
    exchange.add_header(WARNING_HEADER, f"unknown fields were passed over: {names}")
