"""An HTTP server on a free port over the echo engine, for asyncio tests and, in a thread, for blocking ones."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx

from jaxserve.config.client_limits import LimitsConfig
from jaxserve.config.http_config import HttpConfig
from jaxserve.frontend.async_frontend import AsyncFrontEnd
from jaxserve.serving.access.callers import Anybody, Callers
from jaxserve.serving.grpc_port.grpc_server import GrpcServer
from jaxserve.serving.http_port.http_server import HttpServer
from jaxserve.serving.served_model import ServedModel
from tests.server.fakes import WAIT_SECONDS, EchoEngine
from tests.server.harness import MAX_MESSAGE_BYTES, in_thread

JSON = {"content-type": "application/json"}


@dataclasses.dataclass
class HttpServed:
    """A running server and all its parts."""

    engine: EchoEngine
    frontend: AsyncFrontEnd
    model: ServedModel
    server: HttpServer
    grpc: GrpcServer
    client: httpx.AsyncClient

    @property
    def url(self) -> str:
        return f"http://{self.server.address}"

    async def until(self, wait: Callable[..., None], *arguments: Any) -> None:
        """Awaits one of the engine's blocking waits."""
        await asyncio.to_thread(wait, *arguments)


@contextlib.asynccontextmanager
async def http_serving(
    tokenizer: Any,
    engine: EchoEngine | None = None,
    config: HttpConfig | None = None,
    limits: LimitsConfig | None = None,
    max_body_bytes: int = MAX_MESSAGE_BYTES,
    callers: Callers = Anybody(),
    **options: Any,
) -> AsyncIterator[HttpServed]:
    """A server that is ready, with gRPC beside it. options: of its AsyncFrontEnd."""
    engine = engine or EchoEngine()
    served = ServedModel("echo", callers)
    grpc_server = GrpcServer("127.0.0.1", 0, max_body_bytes, served)
    server = HttpServer("127.0.0.1", 0, served, config, limits, max_body_bytes)
    await server.start()
    await grpc_server.start()
    frontend = AsyncFrontEnd(engine, tokenizer, **options)
    served.serve(frontend, tokenizer)
    server.announce()
    async with httpx.AsyncClient(base_url=f"http://{server.address}", timeout=WAIT_SECONDS, headers=JSON) as client:
        try:
            yield HttpServed(engine, frontend, served, server, grpc_server, client)
        finally:
            engine.resume()
            await frontend.close(0.0)
            await server.stop()
            await grpc_server.stop()
            engine.close()


def run_http(test: Callable[[HttpServed], Awaitable[None]], tokenizer: Any, **options: Any) -> None:
    """Runs an asyncio test against a server of its own."""

    async def body() -> None:
        async with http_serving(tokenizer, **options) as served:
            await test(served)

    asyncio.run(asyncio.wait_for(body(), WAIT_SECONDS))


async def until(condition: Callable[[], Any]) -> None:
    """Returns when the condition holds, which this loop brings about."""
    while not condition():  # noqa: ASYNC110  the server has no event for it
        await asyncio.sleep(0.005)


def http_serving_in_thread(tokenizer: Any, **options: Any) -> contextlib.AbstractContextManager[HttpServed]:
    """The server of `http_serving`, in a thread."""
    return in_thread(http_serving(tokenizer, **options))


def events_of(body: str) -> list[Any]:
    """The values of the events of a whole stream; its end, [DONE], as that text."""
    assert body.endswith("\n\n")
    found = []
    for event in body.removesuffix("\n\n").split("\n\n"):
        assert event.startswith("data: ")
        data = event.removeprefix("data: ")
        assert "\n" not in data
        found.append(data if data == "[DONE]" else json.loads(data))
    return found


def texts_of(events: list[Any]) -> dict[int, str]:
    """The text of each choice of a stream."""
    found: dict[int, str] = {}
    for event in events:
        for choice in event["choices"] if event != "[DONE]" else ():
            text = choice["delta"]["content"] if "delta" in choice else choice["text"]
            found[choice["index"]] = found.get(choice["index"], "") + text
    return found


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, whose shape is OpenAI's."""
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    return error
