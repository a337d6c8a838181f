"""A real gRPC server on a free port over the echo engine, for asyncio tests and, in a thread, for blocking ones."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxserve.config.client_limits import LimitsConfig
from jaxserve.frontend.async_frontend import AsyncFrontEnd
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.access.callers import Anybody, Callers
from jaxserve.serving.clients.grpc_client import AsyncClient
from jaxserve.serving.grpc_port.grpc_server import GrpcServer
from jaxserve.serving.served_model import ServedModel
from tests.server.fakes import WAIT_SECONDS, EchoEngine

T = TypeVar("T")

GREEDY = SamplingParams(temperature=0.0)
MAX_MESSAGE_BYTES = 64 * 1024


@dataclasses.dataclass
class Served:
    """A running server and all its parts."""

    engine: EchoEngine
    frontend: AsyncFrontEnd
    model: ServedModel
    server: GrpcServer
    client: AsyncClient

    @property
    def address(self) -> str:
        return self.server.address

    def drain(self) -> None:
        """Refuses new requests, as the server does before it ends."""
        self.model.drain()
        self.server.drain()

    async def until(self, wait: Callable[..., None], *arguments: Any) -> None:
        """Awaits one of the engine's blocking waits."""
        await asyncio.to_thread(wait, *arguments)


@contextlib.asynccontextmanager
async def serving(
    tokenizer: Any,
    engine: EchoEngine | None = None,
    limits: LimitsConfig | None = None,
    callers: Callers = Anybody(),
    **options: Any,
) -> AsyncIterator[Served]:
    """A server that is ready. limits: what clients may hold open. options: of its AsyncFrontEnd."""
    engine = engine or EchoEngine()
    served = ServedModel("echo", callers)
    server = GrpcServer("127.0.0.1", 0, MAX_MESSAGE_BYTES, served, limits)
    await server.start()
    frontend = AsyncFrontEnd(engine, tokenizer, metrics=served.metrics, **options)
    served.serve(frontend, tokenizer)
    server.announce()
    async with AsyncClient(server.address) as client:
        try:
            yield Served(engine, frontend, served, server, client)
        finally:
            engine.resume()
            await frontend.close(0.0)
            await server.stop()
            engine.close()


def run_served(
    test: Callable[[Served], Awaitable[None]], tokenizer: Any, engine: EchoEngine | None = None, **options: Any
) -> None:
    """Runs an asyncio test against a server of its own."""

    async def body() -> None:
        async with serving(tokenizer, engine, **options) as served:
            await test(served)

    asyncio.run(asyncio.wait_for(body(), WAIT_SECONDS))


@contextlib.contextmanager
def in_thread(serving: contextlib.AbstractAsyncContextManager[T]) -> Iterator[T]:
    """A server in a thread with an event loop of its own, for tests that block."""
    started, stop = threading.Event(), threading.Event()
    parts: list[T] = []

    async def body() -> None:
        async with serving as served:
            parts.append(served)
            started.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(body()))
    thread.start()
    try:
        assert started.wait(WAIT_SECONDS), "the server did not start"
        yield parts[0]
    finally:
        stop.set()
        thread.join()


def serving_in_thread(tokenizer: Any) -> contextlib.AbstractContextManager[Served]:
    """The server of `serving`, in a thread."""
    return in_thread(serving(tokenizer))


async def status_of(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    """The code and details that a call fails with."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details() or ""
    raise AssertionError("the call succeeded")


async def health_of(address: str, service: str = "") -> str:
    """The name of the health status."""
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service))
    return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
