"""What is no request of any service is refused in one line, and leaves no traceback in the log."""

import asyncio
import gzip
import logging

import grpc
import pytest
from grpc_reflection.v1alpha import reflection_pb2

from tests.server import raw_http2
from tests.server.harness import GREEDY, Served, health_of, run_served
from tests.server.raw_http2 import HEALTH, JAXSERVE, REFLECTION, message

Code = grpc.StatusCode

METHODS = [
    *(JAXSERVE + name for name in ("Generate", "Abort", "GetModelInfo", "GetServerInfo", "Tokenize", "Detokenize")),
    *(HEALTH + name for name in ("Check", "List", "Watch")),
    REFLECTION,
]
GZIP = [(b"grpc-encoding", b"gzip")]

GARBAGE = {
    "bytes of no message": b"\xff" * 7,
    "a field that breaks off": b"\x0a\x7f\x41",
    "a group that has no end": b"\x0b\x08\x01",
    "an end without a group": b"\x0c",
    "a number without end": b"\x08" + b"\xff" * 11,
    "a kind of field that is none": b"\x0f",
    "random text": b"GET / HTTP/1.1\r\n\r\n",
}


def call(path: str, *parts: bytes, fields=(), calm: bool = True):
    """What a call with these DATA frames ends with, of a server that is fine afterwards."""
    found = []

    async def body(served: Served) -> None:
        async with raw_http2.connected(served.address) as connection:
            found.append(await raw_http2.ended(raw_http2.send(connection, path, parts, fields)))
        assert await health_of(served.address) == "SERVING"
        assert (await served.client.generate_text([5, 6], GREEDY)).token_ids == (5, 6, 2)
        assert len(served.engine.requests) == 1

    run_served(body, None)
    return found[0]


@pytest.mark.parametrize("path", METHODS)
def test_garbage_is_invalid_argument_whatever_the_service(path, caplog):
    caplog.set_level(logging.DEBUG, "grpc")
    found = {}

    async def body(served: Served) -> None:
        async with raw_http2.connected(served.address) as connection:
            for name, data in GARBAGE.items():
                for form, parts, fields in (
                    ("plain", [message(data)], ()),
                    ("in two frames", [message(data)[:6], message(data)[6:]], ()),
                    ("compressed", [message(gzip.compress(data), flag=1)], GZIP),
                ):
                    found[name, form] = await raw_http2.ended(raw_http2.send(connection, path, parts, fields))
        assert await health_of(served.address) == "SERVING"
        assert served.engine.requests == []

    run_served(body, None)
    for code, details in found.values():
        assert code is Code.INVALID_ARGUMENT
        assert details.startswith("the request is malformed: ")
        assert "\n" not in details
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("path", [JAXSERVE + "Generate", HEALTH + "Check", HEALTH + "Watch", REFLECTION])
def test_text_that_is_no_utf_8(path):
    field = {JAXSERVE + "Generate": 0x12, REFLECTION: 0x1A}.get(path, 0x0A)
    code, details = call(path, message(bytes([field, 2, 0xC3, 0x28])))
    assert code is Code.INVALID_ARGUMENT
    assert "UTF-8" in details


@pytest.mark.parametrize("path", [path for path in METHODS if path != REFLECTION])
@pytest.mark.parametrize("parts", [(), (b"\0\0",), (message(b"abc", length=100),)], ids=["none", "prefix", "half"])
def test_a_call_that_ends_without_a_message(path, parts):
    """gRPC by itself forgets such a call, and its client waits for ever."""
    found = call(path, *parts)
    assert found == (Code.INVALID_ARGUMENT, "the request is malformed: the call ended without a whole message")


def test_garbage_after_a_good_question_to_reflection():
    good = message(reflection_pb2.ServerReflectionRequest(list_services="").SerializeToString())
    code, details = call(REFLECTION, good, message(b"\xff\xff"))
    assert code is Code.INVALID_ARGUMENT
    assert details.startswith("the request is malformed: ")


@pytest.mark.parametrize("path", [JAXSERVE + "Tokenize", HEALTH + "Check", REFLECTION])
@pytest.mark.parametrize(
    ("parts", "fields", "code"),
    [
        ([message(b"", length=2**31)], (), Code.RESOURCE_EXHAUSTED),
        ([message(b"\0" * 1000, length=65_537)], (), Code.RESOURCE_EXHAUSTED),
        ([message(gzip.compress(b"\0" * 2**22), flag=1)], GZIP, Code.RESOURCE_EXHAUSTED),
        ([message(b"no gzip", flag=1)], GZIP, Code.INTERNAL),  # gRPC's word, as for the next
        ([message(b"", flag=1)], (), Code.INTERNAL),
    ],
    ids=["2 GiB", "over the limit", "a compressed 4 MiB", "damaged", "compressed with nothing"],
)
def test_too_large_and_damaged(path, parts, fields, code, caplog):
    caplog.set_level(logging.INFO)
    assert call(path, *parts, fields=fields)[0] is code
    assert not any(record.exc_info for record in caplog.records)


@pytest.mark.parametrize("path", [JAXSERVE + "Nothing", "/no.such.Service/Check", HEALTH + "check", "/"])
def test_an_unknown_method_is_unimplemented(path):
    assert call(path, message(b"\xff\xff"))[0] is Code.UNIMPLEMENTED


def test_metadata_over_the_limit_is_refused():
    assert call(HEALTH + "Check", message(b""), fields=[(b"x", b"y" * 126)] * 200)[0] is Code.RESOURCE_EXHAUSTED


def test_http_1_and_noise_close_the_connection():
    async def body(served: Served) -> None:
        for noise in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
            bytes(99),
        ):
            async with raw_http2.silent_peers(served.address, 1, greet=False) as (peer,):
                peer.transport.write(noise)
                await asyncio.wait_for(asyncio.shield(peer.closed), 30)
        assert await health_of(served.address) == "SERVING"

    run_served(body, None)
