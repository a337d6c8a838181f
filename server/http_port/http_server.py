"""Runs the HTTP server on the event loop of the process, beside the gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
import threading
from collections.abc import Generator

import uvicorn

from jaxserve.config.client_limits import LimitsConfig
from jaxserve.config.http_config import HttpConfig
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.serving.bind import address_of, check_free
from jaxserve.serving.grpc_port.connections import connection_limit
from jaxserve.serving.http_port.app import MAX_BODY_BYTES, make_app
from jaxserve.serving.http_port.gate import Gate
from jaxserve.serving.http_port.http_connections import HttpConnections
from jaxserve.serving.http_port.http_protocol import protocol_factory
from jaxserve.serving.served_model import ServedModel

_log = logging.getLogger("jaxserve.server")

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
        config: of the port.
        limits: bounds of what clients may hold open.
        max_body_bytes: a larger body is refused.

    Raises:
        DescriptorError: the limit of open files is too low.
    """

    def __init__(
        self,
        host: str,
        port: int,
        served: ServedModel,
        config: HttpConfig | None = None,
        limits: LimitsConfig | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
    ):
        self.host = host
        self.port = port
        self._served = served
        config, limits = config or HttpConfig(), limits or LimitsConfig()
        self.connections = HttpConnections(limits, limits.max_connections or connection_limit(None))
        gate = Gate(make_app(served, config, max_body_bytes), served, self.connections)
        self._uvicorn = _Uvicorn(
            uvicorn.Config(
                gate,
                http=protocol_factory(self.connections, limits, config.max_header_bytes),  # pyright: ignore[reportArgumentType]  a type that is made
                ws="none",
                log_config=None,
                access_log=False,
                lifespan="off",
                interface="asgi3",
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=math.ceil(limits.max_idle_seconds),
                timeout_graceful_shutdown=round(_CLOSE_SECONDS),
            )
        )
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Binds the port and starts answering; probes see that the model is loading. Sets `port`. Raises BindError."""
        check_free(self.host, self.port)
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        listening = socket.create_server((self.host, self.port), family=family, backlog=_BACKLOG)
        self.port = listening.getsockname()[1]
        running = asyncio.ensure_future(self._uvicorn.serve([listening]))
        self._tasks = [running, asyncio.ensure_future(self.connections.watch())]
        while not self._uvicorn.started and not running.done():  # noqa: ASYNC110  uvicorn has no event for it
            await asyncio.sleep(0.001)

    def announce(self) -> None:
        """Starts what the first conversation needs; probes ask the model itself."""
        if self._served.has_tokenizer:
            threading.Thread(target=_warm_chat, args=(self._served.tokenizer(),), daemon=True).start()

    def drain(self) -> None:
        """Does nothing: probes ask the model itself."""

    async def stop(self) -> None:
        """Closes the port; open calls get a moment to end. Streams should have ended before."""
        self._uvicorn.should_exit = True
        if self._tasks:
            running, watch = self._tasks
            await running
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return address_of(self.host, self.port)


def _warm_chat(tokenizer: Tokenizer) -> None:
    try:
        tokenizer.warm_chat()
    except OSError as error:  # each conversation will say so, too
        _log.warning("%s", error)
