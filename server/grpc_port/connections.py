"""Reserves connections, so that a health probe can connect while other clients hold as many as they can.

gRPC refuses connections over a limit. That alone lets idle connections keep all other clients out. So some are kept
free: calls may occupy all but a reserve, and when half of the reserve is taken, connections without calls are closed
until half is free again; first those that never had a call, then the others, longest idle first. gRPC does not expose
its connections, but they are file descriptors of this process.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import resource
import socket
import stat
import time
from collections.abc import Iterator

from jaxserve.serving.grpc_port.calls import OpenCalls

_log = logging.getLogger("jaxserve.server")

MOST_CONNECTIONS = 4096
"""Maximum number of connections where the configuration leaves it to the limit of open files."""

SPARE_DESCRIPTORS = 24
"""Descriptors reserved besides connections: the engine's socket, pipes, files, and a few short-lived ones."""

FEWEST_CONNECTIONS = 8
_DESCRIPTORS = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
_MOST_RESERVED = 128

# How often the descriptors are counted, and how often while connections are closed, when gRPC accepts thousands a
# second. There are no more connections than descriptors, so that few of these are looked at one by one now and then
# only, to know which are used; thousands are less often, so that it takes a small share of a core.
_COUNT_SECONDS = 0.02
_BUSY_SCAN_SECONDS = 0.005
_SCAN_SECONDS = 0.2
_SCAN_SHARE = 0.02
_LOG_SECONDS = 10.0


class DescriptorError(OSError):
    """The limit of open files is too low; the text is one line with the remedy."""


def connection_limit(wanted: int | None, num_ports: int = 1) -> int:
    """Returns the maximum number of connections of each port: `wanted`, or what the limit of open files allows.

    Raises this process's soft limit to the hard one. Raises DescriptorError when too few descriptors are left.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError) as error:  # macOS allows less than its hard limit says
            _log.info("the limit of open files stays at %d: %s", soft, error)
    needed = len(_descriptors()) + SPARE_DESCRIPTORS
    room = MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else (soft - needed) // num_ports
    least = wanted or FEWEST_CONNECTIONS
    if room < least:
        raise DescriptorError(
            f"the limit of open files is {soft}; the server needs {needed} and one for each of at least "
            f"{least * num_ports} connections: raise the limit (ulimit -n {needed + least * num_ports})"
            + (" or lower max_connections" * bool(wanted)),
        )
    return wanted or min(room, MOST_CONNECTIONS)


def reserve(limit: int) -> int:
    """Returns how many of `limit` connections are reserved for probes: half kept free, half so that no probe is cut
    off.
    """
    return min(limit // 2, _MOST_RESERVED)


@dataclasses.dataclass(eq=False, slots=True)
class _Connection:
    """Tracks an accepted connection.

    since: when it was seen first or had a call last; used: whether it ever had one.
    """

    descriptor: int
    inode: int
    peer: str
    since: float
    used: bool = False


class ConnectionGuard:
    """Closes idle connections of the server on `port` when more than `most` are open."""

    def __init__(self, port: int, most: int, calls: OpenCalls):
        self._port = port
        self._most = most
        self._calls = calls
        self._known: dict[int, _Connection | None] = {}  # by inode; None where it is no connection of ours
        self._num_closed = 0
        self._num_logged = 0
        self._last_log = -_LOG_SECONDS

    async def watch(self) -> None:
        """Enforces the bound, until canceled."""
        due = 0.0
        while True:
            before, closed = time.thread_time(), 0
            try:
                if time.monotonic() >= due or _num_descriptors() > self._most:
                    due = time.monotonic() + _SCAN_SECONDS
                    closed = self.make_room()
            except Exception:  # room must be made for as long as the server lives
                _log.exception("the server's connections could not be checked")
            rest = min(max(_COUNT_SECONDS, (time.thread_time() - before) / _SCAN_SHARE), _SCAN_SECONDS)
            await asyncio.sleep(_BUSY_SCAN_SECONDS if closed else rest)

    def make_room(self) -> int:
        """Closes idle connections until the bound is met; returns how many were closed."""
        now = time.monotonic()
        found = {connection.inode: connection for connection in self._scan(now)}
        used = self._calls.take_used()
        idle = []
        for connection in found.values():
            active = self._calls.has_calls(connection.peer)
            if active or connection.peer in used:
                connection.used, connection.since = True, now
            if not active:
                idle.append(connection)
        excess = max(0, len(found) - self._most)
        idle.sort(key=lambda connection: (connection.used, connection.since, connection.inode))
        closed = sum(_shut(connection) for connection in idle[:excess])
        self._num_closed += closed
        self._tell(now)
        return closed

    def _scan(self, now: float) -> Iterator[_Connection]:
        """Yields the server's connections."""
        seen: dict[int, _Connection | None] = {}
        for descriptor in _descriptors():
            try:
                status = os.fstat(descriptor)
            except OSError:
                continue  # closed meanwhile
            if not stat.S_ISSOCK(status.st_mode):
                continue
            inode = status.st_ino
            if inode in self._known:
                connection = self._known[inode]
            else:
                peer = _peer(descriptor, self._port)
                connection = None if peer is None else _Connection(descriptor, inode, peer, now)
            seen[inode] = connection
            if connection is not None:
                yield connection
        self._known = seen

    def _tell(self, now: float) -> None:
        if self._num_closed > self._num_logged and now - self._last_log >= _LOG_SECONDS:
            _log.warning(
                "%d idle connections closed to make room for new ones (%d so far); the server keeps %d",
                self._num_closed - self._num_logged,
                self._num_closed,
                self._most,
            )
            self._num_logged, self._last_log = self._num_closed, now


def _descriptors() -> list[int]:
    """Returns the open descriptors of this process."""
    return [int(name) for name in os.listdir(_DESCRIPTORS)]


def _num_descriptors() -> int:
    return len(os.listdir(_DESCRIPTORS))


def _peer(descriptor: int, port: int) -> str | None:
    """Returns gRPC's name of the peer, or None where the descriptor is no connection accepted on the port."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as copy:
            if copy.family not in (socket.AF_INET, socket.AF_INET6) or copy.type != socket.SOCK_STREAM:
                return None
            if copy.getsockname()[1] != port:
                return None
            host, peer_port = copy.getpeername()[:2]
    except OSError:  # it listens, or was closed meanwhile
        return None
    if copy.family == socket.AF_INET6 and not host.startswith("::ffff:"):
        return f"ipv6:%5B{host}%5D:{peer_port}"
    return f"ipv4:{host.removeprefix('::ffff:')}:{peer_port}"


def _shut(connection: _Connection) -> bool:
    """Ends a connection as if its peer had; gRPC then closes the descriptor.

    Returns False where it was closed already.
    """
    try:
        with socket.socket(fileno=os.dup(connection.descriptor)) as copy:
            if os.fstat(copy.fileno()).st_ino != connection.inode:
                return False  # the number was given to another one
            copy.shutdown(socket.SHUT_RDWR)
    except OSError:
        return False
    return True
