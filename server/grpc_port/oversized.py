"""Refuses requests with oversized fields before they are parsed.

Parsing 4 MB of text and copying it from the message blocks all other calls for up to 15 ms. And protobuf allocates an
object for every item of a message: two million stop strings in 4 MB take 50 ms and 80 MB. The few fields of a message
can be measured without that.
"""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Any

import grpc
import numpy as np
from google.protobuf.message import DecodeError

from jaxserve.config.sampling_fields import check_count
from jaxserve.serving.grpc_port.convert import MAX_MESSAGES
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb

LARGE = 256 * 1024
"""Message size in bytes from which its fields are measured."""
MEASURED = 64 * 1024
"""Message size in bytes from which its fields are counted."""
MAX_PARAMS_BYTES = 64 * 1024
"""Limit on bytes of sampling parameters; the most and longest stop strings take a third of it."""
MAX_FIELDS = 64
"""Limit on fields of one request. A request has a dozen; only a repeated field can have more, and is one field as
clients send it."""

MAX_DETOKENIZED = 2**20
"""Maximum number of token ids of one Detokenize call: they are decoded in one call."""

_SERVICE = pb.DESCRIPTOR.services_by_name["JaxServe"].full_name
GENERATE, DETOKENIZE = f"/{_SERVICE}/Generate", f"/{_SERVICE}/Detokenize"
WARM_PREFIX = f"/{_SERVICE}/WarmPrefix"
"""Its request has its prompt in the fields of GenerateRequest, and no sampling parameters."""
_BLOCK = 64 * 1024
_PARAMS, _TEXT, _TOKEN_IDS, _MESSAGES = (
    pb.GenerateRequest.DESCRIPTOR.fields_by_name[name].number
    for name in ("sampling_params", "text", "token_ids", "messages")
)
_TRUNCATE = pb.SamplingParams.DESCRIPTOR.fields_by_name["truncate_prompt_tokens"].number


CheckPromptBytes = Callable[[int, bool], None]


class OversizedInterceptor(grpc.aio.ServerInterceptor):
    """Makes parsers raise errors for requests with oversized fields; it is placed behind the interceptor that answers
    them.

    Args:
        checks: by method, a function that raises ValueError or DecodeError for an unparsed request; it is called for
            large ones.
    """

    def __init__(self, checks: Mapping[str, Callable[[bytes], None]]) -> None:
        self._checks = checks
        self._made: dict[str, tuple[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or method not in self._checks:
            return handler
        # Of one handler always the same is made, as interceptors around this one may keep what they make of it.
        made_of, checking = self._made.get(method, (None, None))
        if made_of is not handler:
            make = (
                (grpc.unary_stream_rpc_method_handler, handler.unary_stream)
                if handler.response_streaming
                else (grpc.unary_unary_rpc_method_handler, handler.unary_unary)
            )
            checking = make[0](
                make[1],
                request_deserializer=_checking(handler.request_deserializer, self._checks[method]),
                response_serializer=handler.response_serializer,
            )
            self._made[method] = handler, checking
        return checking


def _checking(parse: Callable[[bytes], Any], check: Callable[[bytes], None]) -> Callable[[bytes], Any]:
    def check_and_parse(data: bytes) -> Any:
        if len(data) > LARGE:
            check(data)
        return parse(data)

    return check_and_parse


def check_few_fields(data: bytes) -> None:
    """Raises DecodeError when an unparsed message of any method has more fields than a request has."""
    if len(data) > MEASURED:
        for count, _ in enumerate(fields(data), start=1):
            check_field_count(count)


def check_generate(data: bytes, check_prompt_bytes: CheckPromptBytes) -> None:
    """Raises DecodeError when an unparsed GenerateRequest, of few fields, has oversized sampling parameters or too many
    messages; and whatever `check_prompt_bytes` raises for its text or token ids, the last ones where it has several,
    unless they are to be truncated.
    """
    size, prompt, num_messages, params = 0, (0, True), 0, b""
    for number, start, end in fields(data):
        if number == _PARAMS:
            size += end - start
            params = data[start:end]
        elif number in (_TEXT, _TOKEN_IDS):
            prompt = end - start, number == _TEXT
        elif number == _MESSAGES:  # a conversation that is sent in several fields is one
            num_messages += count_fields(data[start:end], MAX_MESSAGES + 1 - num_messages)
    if num_messages > MAX_MESSAGES:
        raise DecodeError(f"messages has more than {MAX_MESSAGES} messages; leave out old ones")
    if size > MAX_PARAMS_BYTES:
        raise DecodeError(
            f"sampling_params has {size} bytes; at most {MAX_PARAMS_BYTES} are allowed: send fewer stops or token ids"
        )
    if not has_field(params, _TRUNCATE):
        check_prompt_bytes(*prompt)


def check_detokenize(data: bytes) -> None:
    """Raises ValueError when an unparsed DetokenizeRequest, of few fields, has too many token ids: parsing four million
    takes 30 ms, and counting them one.
    """
    number = pb.DetokenizeRequest.TOKEN_IDS_FIELD_NUMBER
    counts = (_count_varints(data[start:end]) for found, start, end in fields(data) if found == number)
    check_count("token_ids", sum(counts), MAX_DETOKENIZED, "ids")


def _count_varints(data: bytes) -> int:
    """Returns the number of varints in a row: the last byte of each has its highest bit clear."""
    numbers = np.frombuffer(data, np.uint8)
    blocks = (numbers[start : start + _BLOCK] for start in range(0, len(numbers), _BLOCK))
    return sum(int(np.count_nonzero(block < 0x80)) for block in blocks)


def has_field(data: bytes | memoryview, number: int) -> bool:
    """Tells whether an unparsed message has a field of this number."""
    return any(found == number for found, _, _ in fields(data))


def count_fields(data: bytes, most: int) -> int:
    """Returns the number of fields of a message, or `most` where it has as many."""
    return sum(1 for _ in itertools.islice(fields(data), most))


def check_field_count(count: int) -> None:
    """Raises DecodeError for more fields than a request has."""
    if count > MAX_FIELDS:
        raise DecodeError(
            f"it has more than {MAX_FIELDS} fields; send each field once, and repeated numbers as one (packed)"
        )


def fields(data: bytes | memoryview) -> Iterator[tuple[int, int, int]]:
    """Yields the number of each field of a message, and where its value begins and ends. Malformed data is left to the
    parser.
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
        yield tag >> 3, start, place


def _varint(data: bytes | memoryview, place: int) -> tuple[int, int]:
    """Decodes a varint; returns it and the offset behind it."""
    value = 0
    for index, byte in enumerate(data[place : place + 10]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, place + index + 1
    return value, len(data)
