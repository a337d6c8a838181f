"""Runs the HTTP server on the event loop of the process, beside the gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Generator, Sequence
from typing import Any

import uvicorn

from jaxserve.config.client_limits import LimitsConfig
from jaxserve.serving.access.tls import ServerTls
from jaxserve.serving.bind import address_of, check_free
from jaxserve.serving.http_port.app import make_app
from jaxserve.serving.http_port.guard import HttpGuard
from jaxserve.serving.served_model import ServedModel

_BACKLOG = 2048
_CLOSE_SECONDS = 1.0


class _Uvicorn(uvicorn.Server):
    """A uvicorn server that leaves signals to the process that it is a part of, and whose handshakes take no longer
    than `handshake_seconds`."""

    handshake_seconds = 10.0
    tls: ssl.SSLContext | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts as uvicorn does, which leaves a minute for each handshake."""
        await self.lifespan.startup()
        loop, config = asyncio.get_running_loop(), self.config
        make: Any = config.http_protocol_class

        def connection() -> asyncio.Protocol:
            return make(config=config, server_state=self.server_state, app_state=self.lifespan.state, _loop=loop)

        seconds = None if self.tls is None else self.handshake_seconds
        self.servers = [
            await loop.create_server(
                connection, sock=listening, ssl=self.tls, ssl_handshake_timeout=seconds, backlog=config.backlog
            )
            for listening in sockets or ()
        ]
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


class HttpServer:
    """Serves one port. Call `start`, `announce` when the model is loaded, `drain`, `stop`, in this order.

    Args:
        host: address to listen on.
        port: 0 takes a free one.
        served: the model.
        limits: bounds of what clients may hold open.
        web_origins: see `HttpGuard`.
        tls: None takes connections in clear text.
    """

    def __init__(
        self,
        host: str,
        port: int,
        served: ServedModel,
        limits: LimitsConfig | None = None,
        *,
        web_origins: Sequence[str] = (),
        tls: ServerTls | None = None,
    ):
        limits = limits or LimitsConfig()
        self.host = host
        self.port = port
        config = uvicorn.Config(
            HttpGuard(make_app(served), served, web_origins),
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            proxy_headers=False,  # who calls is told by the key, and never by a header that anybody can send
            backlog=_BACKLOG,
            timeout_graceful_shutdown=round(_CLOSE_SECONDS),
        )
        self._uvicorn = _Uvicorn(config)
        self._uvicorn.handshake_seconds = limits.handshake_seconds
        self._uvicorn.tls = None if tls is None else tls.ssl_context()
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
