"""Speaks HTTP/1.1 on one connection: uvicorn's protocol, with bounds on what a client may send and hold open."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from jaxserve.config.client_limits import LimitsConfig
from jaxserve.serving.http_port.errors import HttpError, error_answer
from jaxserve.serving.http_port.http_connections import HttpConnections

_MOST_UNSENT = 64 * 1024
"""Bytes that the system queues for one connection, besides those on their way."""


def protocol_factory(
    connections: HttpConnections, limits: LimitsConfig, max_header_bytes: int
) -> Callable[..., BoundedProtocol]:
    """Returns what makes the protocol of a new connection, as uvicorn calls it."""

    def make(**arguments: Any) -> BoundedProtocol:
        return BoundedProtocol(connections, limits, max_header_bytes, **arguments)

    return make


class BoundedProtocol(HttpToolsProtocol):
    """Adds bounds to uvicorn's protocol: of header bytes, and of time through `HttpConnections`."""

    def __init__(self, tracked: HttpConnections, limits: LimitsConfig, max_header_bytes: int, **arguments: Any):
        super().__init__(**arguments)
        self._tracked = tracked
        self._limits = limits
        self._max_header_bytes = max_header_bytes
        self._head_bytes = 0
        self._unseen_bytes = 0  # since the parser last passed something on: what it keeps, of a trailer say
        self._has_news = False
        self._in_head = True
        self._in_body = False
        self._refused = False

    # ---- what HttpConnections asks ----

    @property
    def unread_bytes(self) -> int:
        return self.transport.get_write_buffer_size()

    def refuse(self, status: int, message: str) -> None:
        """Answers with an error, unless a response has begun, and closes the connection."""
        if self._refused:
            return
        self._refused = True
        answering = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if self.transport.is_closing() or answering:
            self.transport.abort()
            return
        answer = error_answer(HttpError(status, message))
        self.transport.write(
            b"%bcontent-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%b"
            % (STATUS_LINE[status], len(answer.body), answer.body)
        )
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def abort(self) -> None:
        self.transport.abort()

    # ---- asyncio.Protocol ----

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._set_options(transport.get_extra_info("socket"))
        self._tracked.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._tracked.closed(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.parser is None:  # the connection is lost
            return
        self._unset_keepalive_if_required()
        self._has_news = False
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self.refuse(400, "the connection cannot be upgraded; this port speaks HTTP/1.1 alone")
            return
        except httptools.HttpParserError as error:
            self.refuse(400, f"the request is no HTTP: {error}")
            return
        if self._in_head:
            self._head_bytes += len(data)
        self._unseen_bytes = 0 if self._has_news else self._unseen_bytes + len(data)
        if max(self._head_bytes, self._unseen_bytes) > self._max_header_bytes:
            self.refuse(
                431,
                f"request line and headers have over {self._max_header_bytes} bytes (max_header_bytes); send fewer",
            )

    def pause_writing(self) -> None:
        super().pause_writing()
        self._tracked.writes(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._tracked.has_written(self)

    # ---- the parser ----

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._tracked.begins(self)
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:
            super().on_header(name, value)
        else:  # a trailer, which nobody asks for: it is counted and not kept
            self._head_bytes += len(name) + len(value) + 4

    def on_headers_complete(self) -> None:
        self._has_news = True
        self._in_head = False
        self._in_body = True
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        self._head_bytes = size
        if size > self._max_header_bytes:
            return  # data_received refuses it
        self._tracked.has_head(self)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._has_news = True
        if self._head_bytes <= self._max_header_bytes:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._in_body = False
        self._tracked.has_body(self)
        if self._head_bytes > self._max_header_bytes:
            return
        super().on_message_complete()
        if self.cycle.response_complete:
            self._tracked.rests(self)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.pipeline and not self._in_body and not self.transport.is_closing():
            self._tracked.rests(self)

    def _set_options(self, connection: socket.socket | None) -> None:
        """Lets the system ask silent peers for a sign of life, give up those that do not answer, and queue little for
        those that do not read: it would take megabytes before a slow reader is noticed.
        """
        if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
            return
        every, patience = round(self._limits.keepalive_seconds), self._limits.keepalive_timeout_seconds
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # asyncio leaves it off for connections of a socket that it did not make, and each event then waits 40 ms.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for name, value in (
            ("TCP_KEEPIDLE", max(1, every)),
            ("TCP_KEEPINTVL", max(1, round(patience / 4))),
            ("TCP_KEEPCNT", 4),
            ("TCP_NOTSENT_LOWAT", _MOST_UNSENT),
        ):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
