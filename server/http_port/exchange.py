"""Reads the request and sends the response of one exchange, in ASGI's messages."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from jaxserve.config.shown import shown
from jaxserve.frontend.async_frontend import AsyncFrontEnd
from jaxserve.request import check_identity
from jaxserve.serving.access.callers import Caller
from jaxserve.serving.http_port.errors import HttpError, error_answer
from jaxserve.serving.http_port.json_bodies import Structure, parse_steps

T = TypeVar("T")

REQUEST_ID = "x-request-id"

_JSON = (b"content-type", b"application/json")
_EVENTS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx passes events on at once
)


class ClientGoneError(Exception):
    """The client has closed the connection; nothing can be answered."""


class Exchange:
    """Wraps one HTTP request and its response.

    Args:
        scope, receive, send: as ASGI passes them.
        max_body_bytes: a larger body is refused with 413.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_body_bytes: int):
        self.scope = scope
        self._receive = receive
        self._send = send
        self._max_body_bytes = max_body_bytes
        self._headers: dict[bytes, bytes] = dict(reversed(scope["headers"]))  # of several of a name, the first
        self.extra: list[tuple[bytes, bytes]] = []
        self.started = False
        self._ended = False

    @property
    def caller(self) -> Caller:
        """Who calls, as the guard has found."""
        return self.scope["caller"]

    def header(self, name: str) -> str | None:
        """Returns the value of a header; None without one. name: in lower case."""
        value = self._headers.get(name.encode())
        return None if value is None else value.decode("latin-1")

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the request by name, in lower case; of several of one name the first."""
        return {name.decode("latin-1"): value.decode("latin-1") for name, value in self._headers.items()}

    def request_id(self) -> str:
        """Returns the request id that the client has chosen in the headers, or a new one. Raises ValueError."""
        value = self.header(REQUEST_ID)
        if not value:
            return uuid.uuid4().hex
        check_identity(REQUEST_ID, value)
        return value

    def add_header(self, name: str, value: str) -> None:
        """Adds a header to the response, which has not begun. What a header cannot hold is escaped."""
        printable = "".join(one if one.isprintable() else repr(one)[1:-1] for one in value)
        self.extra.append((name.encode(), printable.encode("latin-1", "backslashreplace")))

    # ---- the request ---------------------------------------------------------------------------------------------

    async def read_body(self) -> bytes:
        """Returns the body, which must be JSON by its type.

        Raises:
            HttpError: it is of another type, or too large; the latter by its length before it is read.
            ClientGoneError: the client is gone.
        """
        kind = (self.header("content-type") or "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise HttpError(415, f"content-type is {shown(kind)}; it must be application/json")
        if (coding := self.header("content-encoding")) not in (None, "identity"):
            raise HttpError(415, f"content-encoding is {shown(coding)}; send the body as it is")
        length = self.header("content-length")
        if length is not None and length.isdigit():
            self._check_size(int(length), "")
        parts, size = [], 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            part = message.get("body", b"")
            size += len(part)
            self._check_size(size, "at least ")
            parts.append(part)
            if not message.get("more_body", False):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    async def read_json(
        self,
        frontend: AsyncFrontEnd,
        parse: Callable[[dict[str, Any]], T],
        check: Callable[[Structure], None] | None = None,
    ) -> T:
        """Returns what `parse` makes of the body, see `parse_steps`. Raises as `read_body` does, and ValueError."""
        body = await self.read_body()
        return await frontend.work(parse_steps(body, parse, check), len(body))

    def _check_size(self, size: int, least: str) -> None:
        if size > self._max_body_bytes:
            raise HttpError(
                413, f"the body has {least}{size} bytes; at most {self._max_body_bytes} (max_message_bytes) are allowed"
            )

    @contextlib.contextmanager
    def canceled_when_gone(self) -> Iterator[None]:
        """Cancels the task that runs the block when the client disconnects; the block then ends with ClientGoneError.

        The body must have been read.
        """
        task = asyncio.current_task()
        assert task is not None
        gone = False

        def notice(watch: asyncio.Task[None]) -> None:
            nonlocal gone
            if not self._ended and not watch.cancelled():
                gone = True
                task.cancel()

        watch = asyncio.ensure_future(self._until_gone())
        watch.add_done_callback(notice)
        try:
            yield
        except asyncio.CancelledError:
            if not gone:
                raise
            task.uncancel()
            raise ClientGoneError from None
        finally:
            self._ended = True
            watch.cancel()

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    # ---- the response --------------------------------------------------------------------------------------------

    async def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Sends a whole response of JSON."""
        more = [(name.encode(), value.encode("latin-1")) for name, value in (headers or {}).items()]
        length = (b"content-length", b"%d" % len(body))
        self.started = True
        await self._send(
            {"type": "http.response.start", "status": status, "headers": [_JSON, length, *self.extra, *more]}
        )
        self._ended = True  # the message that ends a response wakes who waits for the client to disconnect
        await self._send({"type": "http.response.body", "body": body})

    async def answer_parts(self, parts: Iterable[bytes]) -> None:
        """Sends a whole response of JSON that is made part by part, as the connection takes them."""
        self.started = True
        await self._send({"type": "http.response.start", "status": 200, "headers": [_JSON, *self.extra]})
        for part in parts:
            await self._send({"type": "http.response.body", "body": part, "more_body": True})
            await asyncio.sleep(0)  # others have their turn
        await self.end_events()

    async def answer_json(self, value: Any, status: int = 200) -> None:
        """Sends a value as JSON."""
        await self.answer(status, msgspec.json.encode(value))

    async def fail(self, error: Exception) -> None:
        """Answers with an error: with its status, or as an event where the stream has begun."""
        answer = error_answer(error)
        if self.started:
            await self.end_events(b"data: " + answer.body + b"\n\n")
        else:
            await self.answer(answer.status, answer.body, answer.headers)

    async def send_event(self, data: bytes) -> None:
        """Sends whole events of a stream; returns when the connection can take more."""
        if not self.started:
            self.started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": [*_EVENTS, *self.extra]})
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end_events(self, data: bytes = b"") -> None:
        """Sends the last events of a stream, and ends it."""
        self._ended = True
        await self._send({"type": "http.response.body", "body": data})
