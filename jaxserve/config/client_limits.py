"""Bounds what clients may hold open at the server, as a frozen dataclass that validates itself.

Standard library only; server/grpc_port/calls.py and server/grpc_port/connections.py say how each bound is kept.
"""

from __future__ import annotations

import dataclasses

from jaxserve.config.checks import at_least, number


@dataclasses.dataclass(frozen=True)
class LimitsConfig:
    """Bounds what clients may hold open, in number, bytes and age. Health checks are answered whatever else is at its
    limit.

    max_connections: connections at one time; a share of them is kept for probes. Connections without calls make room
    for new ones, the longest idle first; None takes what the limit of open files allows, at most 4,096.
    max_streams_per_connection: calls of one connection; clients queue further ones themselves, and those of one that
    does not are refused by HTTP/2 (UNAVAILABLE), as gRPC's now and then are. It lies above max_open_calls, so that a
    call too many is refused with a reason before.
    max_open_calls: calls of all connections; further ones are refused. It should be above max_num_seqs +
    max_num_waiting, which bound the requests among them.
    max_unread_calls, max_unread_bytes, max_unread_seconds: calls with an answer that the client does not take, their
    bytes together, and how long one message may wait. Those that waited longest are cancelled.
    max_receiving_calls, max_receive_seconds: calls whose request message has not arrived in whole, beyond their first
    second, and how long it may take. Each may hold max_message_bytes.
    max_metadata_bytes: of a call's metadata; larger ones are refused before they are kept.
    max_health_watches: calls of Health.Watch at one time; each is ended after an hour.
    max_idle_seconds: a connection without calls is closed after so long.
    keepalive_seconds, keepalive_timeout_seconds: how often a silent peer is asked for a sign of life, and how long it
    may take to answer; then the connection is closed.
    handshake_seconds: how long a new connection may take to speak HTTP/2.
    """

    max_connections: int | None = None
    max_streams_per_connection: int = 10_240
    max_open_calls: int = 8192
    max_unread_calls: int = 1024
    max_unread_bytes: int = 64 * 1024 * 1024
    max_unread_seconds: float = 60.0
    max_receiving_calls: int = 64
    max_receive_seconds: float = 30.0
    max_metadata_bytes: int = 16 * 1024
    max_health_watches: int = 256
    max_idle_seconds: float = 300.0
    keepalive_seconds: float = 30.0
    keepalive_timeout_seconds: float = 20.0
    handshake_seconds: float = 10.0

    def __post_init__(self) -> None:
        if self.max_connections is not None:
            at_least("max_connections", self.max_connections, 8)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_seconds"):
                _duration(field.name, value)
            elif field.name != "max_connections":
                at_least(field.name, value, 1)


def _duration(name: str, seconds: float) -> None:
    """Raises ValueError unless `seconds` is from a tenth of a second to a day."""
    number(name, seconds)
    if not 0.1 <= seconds <= 86_400:
        raise ValueError(f"{name} is {seconds}; it must be from 0.1 to 86400 seconds")
