"""Checks that a port can be bound, and says in one line why not."""

from __future__ import annotations

import errno
import os
import socket


class BindError(OSError):
    """The server cannot listen on its address; the text is one line that names the address and the remedy."""


def check_free(host: str, port: int) -> None:
    """Raises BindError when `port` cannot be bound. gRPC's own attempt reports no cause and writes to stderr."""
    if port == 0:
        return
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
            probe.listen(1)
    except OSError as error:
        address = address_of(host, port)
        if error.errno == errno.EADDRINUSE:
            raise BindError(
                f"port {port} is in use: someone listens on {address} already; give another port"
            ) from error
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise BindError(f"cannot listen on {address}: {reason}; give another host or port") from error


def address_of(host: str, port: int) -> str:
    """Returns HOST:PORT, an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
