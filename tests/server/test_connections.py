"""Connections are bounded in number and age, and a probe gets in whatever others hold open."""

import asyncio
import contextlib
import resource
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxserve.config.client_limits import LimitsConfig
from jaxserve.serving import memory_return
from jaxserve.serving.clients.grpc_client import AsyncClient, generate_request
from jaxserve.serving.grpc_port import connections
from jaxserve.serving.grpc_port.connections import DescriptorError, connection_limit, reserve
from jaxserve.serving.grpc_port.grpc_server import GrpcServer
from jaxserve.serving.served_model import ServedModel
from tests.server import raw_http2
from tests.server.fakes import WAIT_SECONDS, save_tokenizer
from tests.server.harness import GREEDY, MAX_MESSAGE_BYTES, Served, health_of, run_served
from tests.server.process import Process
from tests.server.raw_http2 import HEALTH, JAXSERVE

Code = grpc.StatusCode
PAYLOAD = generate_request("abc", GREEDY).SerializeToString()


async def reaches(condition) -> None:
    while not condition():  # noqa: ASYNC110  nothing tells
        await asyncio.sleep(0.01)


async def probe(address: str, tries: int = 100) -> None:
    """A new connection that asks for health; one that comes in the midst of a crowd may be refused at first."""
    for left in reversed(range(tries)):
        # Channels of one process share connections, and the pauses after one that failed, unless told otherwise.
        async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            try:
                answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
            except grpc.aio.AioRpcError:
                if not left:
                    raise
                await asyncio.sleep(0.02)
            else:
                assert answer.status == health_pb2.HealthCheckResponse.SERVING
                return


# ---- age ----


@pytest.mark.parametrize("greet", [True, False])
@pytest.mark.parametrize(
    "limits",
    [
        LimitsConfig(max_idle_seconds=0.5),
        LimitsConfig(keepalive_seconds=0.3, keepalive_timeout_seconds=0.3),
        LimitsConfig(handshake_seconds=0.5),
    ],
    ids=["idle", "keepalive", "handshake"],
)
def test_fault_31_silent_connections_are_closed(tokenizer, greet, limits):
    """Half-open ones too: a peer that vanished does not answer a ping."""

    async def body(served: Served) -> None:
        async with raw_http2.silent_peers(served.address, 5, greet) as peers:
            if limits.handshake_seconds < 1 and greet:  # it has shaken hands
                await asyncio.sleep(1.0)
                assert not any(peer.closed.done() for peer in peers)
                return
            await asyncio.wait_for(asyncio.gather(*(asyncio.shield(peer.closed) for peer in peers)), WAIT_SECONDS)
        assert await health_of(served.address) == "SERVING"

    run_served(body, tokenizer, limits=limits)


def test_a_connection_with_a_call_is_not_idle(tokenizer):
    async def body(served: Served) -> None:
        served.engine.pause()
        answer = asyncio.ensure_future(served.client.generate_text("abc", GREEDY))
        await served.until(served.engine.wait_for_requests, 1)
        await asyncio.sleep(1.2)
        served.engine.resume()
        assert (await answer).text == "abc"

    run_served(body, tokenizer, limits=LimitsConfig(max_idle_seconds=0.3, keepalive_seconds=0.3))


def test_requests_of_a_peer_that_vanished_are_aborted(tokenizer):
    async def body(served: Served) -> None:
        served.engine.pause()
        async with raw_http2.silent_peers(served.address, 1, greet=True) as (peer,):
            block = raw_http2.http2.request_headers("test", JAXSERVE + "Generate")
            data = raw_http2.message(b"\x0a\x04gone\x12\x01a")
            for kind, flags, part in ((1, 4, block), (0, 1, data)):
                head = len(part).to_bytes(3, "big") + bytes((kind, flags)) + (1).to_bytes(4, "big")
                peer.transport.write(head + part)
            await served.until(served.engine.wait_for_requests, 1)
            await served.until(served.engine.wait_for_abort, "gone")

    run_served(body, tokenizer, limits=LimitsConfig(keepalive_seconds=0.5, keepalive_timeout_seconds=0.5))


# ---- number ----


def test_idle_connections_make_room_and_used_ones_stay(tokenizer):
    async def body(served: Served) -> None:
        kept = served.client
        await kept.tokenize("in use")
        async with contextlib.AsyncExitStack() as stack:
            peers = []
            for _ in range(10):
                peers += await stack.enter_async_context(raw_http2.silent_peers(served.address, 5, greet=True))
                await probe(served.address)
            await reaches(lambda: sum(not peer.closed.done() for peer in peers) <= 11)
            assert len(await kept.tokenize("still in use")) > 1
            assert all(peer.closed.done() for peer in peers[:25])  # the longest idle went

    run_served(body, tokenizer, limits=LimitsConfig(max_connections=16))


@pytest.mark.parametrize("greet", [True, False])
def test_a_crowd_at_once_keeps_no_probe_out(tokenizer, greet):
    async def body(served: Served) -> None:
        async with raw_http2.silent_peers(served.address, 200, greet) as peers:
            await probe(served.address)
            await reaches(lambda: sum(not peer.closed.done() for peer in peers) <= 24)
            for _ in range(20):
                await probe(served.address, tries=1)

    run_served(body, tokenizer, limits=LimitsConfig(max_connections=32))


def test_calls_cannot_take_the_connections_of_probes(tokenizer):
    """Half of 16 may have calls; on the others only health is answered."""

    async def body(served: Served) -> None:
        served.engine.pause()
        async with contextlib.AsyncExitStack() as stack:
            takers = [await stack.enter_async_context(raw_http2.connected(served.address)) for _ in range(8)]
            waiting = [connection.start(PAYLOAD) for connection in takers]
            await served.until(served.engine.wait_for_requests, 8)
            late = await stack.enter_async_context(raw_http2.connected(served.address))
            code, details = await raw_http2.ended(late.start(PAYLOAD))
            assert code is Code.RESOURCE_EXHAUSTED
            assert "calls of 8 connections are open" in details
            assert "at most 8 (max_connections, less those kept for probes)" in details
            check = raw_http2.send(late, HEALTH + "Check", [raw_http2.message(b"")])
            assert (await raw_http2.ended(check))[0] is Code.OK
            await asyncio.sleep(0.2)
            check = raw_http2.send(late, HEALTH + "Check", [raw_http2.message(b"")])
            assert (await raw_http2.ended(check))[0] is Code.OK  # such a connection is not cut off at once
            for _ in range(30):
                await probe(served.address)
            served.engine.resume()
            assert [(await raw_http2.ended(stream))[0] for stream in waiting] == [Code.OK] * 8

    run_served(body, tokenizer, limits=LimitsConfig(max_connections=16))


def test_connections_that_only_watch_health_make_room(tokenizer):
    async def body(served: Served) -> None:
        async with contextlib.AsyncExitStack() as stack:
            streams = []
            for _ in range(16):
                with contextlib.suppress(OSError):  # refused, should the server be slow to make room
                    connection = await stack.enter_async_context(raw_http2.connected(served.address))
                    streams.append(raw_http2.send(connection, HEALTH + "Watch", [raw_http2.message(b"")]))
                await asyncio.sleep(0.05)
            await reaches(lambda: any(stream.done.done() for stream in streams))
            await probe(served.address)

    run_served(body, tokenizer, limits=LimitsConfig(max_connections=16))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "::"])
def test_a_connection_is_known_by_the_name_that_grpc_gives_it(host):
    """Else one with calls would pass for idle."""

    async def body() -> None:
        try:
            server = GrpcServer(host, 0, MAX_MESSAGE_BYTES, ServedModel("echo"))
            await server.start()
        except OSError:
            pytest.skip("there is no IPv6 here")
        for target in {"127.0.0.1": ["127.0.0.1"], "::1": ["[::1]"], "::": ["[::1]", "127.0.0.1"]}[host]:
            async with grpc.aio.insecure_channel(f"{target}:{server.port}") as channel:
                watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
                server.calls.take_used()
                await watch.read()
                found = {connections._peer(number, server.port) for number in connections._descriptors()}
                assert server.calls.take_used() <= found - {None}
                watch.cancel()
        await server.stop()

    asyncio.run(body())


def test_a_descriptor_that_was_given_to_another_is_not_shut():
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(open("/dev/null", "rb")) for _ in range(2))
        connection = connections._Connection(first.fileno(), -1, "peer", 0.0)
        assert not connections._shut(connection)
        assert second.read() == b""


# ---- descriptors ----


def test_the_limit_of_open_files_decides(monkeypatch):
    monkeypatch.setattr(connections, "_descriptors", lambda: list(range(20)))
    limits = [(100, 100)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[0])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.__setitem__(0, new))
    assert connection_limit(None) == 100 - 20 - connections.SPARE_DESCRIPTORS
    assert connection_limit(50) == 50
    with pytest.raises(DescriptorError, match=r"open files is 100; .* at least 57 connections.*ulimit -n 101\).*lower"):
        connection_limit(57)
    limits[0] = (51, 51)
    with pytest.raises(
        DescriptorError, match=r"open files is 51; the server needs 44 .*raise the limit \(ulimit -n 52"
    ):
        connection_limit(None)
    limits[0] = (51, 1000)  # the soft limit is raised
    assert connection_limit(None) == 1000 - 44
    assert limits[0] == (1000, 1000)
    limits[0] = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    assert connection_limit(None) == connections.MOST_CONNECTIONS
    assert [reserve(limit) for limit in (8, 16, 4096)] == [4, 8, 128]


def with_files(limit: int, directory) -> Process:
    """The echo server with a limit of open files."""
    script = f'ulimit -n {limit}; exec "$@"'
    server = [sys.executable, "-m", "tests.server.echo_server", "run", str(directory)]
    return Process(["bash", "-c", script, "bash", *server])


def test_fault_31_a_server_with_few_descriptors_answers_probes_throughout(tmp_path):
    process = with_files(72, save_tokenizer(tmp_path))
    try:
        address = process.until(r"ready on (\S+) in").group(1)

        async def body() -> None:
            async with AsyncClient(address) as kept:
                await kept.wait_ready(WAIT_SECONDS)
                async with raw_http2.silent_peers(address, 300, greet=True), contextlib.AsyncExitStack() as stack:
                    for _ in range(10):
                        await probe(address)
                        await kept.wait_ready(WAIT_SECONDS)
                        await stack.enter_async_context(raw_http2.silent_peers(address, 10, greet=False))
                    assert (await kept.generate_text("abc", GREEDY)).text == "abc"

        asyncio.run(body())
        process.popen.terminate()
        code, lines = process.end()
        assert code == 0
        assert any("idle connections closed to make room for new ones" in line for line in lines)
        assert not any("File descriptor limit" in line or "Traceback" in line for line in lines)
    finally:
        process.close()


def test_a_server_with_too_few_descriptors_says_so_in_a_line(tmp_path):
    process = with_files(36, save_tokenizer(tmp_path))
    try:
        code, lines = process.end()
        assert code == 1
        assert lines[-1].startswith("jaxserve.server: the limit of open files is 36; the server needs ")
        assert "raise the limit (ulimit -n " in lines[-1]
        assert not any("Traceback" in line for line in lines)
    finally:
        process.close()


# ---- memory ----


def test_memory_is_returned_while_the_process_is_larger_than_it_was(monkeypatch):
    sizes = iter([100, 110, 300, 290, 290, 285, 284, 90, 105])  # in MB: two checks, then before and after attempts
    trimmed, waits = [], []

    async def wait(seconds: float) -> None:
        waits.append(seconds)

    async def in_thread(function, *arguments):
        return function(*arguments)

    monkeypatch.setattr(memory_return, "return_freed_memory", lambda: trimmed.append(True))
    monkeypatch.setattr(memory_return, "resident_bytes", lambda: next(sizes) * 1024 * 1024)
    monkeypatch.setattr(memory_return.asyncio, "sleep", wait)
    monkeypatch.setattr(memory_return.asyncio, "to_thread", in_thread)
    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(memory_return.return_memory())
    assert len(trimmed) == 3
    assert waits == [5.0, 5.0, 5.0, 10.0, 5.0, 5.0]


def test_the_memory_of_this_process_is_found():
    assert 1e7 < memory_return.resident_bytes() < 1e12
