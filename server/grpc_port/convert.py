"""Converts between the messages on the wire and jaxserve's types, for server and client alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from google.protobuf import message
from google.protobuf.unknown_fields import UnknownFieldSet

from jaxserve.config.sampling_fields import check_count
from jaxserve.config.shown import shown
from jaxserve.frontend.openai_messages import parse_messages
from jaxserve.request import SAMPLING_FIELDS, FinishReason, RequestOptions, SamplingParams
from jaxserve.serving.access.callers import Caller
from jaxserve.serving.access.request_headers import request_options
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
}
_REASONS_BACK = {number: reason for reason, number in _REASONS.items()}

_PARAMETERS = {field.name: field for field in pb.SamplingParams.DESCRIPTOR.fields}
"""Parameters of the wire format, each a row of the table of sampling fields, by name."""

MAX_MESSAGES = 4096
"""Maximum number of messages of one conversation."""

_SMALL = 64 * 1024
"""Size in bytes of a part of a request up to which its unknown fields may be listed."""


def params_to_proto(params: SamplingParams) -> pb.SamplingParams:
    """Returns the message that `params_from_proto` reads back unchanged.

    Raises ValueError for values the wire cannot carry.
    """
    for name, row in SAMPLING_FIELDS.items():
        if name not in _PARAMETERS and getattr(params, name) != row.default:
            raise ValueError(f"{name} is {shown(getattr(params, name))}; the gRPC API does not have it: leave it out")
    return pb.SamplingParams(**{name: getattr(params, name) for name in _PARAMETERS})


def params_from_proto(proto: pb.SamplingParams) -> SamplingParams:
    """Returns the sampling parameters of a request; unset fields have defaults. Raises ValueError naming the field."""
    return SamplingParams(
        **{
            name: getattr(proto, name)
            for name, field in _PARAMETERS.items()
            if not field.has_presence or proto.HasField(name)
        }
    )


def messages_from_proto(request: pb.GenerateRequest) -> list[dict[str, str]]:
    """Returns a request's conversation as chat templates take it. Raises ValueError naming the message."""
    proto = request.messages
    check_count("messages", len(proto.messages), MAX_MESSAGES, "messages")
    refuse_unknown_fields(proto, *proto.messages)
    return parse_messages(
        [
            {"role": message.role, "content": message.content}
            | ({"name": message.name} if message.HasField("name") else {})
            for message in proto.messages
        ]
    )


def prompt_from_proto(request: pb.GenerateRequest) -> str | Sequence[int]:
    """Returns the prompt as text or token ids, which are not copied. Raises ValueError when there is none."""
    match request.WhichOneof("prompt"):
        case "text":
            text = request.text  # decoded anew each time
            if not text:
                raise ValueError("text is empty; the prompt needs at least one token")
            return text
        case "token_ids":
            if not request.token_ids.ids:
                raise ValueError("token_ids is empty; the prompt needs at least one token")
            return request.token_ids.ids
        case _:
            raise ValueError("prompt is not set; give text, token_ids or messages")


def options_from_proto(
    request: pb.GenerateRequest | pb.EmbedRequest | pb.ScoreRequest,
    call_deadline: float | None,
    caller: Caller = Caller(),
    metadata: Mapping[str, str] = {},
) -> RequestOptions:
    """Returns the request's identity options; its deadline is the earliest of its own, the call's and the metadata's.

    Raises ValueError naming the field.
    """
    return request_options(
        caller,
        metadata,
        tenant=request.tenant,
        priority=request.priority,
        deadline=deadline_from_proto(request, call_deadline),
        cache_salt=request.cache_salt,
    )


def deadline_from_proto(
    request: pb.GenerateRequest | pb.EmbedRequest | pb.ScoreRequest, call_deadline: float | None
) -> float | None:
    """Returns the earlier of the request's deadline and the call's, in Unix seconds; None when there is neither.

    Raises ValueError for one that is not finite.
    """
    if not request.HasField("deadline"):
        return call_deadline
    if not math.isfinite(request.deadline):
        raise ValueError(f"deadline is {request.deadline}; it must be a finite number of seconds since 1970")
    return request.deadline if call_deadline is None else min(request.deadline, call_deadline)


def reason_to_proto(reason: FinishReason | None) -> pb.FinishReason:
    """Returns the wire's finish reason; None is FINISH_REASON_UNSPECIFIED. ERROR has none: it is a status code."""
    return pb.FINISH_REASON_UNSPECIFIED if reason is None else _REASONS[reason]


def reason_from_proto(reason: pb.FinishReason) -> FinishReason | None:
    """Returns the finish reason of a response, or None while there is none. Raises ValueError for an unknown one."""
    if reason == pb.FINISH_REASON_UNSPECIFIED:
        return None
    if reason not in _REASONS_BACK:
        raise ValueError(f"finish_reason is {reason}; this client does not know it")
    return _REASONS_BACK[reason]


def refuse_unknown_fields(*messages: message.Message) -> None:
    """Raises ValueError when a message has fields that our proto does not define: a newer client's option, or a typo in
    a hand-written message, must not be ignored silently.

    It takes a microsecond per unknown field. Those of a whole request are few (`oversized.check_few_fields`).
    """
    for proto in messages:
        if unknown := UnknownFieldSet(proto):
            number = unknown[0].field_number
            raise ValueError(f"{proto.DESCRIPTOR.name} has unknown field {number}; this server does not support it")


def refuse_unknown_bytes(part: message.Message) -> None:
    """Raises ValueError as `refuse_unknown_fields` does, for a part of a request, which may have a million fields."""
    size = part.ByteSize()
    if size <= _SMALL:
        refuse_unknown_fields(part)
        return
    part.DiscardUnknownFields()
    if unknown_bytes := size - part.ByteSize():
        name = part.DESCRIPTOR.name
        raise ValueError(f"{name} has {unknown_bytes} bytes of unknown fields; this server does not support them")
