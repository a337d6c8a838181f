"""Refuses requests with oversized fields before they are parsed.

Parsing 4 MB of text and copying it from the message blocks all other calls for up to 15 ms. And protobuf allocates an
object for every item of a message: two million stop strings in 4 MB take 50 ms and 80 MB. The few fields of a message
can be measured without that.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from jaxserve.serving.grpc_port.convert import MAX_MESSAGES
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb

_LARGE = 256 * 1024
"""Message size in bytes from which its fields are measured."""
_MAX_PARAMS_BYTES = 64 * 1024
"""Limit on bytes of sampling parameters; the most and longest stop strings take a third of it."""
_MAX_FIELDS = 64
"""Limit on fields of one request. A request has a dozen; only repeated fields exceed this."""

_GENERATE = f"/{pb.DESCRIPTOR.services_by_name['JaxServe'].full_name}/Generate"
_PARAMS, _TEXT, _TOKEN_IDS, _MESSAGES = (
    pb.GenerateRequest.DESCRIPTOR.fields_by_name[name].number
    for name in ("sampling_params", "text", "token_ids", "messages")
)


CheckPromptBytes = Callable[[int, bool], None]


class OversizedInterceptor(grpc.aio.ServerInterceptor):
    """Makes parsers raise errors for requests with oversized fields; it is placed behind the interceptor that answers
    them.

    Args:
        check_prompt_bytes: raises ValueError for a prompt of too many bytes, of text or else of a TokenIds message.
    """

    def __init__(self, check_prompt_bytes: CheckPromptBytes) -> None:
        self._check_prompt_bytes = check_prompt_bytes
        self._made: tuple[Any, Any] = (None, None)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method != _GENERATE:
            return handler
        # Of one handler always the same is made, as interceptors around this one may keep what they make of it.
        made_of, checking = self._made
        if made_of is not handler:
            checking = grpc.unary_stream_rpc_method_handler(
                handler.unary_stream,
                request_deserializer=_checking(handler.request_deserializer, self._check_prompt_bytes),
                response_serializer=handler.response_serializer,
            )
            self._made = handler, checking
        return checking


def _checking(parse: Callable[[bytes], Any], check_prompt_bytes: CheckPromptBytes) -> Callable[[bytes], Any]:
    def check_and_parse(data: bytes) -> Any:
        if len(data) > _LARGE:
            check_generate(data, check_prompt_bytes)
        return parse(data)

    return check_and_parse


def check_generate(data: bytes, check_prompt_bytes: CheckPromptBytes) -> None:
    """Raises DecodeError when an unparsed GenerateRequest has oversized sampling parameters or too many messages; and
    whatever `check_prompt_bytes` raises for its text or token ids, the last ones where it has several.
    """
    size, prompt, num_messages = 0, (0, True), 0
    for count, (number, length, end) in enumerate(_fields(data), start=1):
        if count > _MAX_FIELDS:
            raise DecodeError(f"it has more than {_MAX_FIELDS} fields; send each field once")
        if number == _PARAMS:
            size += length
        elif number in (_TEXT, _TOKEN_IDS):
            prompt = length, number == _TEXT
        elif number == _MESSAGES:  # a conversation that is sent in several fields is one
            num_messages += _count_fields(data[end - length : end], MAX_MESSAGES + 1 - num_messages)
    if num_messages > MAX_MESSAGES:
        raise DecodeError(f"messages has more than {MAX_MESSAGES} messages; leave out old ones")
    if size > _MAX_PARAMS_BYTES:
        raise DecodeError(
            f"sampling_params has {size} bytes; at most {_MAX_PARAMS_BYTES} are allowed: send fewer stops"
        )
    check_prompt_bytes(*prompt)


def _count_fields(data: bytes, most: int) -> int:
    """Returns the number of fields of a message, or `most` where it has as many."""
    return sum(1 for _ in itertools.islice(_fields(data), most))


def _fields(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields the number and length of each field of a message, and the offset behind it.

    Malformed data is left to the parser.
    """
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        start = place
        match tag & 7:
            case 0:
                _, place = _varint(data, place)
            case 1:
                place += 8
            case 2:
                length, start = _varint(data, place)
                place = start + length
            case 5:
                place += 4
            case _:  # a group, which ends with its own tag
                pass
        yield tag >> 3, place - start, place


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """Decodes a varint; returns it and the offset behind it."""
    value = 0
    for index, byte in enumerate(data[place : place + 10]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, place + index + 1
    return value, len(data)
