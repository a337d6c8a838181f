"""Runs the HTTP server on the event loop of the process, beside the gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator

import uvicorn

from jaxserve.serving.bind import address_of, check_free
from jaxserve.serving.http_port.app import make_app
from jaxserve.serving.served_model import ServedModel

_BACKLOG = 2048
_CLOSE_SECONDS = 1.0


class _Uvicorn(uvicorn.Server):
    """A uvicorn server that leaves signals to the process that it is a part of."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class HttpServer:
    """Serves one port. Call `start`, `announce` when the model is loaded, `drain`, `stop`, in this order.

    Args:
        host: address to listen on.
        port: 0 takes a free one.
        served: the model.
    """

    def __init__(self, host: str, port: int, served: ServedModel):
        self.host = host
        self.port = port
        config = uvicorn.Config(
            make_app(served),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=round(_CLOSE_SECONDS),
        )
        self._uvicorn = _Uvicorn(config)
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Binds the port and starts answering; probes see that the model is loading. Sets `port`. Raises BindError."""
        check_free(self.host, self.port)
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listening = socket.create_server((self.host, self.port), family=family, backlog=_BACKLOG)
        self.port = listening.getsockname()[1]
        self._running = asyncio.ensure_future(self._uvicorn.serve([listening]))
        while not self._uvicorn.started and not self._running.done():  # noqa: ASYNC110  uvicorn has no event for it
            await asyncio.sleep(0.001)

    def announce(self) -> None:
        """Does nothing: probes ask the model itself."""

    def drain(self) -> None:
        """Does nothing: probes ask the model itself."""

    async def stop(self) -> None:
        """Closes the port; open calls get a moment to end. Streams should have ended before."""
        self._uvicorn.should_exit = True
        if self._running is not None:
            await self._running

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return address_of(self.host, self.port)
