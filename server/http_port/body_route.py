"""Answers requests with a body of OpenAI's or vLLM's fields: what its routes have in common."""

from __future__ import annotations

import abc
import logging
import time
from collections.abc import Sequence

from starlette.types import Receive, Scope, Send

from jaxserve.config.shown import shown
from jaxserve.frontend.delta import QueueFullError
from jaxserve.serving.http_port.exchange import ClientGoneError, Exchange
from jaxserve.serving.served_model import ServedModel

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


def warn_of_unknown(exchange: Exchange, kind: str, unknown: Sequence[str]) -> None:
    """Tells the log and the client which fields were passed over. kind: of the request, for the log."""
    names = ", ".join(shown(name) for name in list(unknown)[:8]) + (", ..." if len(unknown) > 8 else "")
    _log.warning("a request %s has unknown fields, which were passed over: %s", kind, names)
    exchange.add_header(WARNING_HEADER, f"unknown fields were passed over: {names}")
