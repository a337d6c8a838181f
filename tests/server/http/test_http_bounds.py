"""What clients may send and hold open: sizes, times, connections; and a client that goes is aborted at once."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket

import httpx
import msgspec
import pytest

from jaxserve.config.client_limits import LimitsConfig
from jaxserve.config.http_config import HttpConfig
from jaxserve.serving.http_port import json_bodies
from tests.server.fakes import READY, WAIT_SECONDS, EchoEngine
from tests.server.harness import MAX_MESSAGE_BYTES
from tests.server.http.http_harness import error_of, run_http, until

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
IMPATIENT = LimitsConfig(handshake_seconds=0.3, max_receive_seconds=0.3, max_idle_seconds=1.0)
MORE = 8 * 1024 * 1024


def large_engine(context: int = 400_000) -> EchoEngine:
    """An engine for long prompts."""
    limits = dataclasses.replace(READY.limits, max_model_len=context, max_prompt_len=context, pool_tokens=context)
    return EchoEngine(msgspec.structs.replace(READY, limits=limits))


async def connect(served) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", served.server.port)


async def answer_to(served, *parts: bytes) -> bytes:
    """All that the server sends until it closes the connection."""
    reader, writer = await connect(served)
    for part in parts:
        writer.write(part)
        await writer.drain()
    found = await reader.read()
    writer.close()
    return found


# ---- sizes -----------------------------------------------------------------------------------------------------------


def test_a_body_too_large_is_refused_by_its_length_before_it_is_sent(tokenizer):
    async def test(served):
        reader, writer = await connect(served)
        writer.write(HEAD + b"expect: 100-continue\r\ncontent-length: %d\r\n\r\n" % (MAX_MESSAGE_BYTES + 1))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 413 ")  # and no 100 before it
        error = json.loads(await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split()[0])))[
            "error"
        ]
        assert error["message"] == (
            f"the body has {MAX_MESSAGE_BYTES + 1} bytes; at most {MAX_MESSAGE_BYTES} (max_message_bytes) are allowed"
        )
        writer.close()

    run_http(test, tokenizer)


def test_a_body_of_chunks_is_refused_when_it_becomes_too_large(tokenizer):
    async def body():
        for _ in range(MORE // 65536):
            yield b" " * 65536

    async def test(served):
        response = await served.client.post("/v1/completions", content=body())
        assert response.status_code == 413
        assert error_of(response)["code"] == "body_too_large"
        whole = await served.client.post("/v1/completions", content=b" " * MORE)
        assert whole.status_code == 413
        assert (await served.client.get("/health")).is_success

    run_http(test, tokenizer)


@pytest.mark.parametrize(
    "head",
    [b"GET /" + b"x" * 5000, b"GET / HTTP/1.1\r\nx: " + b"y" * 5000, b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 1000],
    ids=["line", "value", "headers"],
)
@pytest.mark.parametrize("end", [b"", b"\r\n\r\n"], ids=["endless", "whole"])
def test_headers_are_bounded(tokenizer, head, end):
    async def test(served):
        found = await answer_to(served, head + end)
        assert found.startswith(b"HTTP/1.1 431 ")
        assert b"have over 2048 bytes (max_header_bytes)" in found

    run_http(test, tokenizer, config=HttpConfig(max_header_bytes=2048))


def test_what_is_no_http(tokenizer):
    async def test(served):
        found = await answer_to(served, b"\x16\x03\x01 hello\r\n\r\n")
        assert found.startswith(b"HTTP/1.1 400 ")
        assert json.loads(found.partition(b"\r\n\r\n")[2])["error"]["message"].startswith("the request is no HTTP: ")

    run_http(test, tokenizer)


BOMBS = {
    "lists": b'{"prompt":[' + b"[]," * 30_000 + b"[]]}",
    "objects": b'{"prompt":[' + b"{}," * 30_000 + b"{}]}",
    "depth": b'{"prompt":' + b"[" * 70_000,
    "names": b"{" + b",".join(b'"%d":1' % number for number in range(40_000)) + b"}",
    "texts": b'{"prompt":[' + b'"",' * 40_000 + b'""]}',
    "ids": b'{"prompt":[' + b"1," * 600_000 + b"1]}",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bodies_of_too_many_parts(tokenizer, name):
    async def test(served):
        response = await served.client.post("/v1/completions", content=BOMBS[name])
        assert response.status_code == 400
        assert error_of(response)["message"].startswith("the body has more than ")

    run_http(test, tokenizer, max_body_bytes=4 * 1024 * 1024)


def test_large_bodies_that_are_fine(tokenizer):
    """Texts full of what looks like JSON, cut anywhere, and many token ids."""

    async def test(served):
        prompt = '\\"[{,' * 30_000 + "\\" * 70_000
        for body in (
            {"prompt": prompt, "max_tokens": 3, "stream": False},
            {"prompt": [7] * 200_000, "max_tokens": 3, "ignore_eos": True},
            {"prompt": [[8] * 60_000, "x", [9] * 60_000], "max_tokens": 3},
        ):
            response = await served.client.post("/v1/completions", content=json.dumps(body).encode())
            assert response.is_success, response.text
        lengths = [len(request.prompt_token_ids) for request in served.engine.requests]
        assert lengths == [len(prompt) + 1, 200_000, 60_000, 2, 60_000]

    run_http(test, tokenizer, engine=large_engine(), max_body_bytes=4 * 1024 * 1024)


@pytest.mark.parametrize("cut", [3, 4, 5, 6, 7, 64])
def test_the_structure_of_a_body_is_counted_whatever_is_cut(monkeypatch, cut):
    monkeypatch.setattr(json_bodies, "_PIECE", cut)
    value = {"a\\": ['"', "\\\\", '[{,"\\', {"b": [1, 2, {}]}], 'x"y': '\\"' * 5}
    steps = json_bodies._count_steps(json.dumps(value).encode())
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            found = stop.value
            break
    assert (found.containers, found.commas) == (5, 6)


def test_a_text_that_is_certainly_too_long_is_refused_undecoded(tokenizer, monkeypatch):
    monkeypatch.setattr(json_bodies, "decode", lambda data: pytest.fail("it was decoded"))

    async def test(served):
        response = await served.client.post("/v1/completions", json={"prompt": "x" * 100_000})
        assert response.status_code == 400
        assert error_of(response)["message"].startswith("prompt has ")

    run_http(test, tokenizer, max_body_bytes=4 * 1024 * 1024)


def test_a_grammar_may_be_longer_than_a_prompt(tokenizer):
    """It has a bound of its own, and its error names it."""
    texts = {"short enough": "ab" * 27_000, "too long": "a" * 140_000, "too much work": "(a|b)?" * 9_000}

    async def test(served):
        answers = {}
        for name, regex in texts.items():
            body = {"prompt": "a", "max_tokens": 1, "structured_outputs": {"regex": regex}}
            answers[name] = await served.client.post("/v1/completions", json=body)
        assert answers["short enough"].status_code == 200
        work = answers["too much work"]
        assert work.status_code == 200 or error_of(work)["message"].startswith("structured_outputs.regex is refused")
        assert error_of(answers["too long"])["message"].startswith("structured_outputs.regex has 140000 bytes; at most")

    run_http(test, tokenizer, max_body_bytes=4 * 1024 * 1024)


# ---- times and numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "status", "words"),
    [
        ((b"GET /health HTT",), b"408", b"headers have not arrived within 0.3 s"),
        ((HEAD + b"content-length: 100\r\n\r\n{",), b"408", b"body has not arrived within 0.3 s"),
    ],
)
def test_a_request_that_does_not_arrive(tokenizer, parts, status, words):
    async def test(served):
        found = await answer_to(served, *parts)
        assert found.startswith(b"HTTP/1.1 " + status)
        assert words in found
        assert served.server.connections.num_requests == 0

    run_http(test, tokenizer, limits=IMPATIENT)


def test_connections_without_requests_end(tokenizer):
    async def test(served):
        reader, writer = await connect(served)
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        await reader.read()  # until the server closes it
        assert await answer_to(served) != b""  # never said anything
        writer.close()

    run_http(test, tokenizer, limits=IMPATIENT)


def test_more_connections_than_allowed(tokenizer):
    """Idle ones make room; requests leave room for probes."""

    async def test(served):
        served.engine.pause()
        idle = [await connect(served) for _ in range(12)]
        body = b'{"prompt": "a"}'
        request = HEAD + b"content-length: %d\r\n\r\n" % len(body) + body
        busy = []
        for _ in range(4):
            busy.append(await connect(served))
            busy[-1][1].write(request)
        await served.until(served.engine.wait_for_requests, 4)
        refused = await answer_to(served, request.replace(b"host: x", b"host: x\r\nconnection: close"))
        assert refused.startswith(b"HTTP/1.1 429")
        assert b"4 requests are open; at most 4" in refused
        probe = await answer_to(served, b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert probe.startswith(b"HTTP/1.1 200")
        assert served.server.connections.num_open <= 8
        served.engine.resume()
        for reader, writer in busy:
            assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 200")
            writer.close()
        for _, writer in idle:
            writer.close()

    run_http(test, tokenizer, limits=LimitsConfig(max_connections=8))


def test_a_reader_that_stops_is_ended(tokenizer):
    """Its unread tokens are bounded, then its connection is closed; others are not affected."""

    async def test(served):
        with contextlib.closing(socket.socket()) as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(raw, ("127.0.0.1", served.server.port))
            body = json.dumps({"prompt": "a" * 20, "max_tokens": 300_000, "ignore_eos": True, "stream": True}).encode()
            await loop.sock_sendall(raw, HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
            await served.until(served.engine.wait_for_requests, 1)
            await served.until(served.engine.wait_for_abort, served.engine.requests[0].request_id)
            response = await served.client.post("/v1/completions", json={"prompt": "b"})
            assert response.json()["choices"][0]["text"] == "b"
            await until(lambda: not served.server.connections.num_requests)

    limits = LimitsConfig(max_unread_seconds=0.2)
    run_http(test, tokenizer, engine=large_engine(), limits=limits, max_unread_tokens=1000)


def test_no_event_waits_for_the_one_before_to_be_acknowledged(tokenizer):
    """Whatever made the listening socket, Nagle's algorithm is off for its connections."""

    async def test(served):
        _, writer = await connect(served)
        await until(lambda: served.server.connections.num_open)
        (connection,) = served.server.connections._all
        raw = connection.transport.get_extra_info("socket")
        assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        writer.close()

    run_http(test, tokenizer)


# ---- clients that go -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["abcdef", ["abcdef", "ghijkl"]], ids=["one", "two"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("steps", [0, 2], ids=["queued", "decoding"])
def test_a_client_that_goes_is_aborted(tokenizer, stream, steps, prompt):
    async def test(served):
        engine = served.engine
        engine.pause()
        reader, writer = await connect(served)
        body = json.dumps({"prompt": prompt, "stream": stream, "request_id": "gone"}).encode()
        writer.write(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        count = 1 if isinstance(prompt, str) else len(prompt)
        await served.until(engine.wait_for_requests, count)
        engine.allow(steps)
        if stream and steps:
            assert b"data: " in await reader.readuntil(b"\n\n")
        writer.close()
        for request in list(engine.requests):
            await served.until(engine.wait_for_abort, request.request_id)
        assert served.frontend.num_open == 0
        await until(lambda: not served.server.connections.num_requests)

    run_http(test, tokenizer)


def test_a_client_that_goes_while_its_body_arrives(tokenizer):
    async def test(served):
        _, writer = await connect(served)
        writer.write(HEAD + b"content-length: 100\r\n\r\n{")
        await writer.drain()
        await until(lambda: served.server.connections.num_requests)
        writer.close()
        await until(lambda: not served.server.connections.num_requests)
        assert served.engine.requests == []

    run_http(test, tokenizer)


def test_requests_follow_one_another_on_a_connection(tokenizer):
    """Whatever they are answered, and pipelined."""

    async def test(served):
        transport = httpx.AsyncHTTPTransport(limits=httpx.Limits(max_connections=1))
        async with httpx.AsyncClient(transport=transport, base_url=served.url, timeout=WAIT_SECONDS) as client:
            for body in ({"prompt": "a"}, {"prompt": ""}, {"prompt": "b", "stream": True}, {"promt": "c"}):
                await client.post("/v1/completions", json=body)
            await client.post("/v1/completions", content=b" " * (MAX_MESSAGE_BYTES + 1))
            assert (await client.get("/v1/models")).is_success
        request = b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n"
        found = await answer_to(served, request * 3, request.replace(b"host: x", b"host: x\r\nconnection: close"))
        assert found.count(b"HTTP/1.1 200") == 4

    run_http(test, tokenizer)
