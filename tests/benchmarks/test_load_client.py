"""The load generator's client against a real gRPC server over an echo engine, and its HTTP/2 frames by hand."""

from __future__ import annotations

import asyncio

import pytest

from benchmarks.load.datasets import LoadRequest, conversation_requests
from benchmarks.load.http2 import Connection, Http2Error, literal_fields, messages, request_headers
from benchmarks.load.load_client import Slowness, drive
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.serving.clients.grpc_client import AsyncClient
from jaxserve.simulator.conversations import ConversationConfig, conversation_trace
from tests.server.fakes import EchoEngine, save_tokenizer
from tests.server.harness import Served, run_served

PROMPT = [100, 101, 102]


def test_every_token_is_seen_with_its_time():
    async def body(served: Served) -> None:
        requests = [LoadRequest(PROMPT, count) for count in (1, 7, 40)]
        seen, cpu_seconds = await drive(served.address, requests, [0.0, 0.01, 0.02])
        assert [one.output_tokens for one in seen] == [1, 7, 40]
        assert [one.input_tokens for one in seen] == [3, 3, 3]
        assert {one.finish_reason for one in seen} == {"length"}
        assert not any(one.error for one in seen)
        for one in seen:
            moments = [moment for moment, _ in one.tokens]
            assert one.arrival <= one.sent <= moments[0]
            assert moments == sorted(moments)
            assert moments[-1] <= one.ended
        assert seen[1].arrival - seen[0].arrival == pytest.approx(0.01)
        assert cpu_seconds > 0

    run_served(body, None)


def test_the_same_answers_as_by_the_ordinary_client(tmp_path):
    tokenizer = Tokenizer(save_tokenizer(tmp_path))
    text = "héllo 🚀 " * 9

    async def body(served: Served) -> None:
        (seen,), _ = await drive(served.address, [LoadRequest(text, 120, ignore_eos=False)], [0.0])
        async with AsyncClient(served.address) as client:
            answer = await client.generate_text(text)
        assert (seen.text, seen.output_tokens) == (answer.text, len(answer.token_ids))
        assert seen.finish_reason == answer.finish_reason.value == "stop"

    run_served(body, tokenizer)


def test_errors_are_seen_and_do_not_touch_other_requests():
    async def body(served: Served) -> None:
        requests = [LoadRequest(PROMPT, 4), LoadRequest([], 4), LoadRequest(PROMPT, 9999), LoadRequest(PROMPT, 4)]
        seen, _ = await drive(served.address, requests, [0.0] * 4)
        assert seen[1].error.startswith("INVALID_ARGUMENT: prompt is not set") or "empty" in seen[1].error
        assert seen[2].error.startswith("INVALID_ARGUMENT: ")
        assert "9999" in seen[2].error
        assert [one.output_tokens for one in seen] == [4, 0, 0, 4]
        assert not seen[0].error
        assert not seen[3].error

    run_served(body, None)


def test_no_more_requests_are_open_than_allowed():
    engine = EchoEngine()

    async def body(served: Served) -> None:
        engine.pause()
        running = asyncio.ensure_future(drive(served.address, [LoadRequest(PROMPT, 2)] * 5, [0.0] * 5, 2))
        await served.until(engine.wait_for_requests, 2)
        await asyncio.sleep(0.05)
        assert len(engine.requests) == 2
        engine.resume()
        seen, _ = await running
        assert [one.output_tokens for one in seen] == [2] * 5
        assert sum(one.sent - one.arrival > 0.04 for one in seen) == 3

    run_served(body, None, engine)


def test_turns_of_a_session_repeat_what_the_server_answered():
    engine = EchoEngine()
    config = ConversationConfig(sessions=2, rate=50, turns=3, shared=8, first=4, later=3, output=6, pause=0.02)
    trace = conversation_trace(config)

    async def body(served: Served) -> None:
        requests, skipped = conversation_requests(trace, 4096, 256, seed=1)
        assert not skipped
        seen, _ = await drive(served.address, requests, [request.arrival or 0.0 for request in requests])
        assert [one.output_tokens for one in seen] == trace.output_tokens.tolist()
        assert [one.input_tokens for one in seen] == trace.prompt_tokens.tolist()
        assert not any(one.error for one in seen)
        for one, request in zip(seen, requests, strict=True):
            if request.after is not None:
                assert one.arrival >= seen[request.after].ended + request.pause
                assert one.sent >= one.arrival

    run_served(body, None, engine)


def test_a_slow_reader_gets_everything_late_and_the_server_coalesces():
    engine = EchoEngine()

    async def body(served: Served) -> None:
        engine.pause()
        requests = [LoadRequest(PROMPT, 200), LoadRequest(PROMPT, 200)]
        slowness = Slowness(pause=0.5, window=256)
        running = asyncio.ensure_future(
            drive(served.address, requests, [0.0, 0.0], slow=[False, True], slowness=slowness)
        )
        await served.until(engine.wait_for_requests, 2)
        for _ in range(200):
            engine.allow(1)
            await asyncio.sleep(0.002)
        (fast, slow), _ = await running
        assert fast.output_tokens == slow.output_tokens == 200
        assert slow.tokens[-1] > fast.tokens[-1]
        assert len(slow.tokens) < len(fast.tokens) / 2  # what waited came together

    run_served(body, None, engine)


def test_no_server_is_an_error():
    with pytest.raises(OSError):
        asyncio.run(drive("127.0.0.1:1", [LoadRequest(PROMPT, 2)], [0.0]))


def test_a_server_that_goes_away_fails_the_open_requests():
    engine = EchoEngine()

    async def body(served: Served) -> None:
        engine.pause()
        running = asyncio.ensure_future(drive(served.address, [LoadRequest(PROMPT, 9)], [0.0]))
        await served.until(engine.wait_for_requests, 1)
        engine.die("no memory")
        (seen,), _ = await running
        assert seen.error

    run_served(body, None, engine)


class Wire(asyncio.Transport):
    """Keeps what is written, as (kind, flags, stream, body)."""

    def __init__(self):
        super().__init__()
        self.data = b""

    def write(self, data) -> None:
        self.data += bytes(data)

    def is_closing(self) -> bool:
        return False

    def frames(self) -> list[tuple[int, int, int, bytes]]:
        data, found = self.data.removeprefix(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), []
        self.data = b""
        while data:
            size = int.from_bytes(data[:3], "big")
            found.append((data[3], data[4], int.from_bytes(data[5:9], "big"), data[9 : 9 + size]))
            data = data[9 + size :]
        return found


def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + body


def connected(test) -> None:
    """Runs test(connection, wire) in an event loop."""

    async def body() -> None:
        connection, wire = Connection("host:1", "/a/b"), Wire()
        connection.connection_made(wire)
        result = test(connection, wire)
        if result is not None:
            await result

    asyncio.run(body())


def sent(wire: Wire, stream: int) -> bytes:
    return b"".join(body for kind, _, number, body in wire.frames() if kind == 0 and number == stream)


def test_a_request_waits_for_the_windows_of_the_server():
    def test(connection: Connection, wire: Wire) -> None:
        payload = bytes(range(256)) * 400  # 102,400 bytes and a prefix of 5
        connection.start(payload)
        first = sent(wire, 1)
        assert len(first) == 65_535  # the connection's window, which HTTP/2 begins with
        connection.data_received(frame(8, 0, 0, (50_000).to_bytes(4, "big")))
        assert sent(wire, 1) == b""  # the stream's own window is still closed
        connection.data_received(frame(8, 0, 1, (10_000).to_bytes(4, "big")))
        second = sent(wire, 1)
        assert len(second) == 10_000
        settings = (4).to_bytes(2, "big") + (65_535 + 40_000).to_bytes(4, "big")
        connection.data_received(frame(4, 0, 0, settings))
        third = sent(wire, 1)
        assert first + second + third == b"\0" + len(payload).to_bytes(4, "big") + payload

    connected(test)


def test_a_stream_that_may_not_send_does_not_hold_up_the_next():
    def test(connection: Connection, wire: Wire) -> None:
        connection.data_received(frame(4, 0, 0, (4).to_bytes(2, "big") + (10).to_bytes(4, "big")))
        connection.start(b"x" * 20)
        connection.start(b"y" * 5)
        frames = wire.frames()
        assert [body for kind, _, number, body in frames if kind == 0 and number == 3] == [b"\0\0\0\0\5yyyyy"]
        assert len(b"".join(body for kind, _, number, body in frames if kind == 0 and number == 1)) == 10

    connected(test)


def test_frames_may_arrive_in_any_pieces():
    message = b"\0\0\0\0\3abc"
    trailers = b"\0\x0bgrpc-status\x010"
    whole = frame(4, 0, 0, b"") + frame(0, 0, 1, message[:4]) + frame(0, 0, 1, message[4:] + message)
    whole += frame(6, 0, 0, b"12345678") + frame(1, 5, 1, trailers)

    def test(connection: Connection, wire: Wire) -> None:
        stream = connection.start(b"")
        wire.frames()
        for place in range(len(whole)):
            connection.data_received(whole[place : place + 1])
        assert [data for _, data in messages(stream.chunks)] == [b"abc", b"abc"]
        assert stream.done.done()
        assert stream.status == 0
        assert (6, 1, 0, b"12345678") in wire.frames()  # a ping is answered

    connected(test)


def test_a_reader_that_pauses_acknowledges_later():
    async def body(connection: Connection, wire: Wire) -> None:
        connection.start(b"", pause=0.02)
        wire.frames()
        connection.data_received(frame(0, 0, 1, b"x" * 100))
        connection.data_received(frame(0, 0, 1, b"x" * 50))
        assert wire.frames() == []
        await asyncio.sleep(0.04)
        assert wire.frames() == [(8, 0, 1, (150).to_bytes(4, "big"))]

    connected(body)


@pytest.mark.parametrize(
    ("answer", "status", "message"),
    [
        (frame(1, 5, 1, b"\0\x0bgrpc-status\x0213" + b"\0\x0cgrpc-message\x08a%20b%25"), 13, "a b%"),
        (frame(3, 0, 1, (8).to_bytes(4, "big")), 13, "reset with code 8"),
        (frame(1, 5, 1, b"\x88"), 2, ""),
    ],
)
def test_ends_that_are_no_success(answer, status, message):
    def test(connection: Connection, wire: Wire) -> None:
        stream = connection.start(b"")
        connection.data_received(answer)
        assert (stream.status, stream.message) == (status, message)

    connected(test)


def test_a_lost_connection_ends_every_stream_and_refuses_more():
    def test(connection: Connection, wire: Wire) -> None:
        first = connection.start(b"")
        connection._ready.set_result(None)
        connection.connection_lost(None)
        second = connection.start(b"")
        assert first.status == second.status == 14
        assert first.done.done()
        assert second.done.done()

    connected(test)


def test_header_blocks():
    block = request_headers("host:50051", "/a.B/C")
    assert literal_fields(block)[b":path"] == b"/a.B/C"
    assert literal_fields(block)[b"te"] == b"trailers"
    long = "/" + "x" * 300
    assert literal_fields(request_headers("host:1", long))[b":path"] == long.encode()
    # An indexed field, a new table size, a literal with an indexed name, one that is Huffman-coded, one to be indexed.
    mixed = b"\x88" + b"\x20" + b"\x0f\x10\x03abc" + b"\0\x01a\x81\xff" + b"\x40\x01b\x02cd"
    assert literal_fields(mixed) == {b"": b"abc", b"b": b"cd"}


def test_broken_messages():
    with pytest.raises(Http2Error, match="cut off"):
        messages([(0.0, b"\0\0\0\0\5ab")])
    with pytest.raises(Http2Error, match="compressed"):
        messages([(0.0, b"\1\0\0\0\1a")])
    assert messages([(1.0, b"\0\0\0\0\0"), (2.0, b"\0\0\0\0"), (3.0, b"\1z")]) == [(1.0, b""), (3.0, b"z")]
