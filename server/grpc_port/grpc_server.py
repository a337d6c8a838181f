"""Runs the gRPC server: a port, the JaxServe service, the one that gateways speak, grpc.health.v1 and reflection.

It listens before the model is loaded, so that a port in use is found at once and probes see NOT_SERVING meanwhile.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import grpc
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from jaxserve.config.client_limits import LimitsConfig
from jaxserve.serving.access.tls import ServerTls
from jaxserve.serving.bind import BindError, address_of, check_free
from jaxserve.serving.grpc_port import embed_convert, health
from jaxserve.serving.grpc_port.call_interceptor import CallInterceptor
from jaxserve.serving.grpc_port.calls import OpenCalls, note_rpc_tasks
from jaxserve.serving.grpc_port.connections import ConnectionGuard, connection_limit, reserve
from jaxserve.serving.grpc_port.oversized import (
    DETOKENIZE,
    GENERATE,
    WARM_PREFIX,
    OversizedInterceptor,
    check_detokenize,
    check_generate,
)
from jaxserve.serving.grpc_port.service import JaxServeService
from jaxserve.serving.memory_return import return_memory
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2_grpc as pb_grpc
from jaxserve.serving.served_model import ServedModel

_log = logging.getLogger("jaxserve.server")

SERVICE_NAME: str = pb.DESCRIPTOR.services_by_name["JaxServe"].full_name
_CLOSE_SECONDS = 1.0
_UNLIMITED = 2**31 - 1
_MOST_PENDING = 32_768
"""Maximum number of calls of one method that wait for Python, 15 kB each. gRPC cancels further ones without a
reason."""


class GrpcServer:
    """Serves one port. Call `start`, `announce` when the model is loaded, `drain`, `stop`, in this order.

    Args:
        host: address to listen on.
        port: 0 takes a free one.
        max_message_bytes: largest request message; a larger one is refused with RESOURCE_EXHAUSTED.
        served: the model.
        limits: bounds of what clients may hold open.
        returns_memory: whether memory used by a burst of calls is returned to the system, see `memory_return`.
        reflection_enabled: whether clients may ask which services there are.
        tls: None takes connections in clear text.

    Raises:
        DescriptorError: the limit of open files is too low.
    """

    def __init__(
        self,
        host: str,
        port: int,
        max_message_bytes: int,
        served: ServedModel,
        limits: LimitsConfig | None = None,
        *,
        returns_memory: bool = False,
        reflection_enabled: bool = True,
        tls: ServerTls | None = None,
    ):
        limits = limits or LimitsConfig()
        self.host = host
        self.port = port
        self._returns_memory = returns_memory
        max_connections = connection_limit(limits.max_connections)
        reserved = reserve(max_connections)
        self._most_connections = max_connections - reserved // 2
        self.calls = OpenCalls(limits, max_connections - reserved)
        note_rpc_tasks(asyncio.get_running_loop())
        logging.getLogger("grpc._cython.cygrpc").addFilter(_client_gone_in_a_line)
        self._watches: list[asyncio.Task[None]] = []
        service = JaxServeService(served)
        gateways = _gateway_service(served)
        checks: dict[str, Callable[[bytes], None]] = embed_convert.oversized_checks()
        checks[GENERATE] = functools.partial(check_generate, check_prompt_bytes=service.check_prompt_bytes)
        checks[WARM_PREFIX] = checks[GENERATE]
        checks[DETOKENIZE] = check_detokenize
        if gateways is not None:
            checks.update(gateways.oversized_checks(service.check_prompt_bytes))
        self._server = grpc.aio.server(
            interceptors=(
                CallInterceptor(self.calls, served.callers, served.limiter),
                OversizedInterceptor(checks),
            ),
            options=_options(max_message_bytes, max_connections, limits),
        )
        self._health = health.HealthService(limits.max_health_watches)
        pb_grpc.add_JaxServeServicer_to_server(service, self._server)
        self._services = [SERVICE_NAME]
        if gateways is not None:
            gateways.add_to(self._server)
            self._services.append(gateways.name)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if reflection_enabled:
            services = (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(services, self._server)
        self._tls = tls

    async def start(self) -> None:
        """Binds the port and starts answering with NOT_SERVING and UNAVAILABLE. Sets `port`. Raises BindError."""
        check_free(self.host, self.port)
        try:
            address = address_of(self.host, self.port)
            if self._tls is None:
                self.port = self._server.add_insecure_port(address)
            else:
                self.port = self._server.add_secure_port(address, self._tls.grpc_credentials())
        except RuntimeError as error:
            raise BindError(
                f"cannot listen on {address_of(self.host, self.port)}; give another port or host"
            ) from error
        self._set_health(health.Status.NOT_SERVING)
        await self._server.start()
        guard = ConnectionGuard(self.port, self._most_connections, self.calls)
        self._watches = [asyncio.ensure_future(self.calls.watch()), asyncio.ensure_future(guard.watch())]
        if self._returns_memory:
            self._watches.append(asyncio.ensure_future(return_memory()))

    def announce(self) -> None:
        """Reports SERVING: the model is loaded."""
        self._set_health(health.Status.SERVING)

    def drain(self) -> None:
        """Reports NOT_SERVING permanently; running streams continue."""
        self._health.shut_down()

    async def stop(self) -> None:
        """Closes the port; open calls get a moment to end. Streams should have ended before."""
        self._health.shut_down()
        await self._server.stop(_CLOSE_SECONDS)
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)

    @property
    def address(self) -> str:
        """HOST:PORT."""
        return address_of(self.host, self.port)

    def _set_health(self, status: Any) -> None:
        for service in ("", *self._services):
            self._health.set(service, status)


def _gateway_service(served: ServedModel) -> Any | None:
    """Returns the service that gateways speak; None, with a line in the log, where its package is not installed."""
    if importlib.util.find_spec("smg_grpc_proto") is None:
        _log.info("gateways are not served: smg-grpc-proto is not installed (pip install 'jaxserve[gateway]')")
        return None
    return importlib.import_module("jaxserve.serving.grpc_port.vllm_service").VllmEngineService(served)


def _client_gone_in_a_line(record: logging.LogRecord) -> bool:
    """Shortens gRPC's traceback for a client that disconnected before its status was sent to one line."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, grpc.aio.InternalError):
        record.msg, record.args, record.exc_info = f"a client was gone before it was answered: {record.msg}", (), None
        record.levelno, record.levelname = logging.INFO, "INFO"
    return True


def _options(max_message_bytes: int, max_connections: int, limits: LimitsConfig) -> tuple[tuple[str, int], ...]:
    keepalive_timeout = _milliseconds(limits.keepalive_timeout_seconds)
    handshake = _milliseconds(limits.handshake_seconds)
    return (
        # Two servers on one port would share its connections in silence.
        ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # Between the two limits gRPC refuses at random.
        ("grpc.max_metadata_size", limits.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_metadata_bytes),
        # gRPC refuses calls at random from 1,000 on that Python has not yet taken, and all that wait 30 seconds for it,
        # with a bare CANCELLED. How many may wait is the scheduler's to say (max_num_waiting), with a reason.
        ("grpc.server.max_pending_requests", _MOST_PENDING),
        ("grpc.server.max_pending_requests_hard_limit", _MOST_PENDING),
        ("grpc.server_max_unrequested_time_in_server", _UNLIMITED),
        ("grpc.max_allowed_incoming_connections", max_connections),
        ("grpc.max_concurrent_streams", limits.max_streams_per_connection),
        ("grpc.max_connection_idle_ms", _milliseconds(limits.max_idle_seconds)),
        # Of a client that never speaks HTTP/2, and of one that never answers the server's first frame.
        ("grpc.server_handshake_timeout_ms", handshake),
        ("grpc.http2.settings_timeout", handshake),
        # A client whose machine vanished sends no goodbye: without an answer to a ping its requests are aborted. A ping
        # that is under way anyway counts, so that the second timeout, of any ping, must be given too.
        ("grpc.keepalive_time_ms", _milliseconds(limits.keepalive_seconds)),
        ("grpc.keepalive_timeout_ms", keepalive_timeout),
        ("grpc.http2.ping_timeout_ms", keepalive_timeout),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    )


def _milliseconds(seconds: float) -> int:
    return round(1000 * seconds)
