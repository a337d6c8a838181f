"""Converts between the messages on the wire and jaxserve's types, for server and client alike."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from google.protobuf import message
from google.protobuf.unknown_fields import UnknownFieldSet

from jaxserve.config.plain_params import params_of, written
from jaxserve.config.sampling_fields import check_count
from jaxserve.config.shown import shown
from jaxserve.frontend.delta import PromptLogprobs
from jaxserve.frontend.openai_messages import parse_messages
from jaxserve.logprob_columns import LogprobColumns
from jaxserve.request import FinishReason, RequestOptions
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.access.callers import Caller
from jaxserve.serving.access.request_headers import request_options
from jaxserve.serving.grpc_port.proto_values import made, read_fields
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}
_REASONS_BACK = {number: reason for reason, number in _REASONS.items()}

_PARAMETERS = {field.name: field for field in pb.SamplingParams.DESCRIPTOR.fields}
"""Parameters of the wire format, each a row of the table of sampling fields, by name."""

_MAPS = frozenset(
    name for name, field in _PARAMETERS.items() if field.message_type and field.message_type.GetOptions().map_entry
)
"""Parameters that the wire holds as maps."""

MAX_MESSAGES = 4096
"""Maximum number of messages of one conversation."""

_MOST_LOGPROBS = 16 * 1024
"""Maximum number of log-probabilities of a prompt in one response."""

_SMALL = 64 * 1024
"""Size in bytes of a part of a request up to which its unknown fields may be listed."""


def params_to_proto(params: SamplingParams | Mapping[str, Any]) -> pb.SamplingParams:
    """Returns the message that `params_from_proto` reads back unchanged.

    params: all parameters; or plain values of some: the server has its own defaults of the others.

    Raises ValueError for values that are not allowed, or that the wire cannot carry.
    """
    values = written(params)
    for name in values:
        if name not in _PARAMETERS:
            raise ValueError(f"{name} is {shown(values[name])}; the gRPC API does not have it: leave it out")
    return made(pb.SamplingParams, values)


def params_from_proto(proto: pb.SamplingParams, defaults: Mapping[str, Any] = {}) -> SamplingParams:
    """Returns the sampling parameters of a request. Raises ValueError naming the field.

    defaults: of unset fields, where the checkpoint has its own.
    """
    return params_of(read_fields(proto), defaults)


def messages_from_proto(request: pb.GenerateRequest | pb.WarmPrefixRequest) -> list[dict[str, str]]:
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


def prompt_from_proto(request: pb.GenerateRequest | pb.WarmPrefixRequest) -> str | Sequence[int]:
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
    request: pb.GenerateRequest | pb.EmbedRequest | pb.ScoreRequest | pb.WarmPrefixRequest,
    call_deadline: float | None,
    caller: Caller = Caller(),
    metadata: Mapping[str, str] = {},
) -> RequestOptions:
    """Returns the request's options; its deadline is the earliest of its own, the call's and the metadata's.

    Raises ValueError naming the field.
    """
    asked = RequestOptions(
        tenant=request.tenant,
        priority=request.priority,
        deadline=deadline_from_proto(request, call_deadline),
        cache_salt=request.cache_salt,
        prefix_caching=isinstance(request, pb.WarmPrefixRequest)
        or not request.HasField("prefix_caching")
        or request.prefix_caching,
    )
    return request_options(caller, metadata, asked)


def deadline_from_proto(
    request: pb.GenerateRequest | pb.EmbedRequest | pb.ScoreRequest | pb.WarmPrefixRequest, call_deadline: float | None
) -> float | None:
    """Returns the earlier of the request's deadline and the call's, in Unix seconds; None when there is neither.

    Raises ValueError for one that is not finite.
    """
    if not request.HasField("deadline"):
        return call_deadline
    if not math.isfinite(request.deadline):
        raise ValueError(f"deadline is {request.deadline}; it must be a finite number of seconds since 1970")
    return request.deadline if call_deadline is None else min(request.deadline, call_deadline)


def logprobs_to_proto(columns: LogprobColumns, token_ids: Sequence[int]) -> list[pb.TokenLogprobs]:
    """Returns the messages of tokens, one for each of `token_ids`."""
    rows = zip(
        token_ids,
        columns.values.tolist(),
        columns.ranks.tolist(),
        columns.top_ids.tolist(),
        columns.top_values.tolist(),
        strict=True,
    )
    return [
        pb.TokenLogprobs(token_id=token_id, logprob=value, rank=rank, top_ids=top_ids, top_logprobs=top_values)
        for token_id, value, rank, top_ids, top_values in rows
    ]


def prompt_logprobs_to_proto(prompt: PromptLogprobs) -> Iterator[list[pb.TokenLogprobs]]:
    """Yields the messages of a prompt's tokens in blocks, each small enough for one response."""
    columns, start = prompt.columns, prompt.start
    block = [pb.TokenLogprobs(token_id=token_id) for token_id in prompt.token_ids[:start]]
    size = max(1, _MOST_LOGPROBS // (1 + columns.width))
    for begin in range(0, max(1, len(columns)), size):
        part = columns.part(begin, begin + size)
        yield block + logprobs_to_proto(part, prompt.token_ids[start + begin : start + begin + len(part)])
        block = []


def reason_to_proto(reason: FinishReason | None) -> pb.FinishReason:
    """Returns the wire's finish reason; None is FINISH_REASON_UNSPECIFIED."""
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
