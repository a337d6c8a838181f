"""Calls that clients hold open are bounded in number, bytes and age, and health is answered meanwhile."""

import asyncio
import logging

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from benchmarks.load import http2
from jaxserve.config.client_limits import LimitsConfig
from jaxserve.serving.clients.grpc_client import generate_request
from jaxserve.serving.grpc_port import health
from jaxserve.serving.grpc_port.call_interceptor import CallContext
from jaxserve.serving.grpc_port.calls import OpenCalls
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb
from tests.server import raw_http2
from tests.server.harness import GREEDY, Served, health_of, run_served, status_of
from tests.server.raw_http2 import HEALTH, JAXSERVE, REFLECTION

Code = grpc.StatusCode


def payload(text: str = "abc") -> bytes:
    return generate_request(text, GREEDY).SerializeToString()


async def reaches(condition) -> None:
    while not condition():  # noqa: ASYNC110  nothing tells
        await asyncio.sleep(0.01)


# ---- answers that are not read ----


@pytest.mark.parametrize(
    ("path", "request_"),
    [
        (JAXSERVE + "Generate", payload()),
        (JAXSERVE + "Tokenize", pb.TokenizeRequest(text="abc").SerializeToString()),
        (JAXSERVE + "GetServerInfo", b""),
        (HEALTH + "Check", b""),
        (HEALTH + "List", b""),
        (HEALTH + "Watch", b""),
        (REFLECTION, reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString()),
    ],
)
def test_fault_31_calls_whose_answers_are_never_read_end(tokenizer, path, request_, caplog):
    async def body(served: Served) -> None:
        async with (
            raw_http2.connected(served.address, window=0) as connection,
            raw_http2.connected(served.address) as ok,
        ):
            await raw_http2.ended(raw_http2.send(ok, REFLECTION, [raw_http2.message(b"")]))  # see note_rpc_tasks
            streams = [raw_http2.send(connection, path, [raw_http2.message(request_)]) for _ in range(30)]
            await reaches(lambda: len(served.server.calls._writing) == 30)
            assert await health_of(served.address) == "SERVING"
            for stream in streams:
                assert (await raw_http2.ended(stream))[0] is Code.CANCELLED
        assert served.server.calls.num_ended == {"max_unread_seconds": 30}
        await reaches(lambda: served.server.calls.num_open == 0)
        assert served.frontend.num_open == 0
        assert (await served.client.generate_text("after", GREEDY)).text == "after"

    run_served(body, tokenizer, limits=LimitsConfig(max_unread_seconds=1.0))
    assert "calls ended by max_unread_seconds = 1.0" in caplog.text
    assert not any(record.exc_info for record in caplog.records)


def test_of_too_many_unread_calls_the_oldest_end(tokenizer, monkeypatch):
    monkeypatch.setattr("jaxserve.serving.grpc_port.calls.GRACE_SECONDS", 0.1)

    async def body(served: Served) -> None:
        async with raw_http2.connected(served.address, window=0) as connection:
            streams = []
            for _ in range(10):  # no more than the engine may hold, after one another
                streams += [connection.start(payload()) for _ in range(20)]
                await served.until(served.engine.wait_for_requests, len(streams))
                await reaches(lambda: not served.frontend.num_open)
            await reaches(lambda: served.server.calls.num_ended["max_unread_calls"] == 175)
            assert len(served.server.calls._writing) == 25
            for stream in streams[:160]:
                assert (await raw_http2.ended(stream))[0] is Code.CANCELLED
            assert not any(stream.done.done() for stream in streams[-20:])
            assert await health_of(served.address) == "SERVING"

    run_served(body, tokenizer, limits=LimitsConfig(max_unread_calls=25))


def test_unread_answers_are_bounded_in_bytes(tokenizer, monkeypatch):
    monkeypatch.setattr("jaxserve.serving.grpc_port.calls.GRACE_SECONDS", 0.1)
    request_ = pb.TokenizeRequest(text="a" * 10_000).SerializeToString()

    async def body(served: Served) -> None:
        async with raw_http2.connected(served.address, 0, JAXSERVE + "Tokenize") as connection:
            streams = [connection.start(request_) for _ in range(20)]
            await reaches(lambda: served.server.calls.num_ended["max_unread_bytes"] == 14)  # 6 of 10 kB stay
            assert sum(stream.done.done() for stream in streams) <= 14

    run_served(body, tokenizer, limits=LimitsConfig(max_unread_bytes=65_536))


def test_what_waits_behind_a_message_counts_too(monkeypatch):
    """Tokens of a Generate call that wait in the front end while a message stands in gRPC."""
    monkeypatch.setattr("jaxserve.serving.grpc_port.calls.GRACE_SECONDS", 0.0)
    cancelled: list[int] = []

    class FakeCall:
        def __init__(self, number: int, backlog: int):
            self.number, self.size, self.backlog, self.is_probe, self.peer = number, 0, backlog, False, "peer"

        def bytes_unread(self) -> int:
            return self.size + self.backlog

        def cancel(self) -> None:
            cancelled.append(self.number)

    async def body() -> None:
        calls = OpenCalls(LimitsConfig(max_unread_bytes=1000), 8)
        for number, backlog in enumerate((10, 900, 0, 500)):
            calls.writes(FakeCall(number, backlog), 20)  # type: ignore[arg-type]
        calls.sweep()
        assert cancelled == [0, 1]  # 1,490 bytes: the two that waited for longest are 950
        calls.sweep()
        assert cancelled == [0, 1]

    asyncio.run(body())


def test_a_reader_that_comes_late_gets_its_answer(tokenizer):
    async def body(served: Served) -> None:
        async with raw_http2.connected(served.address, window=0) as connection:
            stream = connection.start(payload("late"))
            await reaches(lambda: served.server.calls._writing and not served.frontend.num_open)
            connection._write(8, 0, stream.number, (100_000).to_bytes(4, "big"))  # reads now
            assert (await raw_http2.ended(stream))[0] is Code.OK
            text = b"".join(data for _, data in stream.chunks)
            assert b"late" in text or all(letter in text for letter in (b"l", b"a", b"t", b"e"))

    run_served(body, tokenizer)


def test_generate_tells_how_much_waits_for_its_reader(tokenizer, monkeypatch):
    backlogs = []
    monkeypatch.setattr(CallContext, "set_backlog", lambda self, backlog: backlogs.append(backlog))

    async def body(served: Served) -> None:
        async with raw_http2.connected(served.address, window=0) as connection:
            served.engine.pause()
            connection.start(payload("x" * 100))
            await served.until(served.engine.wait_for_requests, 1)
            served.engine.allow(1)
            await reaches(lambda: served.server.calls._writing)
            served.engine.resume()
            await reaches(lambda: not served.frontend.num_open)
            assert backlogs[0]() >= 100 * 16  # the end token among them

    run_served(body, tokenizer)


# ---- requests that do not arrive ----


@pytest.mark.parametrize(
    "path", [JAXSERVE + "Generate", JAXSERVE + "Abort", HEALTH + "Check", HEALTH + "Watch", REFLECTION]
)
@pytest.mark.parametrize("parts", [[], [b"\0\0"], [raw_http2.message(b"abc", length=4000)]])
def test_fault_31_requests_that_stay_away_are_refused(tokenizer, path, parts):
    async def body(served: Served) -> None:
        async with raw_http2.connected(served.address) as connection:
            stream = raw_http2.send(connection, path, parts, end=False)
            code, details = await raw_http2.ended(stream)
            assert code is Code.DEADLINE_EXCEEDED
            assert "the request message has not arrived in whole within 0.5 s (max_receive_seconds)" in details
        await reaches(lambda: served.server.calls.num_open == 0)

    run_served(body, tokenizer, limits=LimitsConfig(max_receive_seconds=0.5))


def test_a_slow_request_that_arrives_is_answered(tokenizer):
    async def body(served: Served) -> None:
        async with raw_http2.connected(served.address) as connection:
            whole = raw_http2.message(pb.TokenizeRequest(text="abc").SerializeToString())
            stream = raw_http2.send(connection, JAXSERVE + "Tokenize", [whole[:7]], end=False)
            await asyncio.sleep(0.5)
            connection._write(0, 1, stream.number, whole[7:])
            assert (await raw_http2.ended(stream))[0] is Code.OK

    run_served(body, tokenizer)


def test_of_too_many_requests_that_stay_away_the_oldest_are_refused(tokenizer, monkeypatch):
    monkeypatch.setattr("jaxserve.serving.grpc_port.calls.GRACE_SECONDS", 0.1)
    half = [raw_http2.message(b"x" * 30_000, length=60_000)]

    async def body(served: Served) -> None:
        async with raw_http2.connected(served.address) as connection:
            streams = [raw_http2.send(connection, JAXSERVE + "Tokenize", half, end=False) for _ in range(50)]
            for stream in streams[:42]:
                code, details = await raw_http2.ended(stream)
                assert code is Code.RESOURCE_EXHAUSTED
                assert "more than 8 calls (max_receiving_calls)" in details
            assert not any(stream.done.done() for stream in streams[42:])
            assert (await served.client.tokenize("in between"))[0] == 1
            assert await health_of(served.address) == "SERVING"

    run_served(body, tokenizer, limits=LimitsConfig(max_receiving_calls=8))


def test_a_reflection_stream_without_questions_ends(tokenizer):
    async def body(served: Served) -> None:
        async with grpc.aio.insecure_channel(served.address) as channel:
            call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            assert (await call.read()).list_services_response.service
            assert (await status_of(call.read()))[0] is Code.DEADLINE_EXCEEDED

    run_served(body, tokenizer, limits=LimitsConfig(max_receive_seconds=0.5))


# ---- how many ----


def test_calls_over_the_number_are_refused_and_health_is_not(tokenizer):
    async def body(served: Served) -> None:
        served.engine.pause()
        waiting = [asyncio.ensure_future(served.client.generate_text("a", GREEDY)) for _ in range(10)]
        await served.until(served.engine.wait_for_requests, 10)
        call = served.client._stub.Tokenize(pb.TokenizeRequest(text="a"))
        code, details = await status_of(call)
        assert code is Code.RESOURCE_EXHAUSTED
        assert "10 calls are open; at most 10 (max_open_calls) may be" in details
        assert int(dict(await call.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
        assert await health_of(served.address) == "SERVING"
        served.engine.resume()
        assert [answer.text for answer in await asyncio.gather(*waiting)] == ["a"] * 10
        assert await served.client.tokenize("a")

    run_served(body, tokenizer, limits=LimitsConfig(max_open_calls=10))


def test_streams_of_a_connection_are_bounded(tokenizer):
    async def body(served: Served) -> None:
        async with raw_http2.connected(served.address, 2**31 - 1, JAXSERVE + "Tokenize") as connection:
            assert connection._peer_streams == 5
            streams = [connection.start(b"") for _ in range(40)]  # more than the peer allows wait in the client
            assert len(connection._streams) == 5
            for stream in streams:
                assert (await raw_http2.ended(stream)) == (Code.OK, "")
        async with raw_http2.connected(served.address, 2**31 - 1, HEALTH + "Watch") as connection:
            for _ in range(9):  # a client that does not care; those that are refused wait from then on
                raw_http2.send(connection, HEALTH + "Watch", [raw_http2.message(b"")])
            await reaches(lambda: len(connection._queued) == 4 and served.server._health._num_watches == 5)

    run_served(body, tokenizer, limits=LimitsConfig(max_streams_per_connection=5))


def test_fault_31_a_burst_ends_with_an_answer_for_each(tokenizer):
    """A thousand calls that are never read, over some connections: each is refused or ended, and none is left."""

    async def body(served: Served) -> None:
        connections = [await http2.connect(served.address, JAXSERVE + "Generate", 0) for _ in range(4)]
        streams = [connection.start(payload()) for _ in range(250) for connection in connections]
        codes = [(await raw_http2.ended(stream))[0] for stream in streams]
        assert set(codes) <= {Code.CANCELLED, Code.RESOURCE_EXHAUSTED}
        assert codes.count(Code.CANCELLED) == served.server.calls.num_ended.total() >= 1
        await reaches(lambda: served.server.calls.num_open == 0)
        for connection in connections:
            connection.close()
        assert await health_of(served.address) == "SERVING"

    run_served(body, tokenizer, limits=LimitsConfig(max_unread_seconds=1.0, max_unread_calls=100, max_open_calls=300))


# ---- health ----


def test_watchers_are_bounded_in_number(tokenizer):
    async def body(served: Served) -> None:
        async with grpc.aio.insecure_channel(served.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            watches = [stub.Watch(health_pb2.HealthCheckRequest()) for _ in range(3)]
            for watch in watches:
                assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            code, details = await status_of(stub.Watch(health_pb2.HealthCheckRequest()).read())
            assert code is Code.RESOURCE_EXHAUSTED
            assert "3 calls watch health; at most 3 (max_health_watches) may" in details
            assert await health_of(served.address) == "SERVING"
            watches[0].cancel()
            await reaches(lambda: served.server._health._num_watches == 2)
            assert (await stub.Watch(health_pb2.HealthCheckRequest()).read()).status

    run_served(body, tokenizer, limits=LimitsConfig(max_health_watches=3))


def test_a_watch_is_bounded_in_age(tokenizer, monkeypatch):
    monkeypatch.setattr(health, "WATCH_SECONDS", 0.3)

    async def body(served: Served) -> None:
        async with grpc.aio.insecure_channel(served.address) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            code, details = await status_of(watch.read())
            assert (code, details) == (Code.UNAVAILABLE, "watched for 0.3 s; watch again")

    run_served(body, tokenizer)


def test_a_watcher_that_does_not_read_holds_up_nobody(tokenizer):
    """Neither the others nor the drain, which sets the status."""

    async def body(served: Served) -> None:
        async with (
            raw_http2.connected(served.address, window=0) as connection,
            grpc.aio.insecure_channel(served.address) as channel,
        ):
            raw_http2.send(connection, HEALTH + "Watch", [raw_http2.message(b"")])
            await reaches(lambda: served.server._health._num_watches == 1)
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            served.drain()
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            watch.cancel()

    run_served(body, tokenizer)


def test_health_of_unknown_services_and_the_list(tokenizer):
    async def body(served: Served) -> None:
        async with grpc.aio.insecure_channel(served.address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            code, details = await status_of(stub.Check(health_pb2.HealthCheckRequest(service="nobody")))
            assert (code, details) == (Code.NOT_FOUND, "service 'nobody' is not known")
            watch = stub.Watch(health_pb2.HealthCheckRequest(service="nobody"))
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
            listed = (await stub.List(health_pb2.HealthListRequest())).statuses
            services = ("", "jaxserve.v1.JaxServe", "vllm.grpc.engine.VllmEngine")
            assert {name: one.status for name, one in listed.items()} == dict.fromkeys(services, 1)

    run_served(body, tokenizer)


# ---- the log ----


def test_a_client_that_is_gone_when_its_status_is_sent_is_one_line(tokenizer, caplog):
    """gRPC ends a call whose compressed message is damaged while the reflection service still answers."""
    caplog.set_level(logging.INFO)

    async def body(served: Served) -> None:
        async with raw_http2.connected(served.address) as connection:
            for _ in range(50):
                stream = raw_http2.send(
                    connection, REFLECTION, [raw_http2.message(b"abc", flag=1)], [(b"grpc-encoding", b"gzip")]
                )
                assert (await raw_http2.ended(stream))[0] is Code.INTERNAL

    run_served(body, tokenizer)
    assert not any(record.exc_info for record in caplog.records)
    assert "Traceback" not in caplog.text
