"""Holds what is served, for all ports alike: the front end once the model is loaded, and whether requests are taken."""

from __future__ import annotations

import time

from jaxserve.frontend.async_frontend import AsyncFrontEnd
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.serving.access.callers import Anybody, Callers
from jaxserve.serving.problem import NoTokenizerError, UnavailableError
from jaxserve.serving.refusal_times import RefusalTimes


class ServedModel:
    """The model of one server process. Requests are refused until `serve` is given a front end, and after `drain`.

    Args:
        name: name under which clients know the model.
        callers: tells who calls.

    refusal_times: of requests that were refused to be retried later, which every port adds.
    """

    def __init__(self, name: str, callers: Callers = Anybody()):
        self.name = name
        self.callers = callers
        self.refusal_times = RefusalTimes()
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
    def is_ready(self) -> bool:
        """Whether requests are accepted now: the model is loaded, the engine lives, and the server does not drain."""
        return self._frontend is not None and not self._draining and not self._frontend.failure

    @property
    def has_tokenizer(self) -> bool:
        return self._tokenizer is not None

    def started(self) -> AsyncFrontEnd:
        """Returns the front end. Raises UnavailableError before `serve`."""
        if self._frontend is None:
            raise UnavailableError("the server is starting: the model is not loaded yet; try again soon")
        return self._frontend

    def accepting(self) -> AsyncFrontEnd:
        """Returns the front end for a new request. Raises UnavailableError before `serve` and after `drain`."""
        if self._draining:
            raise UnavailableError("the server is shutting down and takes no new requests")
        return self.started()

    def tokenizer(self) -> Tokenizer:
        """Returns the tokenizer. Raises UnavailableError before `serve`, and NoTokenizerError without one."""
        self.started()
        if self._tokenizer is None:
            raise NoTokenizerError("the server runs without a tokenizer (skip_tokenizer_init)")
        return self._tokenizer
