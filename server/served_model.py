"""Holds what is served, for all ports alike: the front end once the model is loaded, and whether requests are taken."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from typing import Any

from jaxserve.frontend.async_frontend import AsyncFrontEnd
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.serving.access.callers import Anybody, Callers
from jaxserve.serving.access.limiter import CallLimiter
from jaxserve.serving.problem import NoTokenizerError, UnavailableError, rejection
from jaxserve.serving.refusal_times import RefusalTimes
from jaxserve.telemetry.request_meter import RequestMeter
from jaxserve.telemetry.request_trace import RequestTrace, request_trace


class ServedModel:
    """The model of one server process. Requests are refused until `serve` is given a front end, and after `drain`.

    Args:
        name: name under which clients know the model.
        callers: tells who calls.
        kv_events: gateways may subscribe to events of the prefix cache.

    Attributes:
        limiter: keeps the callers' limits, on all ports together.
        refusal_times: of requests that were refused to be retried later, which every port adds.
        metrics: what requests are counted in, from before the model is loaded.
    """

    def __init__(self, name: str, callers: Callers = Anybody(), *, kv_events: bool = False):
        self.name = name
        self.callers = callers
        self.kv_events = kv_events
        self.limiter = CallLimiter()
        self.refusal_times = RefusalTimes()
        self.metrics = RequestMeter()
        self._frontend: AsyncFrontEnd | None = None
        self._tokenizer: Tokenizer | None = None
        self._ready_since = time.monotonic()
        self._created = int(time.time())
        self._draining = False

    def serve(self, frontend: AsyncFrontEnd, tokenizer: Tokenizer | None) -> None:
        """Starts accepting requests. tokenizer: the front end's, or None."""
        self._frontend = frontend
        self._tokenizer = tokenizer
        self._ready_since = time.monotonic()

    def drain(self) -> None:
        """Stops accepting requests; running ones continue."""
        self._draining = True

    @property
    def frontend(self) -> AsyncFrontEnd | None:
        """The front end, or None before `serve`."""
        return self._frontend

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def uptime_seconds(self) -> float:
        """Seconds since requests were first accepted."""
        return time.monotonic() - self._ready_since

    @property
    def created(self) -> int:
        """When the server was started, in Unix seconds."""
        return self._created

    @property
    def state(self) -> str:
        """What the server does: starting, ready, draining, or failed when its engine has ended."""
        if self._frontend is not None and self._frontend.failure:
            return "failed"
        if self._draining:
            return "draining"
        return "starting" if self._frontend is None else "ready"

    @property
    def is_ready(self) -> bool:
        """Whether requests are accepted now."""
        return self.state == "ready"

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    def started(self) -> AsyncFrontEnd:
        """Returns the front end. Raises UnavailableError before `serve`."""
        if self._frontend is None:
            raise UnavailableError("the server is starting: the model is not loaded yet; try again soon")
        return self._frontend

    def trace(self, pairs: Iterable[tuple[str, Any]], operation: str) -> RequestTrace | None:
        """Returns a request's place in a trace; None where requests are not traced.

        Args:
            pairs: the request's headers, or its gRPC metadata.
            operation: "chat", "text_completion" or "embeddings".
        """
        return None if self.metrics.on_finished is None else request_trace(pairs, operation)

    def rejections(self) -> contextlib.AbstractContextManager[float]:
        """Counts an error that is raised inside as a request that was refused. `AsyncFrontEnd` counts its own."""
        return self.metrics.rejections(rejection)

    def accepting(self) -> AsyncFrontEnd:
        """Returns the front end for a new request. Raises UnavailableError before `serve` and after `drain`."""
        with self.rejections():
            if self._draining:
                raise UnavailableError("the server is shutting down and takes no new requests")
            return self.started()

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer. Raises UnavailableError before `serve`, and NoTokenizerError without one."""
        self.started()
        if self._tokenizer is None:
            raise NoTokenizerError("the server runs without a tokenizer (skip_tokenizer_init)")
        return self._tokenizer
