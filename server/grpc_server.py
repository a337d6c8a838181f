"""The gRPC server: a port, the JaxServe service, grpc.health.v1 and reflection.

It listens before the model is loaded, so that a port in use is found at once and probes see NOT_SERVING meanwhile.
"""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from jaxserve.frontend.async_frontend import AsyncFrontEnd
from server.malformed import MalformedInterceptor
from server.oversized import OversizedInterceptor
from server.protos.jaxserve.v1 import jaxserve_pb2 as pb
from server.protos.jaxserve.v1 import jaxserve_pb2_grpc as pb_grpc
from server.service import JaxServeService

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["JaxServe"].full_name
_CLOSE_SECONDS = 1.0
_UNLIMITED = 2**31 - 1

_Status = health_pb2.HealthCheckResponse.ServingStatus


class BindError(OSError):
    """The server cannot listen where it should; the text is one line that names the address and the remedy."""


class GrpcServer:
    """One listening server. `start`, `serve` when the model is loaded, `drain`, `stop`, in this order.

    host, port: where it listens; port 0 takes a free one. max_message_bytes: largest request message; a larger one is
    refused with RESOURCE_EXHAUSTED. model_name: what the model is called in GetModelInfo.
    """

    def __init__(self, host: str, port: int, max_message_bytes: int, model_name: str):
        self.host = host
        self.port = port
        self._server = grpc.aio.server(
            interceptors=(MalformedInterceptor(SERVICE_NAME), OversizedInterceptor()),
            options=_options(max_message_bytes),
        )
        self._service = JaxServeService(model_name)
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue]  made at run time
        pb_grpc.add_JaxServeServicer_to_server(self._service, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self) -> None:
        """Binds the port and answers from now on, NOT_SERVING and UNAVAILABLE. Sets `port`. Raises BindError."""
        _check_free(self.host, self.port)
        try:
            self.port = self._server.add_insecure_port(_address(self.host, self.port))
        except RuntimeError as error:
            raise BindError(f"cannot listen on {_address(self.host, self.port)}; give another port or host") from error
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self._server.start()

    async def serve(self, frontend: AsyncFrontEnd, tokenizer: Any) -> None:
        """Takes requests and reports SERVING. tokenizer: the front end's, or None."""
        self._service.serve(frontend, tokenizer)
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def drain(self) -> None:
        """Reports NOT_SERVING for good and refuses new requests; running streams go on."""
        self._service.drain()
        await self._health.enter_graceful_shutdown()

    async def stop(self) -> None:
        """Closes the port; calls still open have a moment to end. The streams should have ended before."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(_CLOSE_SECONDS)

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return _address(self.host, self.port)

    async def _set_health(self, status: Any) -> None:
        for service in ("", SERVICE_NAME):
            await self._health.set(service, status)


def _options(max_message_bytes: int) -> tuple[tuple[str, int], ...]:
    return (
        # Two servers on one port would share its connections in silence.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # gRPC refuses calls at random from 1,000 on that Python has not yet taken, and all that wait 30 seconds for it,
        # with a bare CANCELLED. How many may wait is the scheduler's to say (max_num_waiting), with a reason.
        ("grpc.server.max_pending_requests", _UNLIMITED),
        ("grpc.server.max_pending_requests_hard_limit", _UNLIMITED),
        ("grpc.server_max_unrequested_time_in_server", _UNLIMITED),
        # A client whose machine vanished sends no goodbye: without an answer to a ping its requests are aborted.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    )


def _check_free(host: str, port: int) -> None:
    """Raises BindError when `port` cannot be bound. gRPC's own attempt reports no cause and writes to stderr."""
    if port == 0:
        return
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
            probe.listen(1)
    except OSError as error:
        address = _address(host, port)
        if error.errno == errno.EADDRINUSE:
            raise BindError(
                f"port {port} is in use: someone listens on {address} already; give another port"
            ) from error
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise BindError(f"cannot listen on {address}: {reason}; give another host or port") from error


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
