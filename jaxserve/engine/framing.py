"""Messages over a stream socket: each is its length in four bytes, then its msgpack bytes."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable

_LENGTH = struct.Struct("!I")


def send_frames(connection: socket.socket, payloads: Iterable[bytes]) -> None:
    """Sends all payloads with one system call where the socket takes it."""
    connection.sendall(b"".join(part for payload in payloads for part in (_LENGTH.pack(len(payload)), payload)))


class FrameReader:
    """Splits what arrives into payloads."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._buffer = bytearray()

    def read(self) -> list[bytes] | None:
        """Every payload that is complete, waiting for at least one; None when the other end has closed."""
        while True:
            payloads = self._complete()
            if payloads:
                return payloads
            try:
                data = self._connection.recv(1 << 18)
            except ConnectionError:
                data = b""
            if not data:
                return None
            self._buffer += data

    def _complete(self) -> list[bytes]:
        payloads = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            end = start + _LENGTH.size + length
            if end > len(self._buffer):
                break
            payloads.append(bytes(self._buffer[start + _LENGTH.size : end]))
            start = end
        del self._buffer[:start]
        return payloads
