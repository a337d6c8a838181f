"""An HTTP/2 client that does to a server what no gRPC client would."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import grpc

from benchmarks.load import http2
from tests.server.fakes import WAIT_SECONDS

HEALTH = "/grpc.health.v1.Health/"
JAXSERVE = "/jaxserve.v1.JaxServe/"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"

_DATA, _HEADERS = 0, 1
_END_STREAM, _END_HEADERS = 0x1, 0x4


def message(data: bytes, flag: int = 0, length: int | None = None) -> bytes:
    """A gRPC message with its prefix, which may lie about its length and its compression."""
    return bytes([flag]) + (len(data) if length is None else length).to_bytes(4, "big") + data


def send(
    connection: http2.Connection,
    path: str,
    parts: Sequence[bytes] = (),
    fields: Sequence[tuple[bytes, bytes]] = (),
    end: bool = True,
) -> http2.Stream:
    """Begins a call whose DATA frames are these parts, whatever they hold; without `end` it stays open for more."""
    future = asyncio.get_running_loop().create_future()
    stream = http2.Stream(connection._next, 0.0, future, memoryview(b"".join(parts)), 0)
    connection._next += 2
    connection._streams[stream.number] = stream
    block = http2.request_headers("test", path)
    block += b"".join(bytes([0, len(name)]) + name + bytes([len(value)]) + value for name, value in fields)
    connection._write(_HEADERS, _END_HEADERS | (_END_STREAM if end and not parts else 0), stream.number, block)
    for place, part in enumerate(parts):
        connection._write(_DATA, _END_STREAM if end and place == len(parts) - 1 else 0, stream.number, part)
    return stream


@contextlib.asynccontextmanager
async def connected(address: str, window: int = 2**31 - 1, path: str = JAXSERVE + "Generate"):
    """A connection; with a window of 0 the server can send nothing that the client would have to read."""
    connection = await http2.connect(address, path, window)
    try:
        yield connection
    finally:
        connection.close()
        await asyncio.sleep(0)


async def ended(stream: http2.Stream) -> tuple[grpc.StatusCode, str]:
    """How a call ends."""
    await asyncio.wait_for(asyncio.shield(stream.done), WAIT_SECONDS)
    return next(code for code in grpc.StatusCode if code.value[0] == stream.status), stream.message


class Peer(asyncio.Protocol):
    """A connection that says nothing, or, with `greet`, begins HTTP/2, confirms the server's settings and stops."""

    def __init__(self, greet: bool):
        self._greet = greet
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        if self._greet:
            empty_settings, confirmation = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]), bytes([0, 0, 0, 4, 1, 0, 0, 0, 0])
            transport.write(http2._PREFACE + empty_settings + confirmation)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set_result(None)


@contextlib.asynccontextmanager
async def silent_peers(address: str, count: int, greet: bool) -> AsyncIterator[list[Peer]]:
    """Connections that make no call and answer no ping."""
    host, _, port = address.rpartition(":")
    loop = asyncio.get_running_loop()
    peers: list[Peer] = []
    try:
        for _ in range(count):
            _, peer = await loop.create_connection(lambda: Peer(greet), host.strip("[]"), int(port))
            peers.append(peer)
        yield peers
    finally:
        for peer in peers:
            peer.transport.close()
        await asyncio.gather(*(peer.closed for peer in peers))
