"""Finds out what answers at an address, to say what is wrong with a call that failed: another protocol, or TLS."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import ssl

_SECONDS = 2.0
_REQUEST = b"GET /health HTTP/1.1\r\nHost: probe\r\nConnection: close\r\n\r\n"


@dataclasses.dataclass(frozen=True)
class ProbeAnswer:
    """Describes what answers.

    Attributes:
        protocol: "http", "grpc", or "" for what speaks neither.
        tls: whether connections are encrypted.
    """

    protocol: str
    tls: bool


def probe(host: str, port: int) -> ProbeAnswer | None:
    """Returns what answers at an address; None where nobody takes connections. Takes a few seconds at most."""
    try:
        with socket.create_connection((host, port), _SECONDS) as connection:
            tls, protocol = _tls_protocol(connection, host)
        if tls and protocol:
            return ProbeAnswer(protocol, tls)
        connection = socket.create_connection((host, port), _SECONDS)
        with _encrypted(connection, host, []) if tls else connection as either:
            return ProbeAnswer(_protocol(either), tls)
    except OSError:
        return None


def _encrypted(connection: socket.socket, host: str, protocols: list[str]) -> ssl.SSLSocket:
    """Begins TLS without any check: nothing is sent but the question what answers."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if protocols:
        context.set_alpn_protocols(protocols)
    return context.wrap_socket(connection, server_hostname=host)


def _tls_protocol(connection: socket.socket, host: str) -> tuple[bool, str]:
    """Returns whether the server speaks TLS, and the protocol that it chooses there."""
    try:
        with _encrypted(connection, host, ["h2", "http/1.1"]) as encrypted:
            return True, {"h2": "grpc", "http/1.1": "http"}.get(encrypted.selected_alpn_protocol() or "", "")
    except OSError:
        return False, ""


def _protocol(connection: socket.socket) -> str:
    received = b""
    with contextlib.suppress(OSError):
        connection.sendall(_REQUEST)
        while len(received) < 9 and (more := connection.recv(256)):
            received += more
    if received.startswith(b"HTTP/1"):
        return "http"
    # An HTTP/2 server begins with a SETTINGS frame: a length of three bytes, type 4, and stream 0.
    return "grpc" if len(received) >= 9 and received[3] == 4 and received[5:9] == bytes(4) else ""
