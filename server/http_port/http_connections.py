"""Bounds the connections of the HTTP port, in number and age, and the requests that are open on them.

A connection waits for its client in four places: for a request to begin, for its headers, for its body, and for its
response to be read. Each has a time, and those that wait longest make room where there are too many.
"""

from __future__ import annotations

import collections
import logging
import time
from typing import Any, Protocol

from jaxserve.config.client_limits import LimitsConfig
from jaxserve.serving.grpc_port.connections import reserve
from jaxserve.serving.sweeping import GRACE_SECONDS, LOG_SECONDS, sweep_regularly

_log = logging.getLogger("jaxserve.server")


class Connection(Protocol):
    """Connection of one client."""

    @property
    def unread_bytes(self) -> int:
        """Bytes of responses that the client has yet to take."""
        ...

    def refuse(self, status: int, message: str) -> None:
        """Answers with an error and closes the connection."""
        ...

    def abort(self) -> None:
        """Closes the connection at once."""
        ...


class HttpConnections:
    """Tracks the connections of one server.

    Args:
        limits: the bounds.
        most: connections at one time.
    """

    def __init__(self, limits: LimitsConfig, most: int):
        self._limits = limits
        self._most = most
        self._most_requests = min(limits.max_open_calls, most - reserve(most))
        self._num_requests = 0
        self._all: set[Connection] = set()
        # Since when, in this order.
        self._idle: dict[Connection, float] = {}
        self._heads: dict[Connection, float] = {}
        self._bodies: dict[Connection, float] = {}
        self._unread: dict[Connection, float] = {}
        self._num_closed: collections.Counter[str] = collections.Counter()
        self._unlogged: collections.Counter[str] = collections.Counter()
        self._last_log = -LOG_SECONDS

    # ---- what the protocol says ----

    def opened(self, connection: Connection) -> None:
        """Registers a new connection; another one may be closed to make room for it, or it is refused."""
        self._all.add(connection)
        self._heads[connection] = time.monotonic()
        if len(self._all) > self._most and not self._make_room(connection):
            self._count("max_connections")
            connection.refuse(
                503, f"{len(self._all) - 1} connections are open; at most {self._most} (max_connections) may be"
            )

    def begins(self, connection: Connection) -> None:
        """Marks a connection as one that sends headers."""
        self._idle.pop(connection, None)
        self._heads.setdefault(connection, time.monotonic())

    def has_head(self, connection: Connection) -> None:
        """Marks the headers as complete; the body follows."""
        self._heads.pop(connection, None)
        self._bodies[connection] = time.monotonic()

    def has_body(self, connection: Connection) -> None:
        """Marks the request as complete."""
        self._bodies.pop(connection, None)

    def rests(self, connection: Connection) -> None:
        """Marks a connection without a request."""
        self._idle[connection] = time.monotonic()

    def writes(self, connection: Connection) -> None:
        """Marks a connection whose client takes less than is sent."""
        self._unread[connection] = time.monotonic()

    def has_written(self, connection: Connection) -> None:
        """Marks a connection that can take more."""
        self._unread.pop(connection, None)

    def closed(self, connection: Connection) -> None:
        """Removes a connection."""
        self._all.discard(connection)
        for waiting in (self._idle, self._heads, self._bodies, self._unread):
            waiting.pop(connection, None)

    # ---- what the gate says ----

    def refusal(self) -> str:
        """Returns why no further request may be opened now; empty where one may."""
        if self._num_requests < self._most_requests:
            return ""
        return (
            f"{self._num_requests} requests are open; at most {self._most_requests} (max_open_calls, and "
            "max_connections less those kept for probes) may be: try again later"
        )

    def request_opened(self) -> None:
        """Counts a request."""
        self._num_requests += 1

    def request_closed(self) -> None:
        """Ends a request that was counted."""
        self._num_requests -= 1

    # ---- what others ask ----

    @property
    def num_open(self) -> int:
        """Number of connections."""
        return len(self._all)

    @property
    def num_requests(self) -> int:
        """Number of open requests, except probes."""
        return self._num_requests

    @property
    def num_closed(self) -> collections.Counter[str]:
        """Connections closed so far, by the setting that closed them."""
        return self._num_closed

    async def watch(self) -> None:
        """Enforces the bounds, until canceled."""
        await sweep_regularly(self.sweep, "open connections")

    def sweep(self) -> None:
        """Closes the connections that exceed a bound."""
        now, limits = time.monotonic(), self._limits
        for connection in self._overdue(self._idle, limits.max_idle_seconds, "max_idle_seconds", now):
            connection.abort()
        for connection in self._overdue(self._heads, limits.handshake_seconds, "handshake_seconds", now):
            connection.refuse(
                408, f"the headers have not arrived within {limits.handshake_seconds:g} s (handshake_seconds)"
            )
        for connection in self._overdue(self._bodies, limits.max_receive_seconds, "max_receive_seconds", now):
            connection.refuse(
                408, f"the body has not arrived within {limits.max_receive_seconds:g} s (max_receive_seconds)"
            )
        for connection in self._too_many(self._bodies, limits.max_receiving_calls, "max_receiving_calls", now):
            connection.refuse(
                429,
                f"more than {limits.max_receiving_calls} requests (max_receiving_calls) wait for their bodies, this "
                "one for longest; send it faster",
            )
        for connection in self._overdue(self._unread, limits.max_unread_seconds, "max_unread_seconds", now):
            connection.abort()
        for connection in self._too_many(self._unread, limits.max_unread_calls, "max_unread_calls", now):
            connection.abort()
        self._bound_bytes(now)
        self._tell(now)

    def _overdue(self, waiting: dict[Connection, float], seconds: float, setting: str, now: float) -> list[Connection]:
        """Removes and returns the connections that have waited for too long."""
        found = []
        for connection, since in waiting.items():
            if now - since < seconds:
                break
            found.append(connection)
        return self._taken(waiting, found, setting)

    def _too_many(self, waiting: dict[Connection, float], most: int, setting: str, now: float) -> list[Connection]:
        """Removes and returns those that have waited longest, where more than `most` wait."""
        late = [one for one, since in waiting.items() if now - since >= GRACE_SECONDS] if len(waiting) > most else []
        return self._taken(waiting, late[: max(0, len(late) - most)], setting)

    def _taken(self, waiting: dict[Connection, float], found: list[Connection], setting: str) -> list[Connection]:
        for connection in found:
            del waiting[connection]
        if setting != "max_idle_seconds":  # a client that has nothing to ask does no wrong
            self._unlogged[setting] += len(found)
            self._num_closed[setting] += len(found)
        return found

    def _bound_bytes(self, now: float) -> None:
        excess = sum(connection.unread_bytes for connection in self._unread) - self._limits.max_unread_bytes
        for connection, since in list(self._unread.items()):
            if excess <= 0 or now - since < GRACE_SECONDS:
                return
            excess -= connection.unread_bytes
            del self._unread[connection]
            self._count("max_unread_bytes")
            connection.abort()

    def _make_room(self, new: Connection) -> bool:
        """Closes the connection that is idle, or without a request's headers, for longest; returns whether there was
        one.
        """
        for waiting in (self._idle, self._heads):
            if (connection := next(iter(waiting), None)) not in (None, new):
                self.closed(connection)
                self._count("max_connections")
                connection.abort()
                return True
        return False

    def _count(self, setting: str) -> None:
        self._unlogged[setting] += 1
        self._num_closed[setting] += 1

    def _tell(self, now: float) -> None:
        if not self._unlogged.total() or now - self._last_log < LOG_SECONDS:
            return
        self._last_log = now
        for setting, count in (+self._unlogged).items():
            value: Any = getattr(self._limits, setting)
            value = self._most if value is None else value
            _log.warning(
                "%d HTTP connections closed by %s = %s (%d so far)", count, setting, value, self._num_closed[setting]
            )
        self._unlogged.clear()
