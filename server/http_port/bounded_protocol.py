"""Bounds what a client of the HTTP port may send before there is a request: the size of headers, their time and the
number of connections.

uvicorn bounds none of them: it keeps headers of any size, and waits for ever for a request that does not arrive.
"""

from __future__ import annotations

import asyncio
import http
import resource
import time
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from jaxserve.config.client_limits import LimitsConfig

MOST_CONNECTIONS = 1024
"""Maximum number of connections where the configuration leaves it to the limit of open files."""

_BYTES_PER_HEADER = 4
"""Bytes of a header line besides its name and value."""


class _TooLargeError(Exception):
    """Headers exceed their limit."""


class BoundedProtocol(HttpToolsProtocol):
    """Handles one connection. Its class is made by `bounded_protocol`."""

    limits: LimitsConfig
    most_connections: int

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self._size = 0  # bytes of the request line and headers, and of trailers
        self._unseen = 0  # bytes received since the parser last had something for us, and so kept by it
        self._has_news = False
        self._idle_since: float = time.monotonic()
        self._arriving: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def idle_since(self) -> float:
        return self._idle_since

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        if len(self.connections) > self.most_connections and not self._make_room():
            self._refuse(503, f"{self.most_connections} connections are open (max_connections); try again later")
            return
        self._expect(self.limits.handshake_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        self._arrived()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        self._has_news = False
        super().data_received(data)
        self._unseen = 0 if self._has_news else self._unseen + len(data)
        if self._unseen > self.limits.max_header_bytes and not self.transport.is_closing():
            self._refuse(431, self._too_large())

    def send_400_response(self, msg: str) -> None:
        if self._size > self.limits.max_header_bytes:
            self._refuse(431, self._too_large())
        else:
            super().send_400_response(msg)

    def _unsupported_upgrade_warning(self) -> None:
        """Logs nothing: whoever likes may ask for another protocol, and none is spoken here."""

    # ---- what the parser says ----

    def on_message_begin(self) -> None:
        self._size, self._has_news = 0, True
        self._expect(self.limits.handshake_seconds)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + _BYTES_PER_HEADER)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._has_news = True
        self._expect(self.limits.max_receive_seconds)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._has_news = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._has_news = True
        self._arrived()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        self._idle_since = time.monotonic()
        super().on_response_complete()

    # ---- bounds ----

    def _count(self, num_bytes: int) -> None:
        self._size += num_bytes
        if self._size > self.limits.max_header_bytes:
            raise _TooLargeError  # the parser passes it on as its own, which ends the connection

    def _too_large(self) -> str:
        return f"the request line and headers have more than {self.limits.max_header_bytes} bytes (max_header_bytes)"

    def _expect(self, seconds: float) -> None:
        """Ends the connection unless what is on its way has arrived in time."""
        self._arrived()
        self._arriving = self.loop.call_later(seconds, self._late, seconds)

    def _arrived(self) -> None:
        if self._arriving is not None:
            self._arriving.cancel()
            self._arriving = None

    def _late(self, seconds: float) -> None:
        if self.transport.is_closing():
            return
        if self.headers is None or (self.cycle is not None and self.cycle.response_started):
            self.transport.close()  # nothing was asked, or is answered already
        else:
            self._refuse(408, f"the request has not arrived in whole within {seconds:g} s; send it faster")

    def _make_room(self) -> bool:
        """Closes the connection that has been without a request for longest. Returns False where there is none."""
        idle = [other for other in self.connections if isinstance(other, BoundedProtocol) and other is not self]
        idle = [other for other in idle if other.is_idle and not other.transport.is_closing()]
        if not idle:
            return False
        oldest = min(idle, key=lambda other: other.idle_since)
        oldest.transport.close()
        self.connections.discard(oldest)
        return True

    def _refuse(self, status: int, text: str) -> None:
        """Answers without the application and closes the connection."""
        self._arrived()
        head = (
            f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\ncontent-type: text/plain; charset=utf-8\r\n"
            f"content-length: {len(text)}\r\nconnection: close\r\n\r\n{text}"
        )
        self.transport.write(head.encode())
        self.transport.close()


def bounded_protocol(limits: LimitsConfig, most_connections: int) -> type[BoundedProtocol]:
    """Returns the protocol of a server with these bounds. uvicorn makes one for each connection."""
    return type("BoundedProtocol", (BoundedProtocol,), {"limits": limits, "most_connections": most_connections})


def most_connections(limits: LimitsConfig) -> int:
    """Returns the maximum number of connections: the configured one, or a quarter of the limit of open files."""
    if limits.max_connections is not None:
        return limits.max_connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = hard if soft != resource.RLIM_INFINITY else soft  # the gRPC port raises the soft limit
    return MOST_CONNECTIONS if files == resource.RLIM_INFINITY else max(min(files // 4, MOST_CONNECTIONS), 1)
