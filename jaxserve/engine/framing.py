"""Frames messages over a stream socket: each is its length in four bytes, then its msgpack bytes."""

from __future__ import annotations

import queue
import socket
import struct
import threading
from collections.abc import Iterable

_LENGTH = struct.Struct("!I")


class FrameSender:
    """Sends payloads in order without ever waiting for the other end.

    `send` hands the socket what it takes at once, in the caller's thread: no hand-over between threads while the reader
    keeps up. What the socket does not take, a thread sends as the reader makes room, and whatever is sent meanwhile
    queues behind it. The queue is bounded by what is sent: an engine has no more to say than the outputs of its
    unfinished requests, and a front end looks at `queued_bytes` before it takes another request.
    """

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._behind: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._queued = 0  # bytes in `_behind` that are not sent yet
        self._error: OSError | None = None
        self._thread: threading.Thread | None = None

    def send(self, payloads: Iterable[bytes]) -> None:
        """Sends or queues all payloads. Raises the OSError that ended the connection."""
        data = frames(payloads)
        with self._lock:
            if self._error is not None:
                raise self._error
            if not self._queued:
                data = self._send_now(data)
            if data:
                self._queued += len(data)
                self._behind.put(data)
                if self._thread is None:
                    self._thread = threading.Thread(target=self._send_rest, name="frame sender", daemon=True)
                    self._thread.start()

    @property
    def queued_bytes(self) -> int:
        """Returns the bytes that wait for the other end to make room."""
        return self._queued

    def close(self, seconds: float) -> None:
        """Gives the sending thread up to `seconds` to send what is queued; the socket stays open."""
        if self._thread is not None:
            self._behind.put(None)
            self._thread.join(seconds)

    def _send_now(self, data: bytes) -> bytes:
        """Sends what the socket takes at once; returns the rest."""
        try:
            return data[self._connection.send(data, socket.MSG_DONTWAIT) :]
        except BlockingIOError:
            return data

    def _send_rest(self) -> None:
        while (data := self._behind.get()) is not None:
            try:
                self._connection.sendall(data)
            except OSError as error:
                self._error = error
                return
            with self._lock:
                self._queued -= len(data)


class FrameReader:
    """Splits received bytes into payloads."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._buffer = bytearray()

    def read(self) -> list[bytes] | None:
        """Returns every complete payload, waiting for at least one; None when the other end has closed."""
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

    def poll(self) -> list[bytes] | None:
        """Returns the complete payloads that have arrived, without ever waiting; None when the other end has closed."""
        try:
            data = self._connection.recv(1 << 18, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return self._complete()
        except ConnectionError:
            data = b""
        self._buffer += data
        # What came before the end is delivered first; the end is still there the next time.
        return self._complete() or (None if not data else [])

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


def frames(payloads: Iterable[bytes]) -> bytes:
    """Returns the payloads as bytes on the wire."""
    return b"".join([part for payload in payloads for part in (_LENGTH.pack(len(payload)), payload)])
