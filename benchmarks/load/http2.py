"""Server-streaming gRPC calls over one HTTP/2 connection, for a load generator that shares its cores with the server.

A general gRPC client takes 75 microseconds a message here, as much as the server itself. This one takes in what the
socket holds, cuts it into frames and notes the time: about 3. It does what a server of ours can make it do and no more:
no TLS, no compression, no requests that stream. Frames: RFC 9113; header blocks: RFC 7541; messages in DATA frames:
https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
import urllib.parse
from collections import deque
from collections.abc import Callable

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
_END_STREAM, _ACK, _END_HEADERS, _PADDED, _PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
_HEADER_TABLE_SIZE, _MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE = 1, 3, 4, 5
_DEFAULT_WINDOW = 65_535
_MOST_WINDOW = 2**31 - 1
_REFUSED_STREAM = 7
_RETRY_SECONDS = 0.01


class Http2Error(ConnectionError):
    """The peer broke the protocol, or did what this client does not know."""


@dataclasses.dataclass(eq=False)
class Stream:
    """One call. number: 0 until it is sent. body: its message, of which to_send is left. chunks: (time of arrival,
    bytes) of each DATA frame. status: gRPC's, None until the stream has ended. trailers: metadata that came with it.

    pause: seconds for which the reader stops after it has read; what it has read is acknowledged only then, so that the
    peer may send no more than the connection's window meanwhile.
    """

    number: int
    pause: float
    done: asyncio.Future[None]
    body: memoryview
    window: int
    to_send: memoryview = dataclasses.field(default_factory=lambda: memoryview(b""))
    chunks: list[tuple[float, bytes]] = dataclasses.field(default_factory=list)
    status: int | None = None
    message: str = ""
    trailers: dict[bytes, bytes] = dataclasses.field(default_factory=dict)
    ended: float = 0.0
    unread: int = 0


class Connection(asyncio.Protocol):
    """Calls of one method, as many at once as the peer allows; further ones wait here.

    authority: HOST:PORT. path: /PACKAGE.SERVICE/METHOD. window: bytes that the peer may send of one stream before it is
    told that they were read; streams without a pause are told at once, which with the greatest window is never needed.
    """

    def __init__(self, authority: str, path: str, window: int = _MOST_WINDOW):
        self._headers = request_headers(authority, path)
        self._own_window = window
        self._streams: dict[int, Stream] = {}
        self._queued: deque[Stream] = deque()
        self._peer_streams = _MOST_WINDOW
        self._next = 1
        self._rest = b""
        self._waiting: deque[Stream] = deque()
        self._peer_window = _DEFAULT_WINDOW
        self._peer_stream_window = _DEFAULT_WINDOW
        self._peer_frame = 16_384
        self._ready = asyncio.get_running_loop().create_future()
        self._lost = ""

    async def wait_ready(self) -> None:
        """Returns when the peer has answered with its settings."""
        await self._ready

    def start(self, payload: bytes, pause: float = 0.0) -> Stream:
        """Sends a request message (without gRPC's prefix) and returns its stream, whose `done` is set at its end."""
        future = asyncio.get_running_loop().create_future()
        body = memoryview(b"\0" + len(payload).to_bytes(4, "big") + payload)
        stream = Stream(0, pause, future, body, 0)
        if self._lost:
            self._end(stream, 14, self._lost)
            return stream
        self._queued.append(stream)
        self._open_queued()
        return stream

    def close(self) -> None:
        self._transport.close()

    # ---- asyncio.Protocol ----

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(_PREFACE)
        settings = ((_HEADER_TABLE_SIZE, 0), (_INITIAL_WINDOW_SIZE, self._own_window))
        values = b"".join(name.to_bytes(2, "big") + value.to_bytes(4, "big") for name, value in settings)
        self._write(_SETTINGS, 0, 0, values)
        self._write(_WINDOW_UPDATE, 0, 0, (_MOST_WINDOW - _DEFAULT_WINDOW).to_bytes(4, "big"))

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        buffer = self._rest + data if self._rest else data
        streams = self._streams
        size, position = len(buffer), 0
        while size - position >= 9:
            end = position + 9 + int.from_bytes(buffer[position : position + 3], "big")
            if end > size:
                break
            kind, flags = buffer[position + 3], buffer[position + 4]
            number = int.from_bytes(buffer[position + 5 : position + 9], "big")
            if kind == _DATA and not flags and number in streams:  # the one frequent frame
                stream = streams[number]
                stream.chunks.append((now, buffer[position + 9 : end]))
                if stream.pause:
                    self._read_later(stream, end - position - 9)
            else:
                self._take(kind, flags, number, buffer[position + 9 : end], now)
            position = end
        self._rest = buffer[position:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost = self._lost or f"the connection was lost: {exc or 'closed'}"
        queued, self._queued = self._queued, deque()
        for stream in (*self._streams.values(), *queued):
            self._end(stream, 14, self._lost)
        if not self._ready.done():
            self._ready.set_exception(Http2Error(self._lost))

    # ---- frames ----

    def _take(self, kind: int, flags: int, number: int, body: bytes, now: float) -> None:
        if flags & _PADDED and kind in (_DATA, _HEADERS):
            body = body[1 : len(body) - body[0]]
        match kind:
            case 4 if not flags & _ACK:
                self._take_settings(body)
            case 6 if not flags & _ACK:
                self._write(_PING, _ACK, 0, body)
            case 8:
                self._take_window(number, int.from_bytes(body, "big"))
            case 7:
                self._lost = f"the server goes away: {body[8:].decode(errors='replace')}"
            case 0 | 1 | 3 if number in self._streams:
                self._take_of_stream(kind, flags, self._streams[number], body, now)
            case 9:
                raise Http2Error("a header block in several frames")

    def _take_of_stream(self, kind: int, flags: int, stream: Stream, body: bytes, now: float) -> None:
        if kind == _DATA:
            stream.chunks.append((now, body))
        elif kind == _RST_STREAM and int.from_bytes(body, "big") == _REFUSED_STREAM:
            # Not processed, says the protocol: the peer had not done away with another that has ended.
            del self._streams[stream.number]
            self._queued.appendleft(stream)
            asyncio.get_running_loop().call_later(_RETRY_SECONDS, self._open_queued)
            return
        elif kind == _RST_STREAM:
            self._end(stream, stream.status or 13, f"reset with code {int.from_bytes(body, 'big')}")
            return
        else:
            if flags & _PRIORITY:
                body = body[5:]
            fields = literal_fields(body)
            if b"grpc-status" in fields:
                stream.status = int(fields[b"grpc-status"])
                stream.trailers = fields
                stream.message = urllib.parse.unquote(fields.get(b"grpc-message", b"").decode())
        if flags & _END_STREAM:
            status = 2 if stream.status is None else stream.status
            self._end(stream, status, stream.message)

    def _take_settings(self, body: bytes) -> None:
        for place in range(0, len(body), 6):
            name = int.from_bytes(body[place : place + 2], "big")
            value = int.from_bytes(body[place + 2 : place + 6], "big")
            if name == _INITIAL_WINDOW_SIZE:
                for stream in self._streams.values():
                    stream.window += value - self._peer_stream_window
                self._peer_stream_window = value
            elif name == _MAX_CONCURRENT_STREAMS:
                self._peer_streams = value
            elif name == _MAX_FRAME_SIZE:
                self._peer_frame = value
        self._write(_SETTINGS, _ACK, 0, b"")
        if not self._ready.done():
            self._ready.set_result(None)
        self._open_queued()
        self._send_waiting()

    def _take_window(self, number: int, more: int) -> None:
        if not number:
            self._peer_window += more
        elif number in self._streams:
            self._streams[number].window += more
        self._send_waiting()

    def _open_queued(self) -> None:
        """Sends the requests that the peer's number of streams allows."""
        while self._queued and len(self._streams) < self._peer_streams:
            stream = self._queued.popleft()
            stream.number, stream.window, stream.to_send = self._next, self._peer_stream_window, stream.body
            self._next += 2
            self._streams[stream.number] = stream
            self._write(_HEADERS, _END_HEADERS, stream.number, self._headers)
            self._waiting.append(stream)
            self._send_waiting()

    def _send_waiting(self) -> None:
        """Sends what the windows allow; a stream whose own window is closed does not hold up the others."""
        for _ in range(len(self._waiting)):
            stream = self._waiting.popleft()
            while stream.to_send:
                size = min(len(stream.to_send), self._peer_frame, stream.window, self._peer_window)
                if size <= 0:
                    self._waiting.append(stream)
                    break
                part, stream.to_send = stream.to_send[:size], stream.to_send[size:]
                stream.window -= size
                self._peer_window -= size
                self._write(_DATA, 0 if stream.to_send else _END_STREAM, stream.number, bytes(part))

    def _read_later(self, stream: Stream, size: int) -> None:
        if not stream.unread:
            asyncio.get_running_loop().call_later(stream.pause, self._read, stream)
        stream.unread += size

    def _read(self, stream: Stream) -> None:
        size, stream.unread = stream.unread, 0
        if stream.number in self._streams and not self._transport.is_closing():
            self._write(_WINDOW_UPDATE, 0, stream.number, size.to_bytes(4, "big"))

    def _end(self, stream: Stream, status: int, message: str) -> None:
        self._streams.pop(stream.number, None)
        stream.status, stream.message, stream.ended = status, message, time.perf_counter()
        stream.to_send = stream.to_send[:0]
        if not stream.done.done():
            stream.done.set_result(None)
        self._open_queued()

    def _write(self, kind: int, flags: int, number: int, body: bytes) -> None:
        head = len(body).to_bytes(3, "big") + bytes((kind, flags)) + number.to_bytes(4, "big")
        self._transport.write(head + body)


async def connect(address: str, path: str, window: int = _MOST_WINDOW) -> Connection:
    """A connection to HOST:PORT that the server has accepted. Raises OSError where there is none."""
    host, _, port = address.rpartition(":")
    made: Callable[[], Connection] = lambda: Connection(address, path, window)  # noqa: E731
    _, connection = await asyncio.get_running_loop().create_connection(made, host.strip("[]"), int(port))
    await connection.wait_ready()
    return connection


def messages(chunks: list[tuple[float, bytes]]) -> list[tuple[float, bytes]]:
    """gRPC messages from the DATA frames of a stream; a message arrives with its last byte.

    Raises Http2Error where one is compressed or cut off.
    """
    found = []
    rest = b""
    for moment, data in chunks:
        rest += data
        while len(rest) >= 5:
            end = 5 + int.from_bytes(rest[1:5], "big")
            if rest[0]:
                raise Http2Error("a message is compressed")
            if len(rest) < end:
                break
            found.append((moment, rest[5:end]))
            rest = rest[end:]
    if rest:
        raise Http2Error(f"the last message is cut off after {len(rest)} bytes")
    return found


def request_headers(authority: str, path: str) -> bytes:
    """The header block of a gRPC call: literal fields without indexing, so that the peer's table stays empty."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": authority,
        "te": "trailers",
        "content-type": "application/grpc",
    }
    block = b""
    for name, value in fields.items():
        block += b"\0" + b"".join(_integer(len(text), 7) + text.encode() for text in (name, value))
    return block


def literal_fields(block: bytes) -> dict[bytes, bytes]:
    """The fields of a header block that are spelled out; indexed ones, and Huffman-coded values, are passed over."""
    fields: dict[bytes, bytes] = {}
    place = 0
    while place < len(block):
        first = block[place]
        if first & 0x80:  # name and value from a table
            _, place = _read_integer(block, place, 7)
            continue
        if first & 0xE0 == 0x20:  # a new size of the table
            _, place = _read_integer(block, place, 5)
            continue
        index, place = _read_integer(block, place, 6 if first & 0x40 else 4)
        name, place = (b"", place) if index else _read_string(block, place)
        value, place = _read_string(block, place)
        if name is not None and value is not None:
            fields[name] = value
    return fields


def _integer(value: int, bits: int) -> bytes:
    most = (1 << bits) - 1
    if value < most:
        return bytes((value,))
    digits = [most]
    value -= most
    while value >= 128:
        digits.append(128 | value & 127)
        value >>= 7
    return bytes((*digits, value))


def _read_integer(block: bytes, place: int, bits: int) -> tuple[int, int]:
    most = (1 << bits) - 1
    value = block[place] & most
    place += 1
    if value < most:
        return value, place
    shift = 0
    while True:
        value += (block[place] & 127) << shift
        place += 1
        shift += 7
        if not block[place - 1] & 128:
            return value, place


def _read_string(block: bytes, place: int) -> tuple[bytes | None, int]:
    """The string, None where it is Huffman-coded, and the place after it."""
    coded = block[place] & 0x80
    length, place = _read_integer(block, place, 7)
    return (None if coded else block[place : place + length]), place + length
