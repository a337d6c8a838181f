"""Converts between the messages of vllm.grpc.engine and jaxserve's types.

Most fields of these messages have no presence: a zero is what a client sends that does not set them, and means unset.
So does an empty text or list. Fields that have presence are unset when they are absent, and zero is then a value. A
field that is set and that is neither the engine's, nor neutral, nor without effect here, is refused by its name; so is
one that a newer package adds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf import message
from google.protobuf.message import DecodeError
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxserve.config.plain_params import params_of, plain_fields
from jaxserve.config.shown import shown
from jaxserve.frontend.delta import Delta, PromptLogprobs
from jaxserve.logprob_columns import LogprobColumns
from jaxserve.request import FinishReason
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.grpc_port.oversized import (
    LARGE,
    MAX_PARAMS_BYTES,
    CheckPromptBytes,
    check_field_count,
    fields,
    has_field,
)
from jaxserve.serving.grpc_port.proto_values import read_fields

CONSTRAINTS: Mapping[str, str] = {
    "json_schema": "json",
    "regex": "regex",
    "grammar": "grammar",
    "structural_tag": "structural_tag",
    "json_object": "json_object",
    "choice": "choice",
}
"""Fields of structured_outputs by the gateway's names."""

_FIRST_TOKEN = "grammar_from_first_token"
"""Asks that a constraint begin at the first token, which it always does here."""

_NEUTRAL_REQUEST: Mapping[str, tuple[Any, ...]] = {"kv_transfer_params_json": ("",), "data_parallel_rank": (0,)}
_REQUEST = frozenset({"request_id", "tokenized", "text", "sampling_params", "stream"})

_REASONS = {
    FinishReason.STOP: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.ABORT: "abort",
    FinishReason.ERROR: "error",
    FinishReason.DEADLINE: "error",
}
"""The gateway's words for finish reasons. Those that are errors are statuses, too."""

_NUMBERS = {name: field.number for name, field in pb.GenerateRequest.DESCRIPTOR.fields_by_name.items()}
_TRUNCATE = pb.SamplingParams.DESCRIPTOR.fields_by_name["truncate_prompt_tokens"].number
_EMBED_TOKENIZED = pb.EmbedRequest.DESCRIPTOR.fields_by_name["tokenized"].number
_ORIGINAL_TEXT = pb.TokenizedInput.DESCRIPTOR.fields_by_name["original_text"].number


def params_from_proto(proto: pb.SamplingParams, defaults: Mapping[str, Any] = {}) -> SamplingParams:
    """Returns the sampling parameters of a request. Raises ValueError naming the field.

    The text of the output is made by the gateway of the token ids, which include the token that completes a stop
    string: parameters about the text alone change nothing here.

    defaults: of unset fields, where the checkpoint has its own.
    """
    rows = plain_fields()
    values: dict[str, Any] = {}
    plain = read_fields(proto)
    for field, value in proto.ListFields():  # those that are set
        name = field.name
        if name in rows:
            values[name] = plain[name]
        elif name in CONSTRAINTS:
            if not (name == "json_object" and not value):
                values["structured_outputs"] = {CONSTRAINTS[name]: plain[name]}
        elif name != _FIRST_TOKEN:
            _refuse(field, value)
    return params_of(values, defaults)


def check_request(request: pb.GenerateRequest) -> None:
    """Raises ValueError naming a field of the request that asks for what this server does not do."""
    for field, value in request.ListFields():
        if field.name not in _REQUEST and value not in _NEUTRAL_REQUEST.get(field.name, ()):
            _refuse(field, value)


def _refuse(field: Any, value: Any) -> None:
    # A message may be large, and its representation larger.
    said = "set" if field.is_repeated or isinstance(value, message.Message) else shown(value)
    raise ValueError(f"{field.name} is {said}; this engine does not support it: leave it out")


def prompt_from_proto(request: pb.GenerateRequest) -> str | Sequence[int]:
    """Returns the prompt as text or token ids, which are not copied. Raises ValueError when there is none."""
    match request.WhichOneof("input"):
        case "text":
            text = request.text  # decoded anew each time
            if not text:
                raise ValueError("text is empty; the prompt needs at least one token")
            return text
        case "tokenized":
            if not request.tokenized.input_ids:
                raise ValueError("input_ids of tokenized is empty; the prompt needs at least one token")
            return request.tokenized.input_ids
        case _:
            raise ValueError("input is not set; give text or tokenized")


def ids_of_embed(request: pb.EmbedRequest) -> Sequence[int]:
    """Returns the token ids of a request for an embedding, not copied. Raises ValueError when there are none."""
    if not request.tokenized.input_ids:
        raise ValueError("input_ids of tokenized is empty; the prompt needs at least one token")
    return request.tokenized.input_ids


def check_embed(data: bytes, check_prompt_bytes: CheckPromptBytes) -> None:
    """Raises for an unparsed EmbedRequest as `check_generate` does."""
    others, ids = 0, 0
    for count, (number, start, end) in enumerate(fields(data), start=1):
        check_field_count(count)
        if number == _EMBED_TOKENIZED:
            ids += _id_bytes(memoryview(data)[start:end])
        else:
            others += end - start
    if others > MAX_PARAMS_BYTES:
        raise DecodeError(f"the fields beside the prompt have {others} bytes; at most {MAX_PARAMS_BYTES} are allowed")
    check_prompt_bytes(ids, False)


def check_generate(data: bytes, check_prompt_bytes: CheckPromptBytes) -> None:
    """Raises DecodeError when an unparsed GenerateRequest has more bytes outside its prompt than a request needs, and
    whatever `check_prompt_bytes` raises for its prompt.
    """
    others, ids, text, params = 0, 0, 0, b""
    for count, (number, start, end) in enumerate(fields(data), start=1):
        check_field_count(count)
        if number == _NUMBERS["text"]:
            text = end - start
        elif number == _NUMBERS["tokenized"]:  # several are merged
            ids += _id_bytes(memoryview(data)[start:end])
        else:
            others += end - start
            if number == _NUMBERS["sampling_params"]:
                params = data[start:end]
    if others > MAX_PARAMS_BYTES:
        raise DecodeError(
            f"the fields beside the prompt have {others} bytes; at most {MAX_PARAMS_BYTES} are allowed: send fewer"
        )
    if not has_field(params, _TRUNCATE):
        check_prompt_bytes(max(ids, text), text > ids)


def _id_bytes(tokenized: memoryview) -> int:
    """Returns the bytes of a TokenizedInput that are not its original text, which nobody reads."""
    size = len(tokenized)
    for count, (number, start, end) in enumerate(fields(tokenized), start=1):
        if count > 4:  # ids that are not packed, a field each
            break
        size -= end - start if number == _ORIGINAL_TEXT else 0
    return size


def check_small(data: bytes) -> None:
    """Raises DecodeError: no request but Generate's needs so many bytes."""
    raise DecodeError(f"it has {len(data)} bytes; at most {LARGE} are allowed")


def chunk(delta: Delta) -> pb.GenerateResponse:
    """Returns the message that carries the new ids of a delta; its completion_tokens count these ids alone."""
    prompt = delta.prompt_logprobs
    return pb.GenerateResponse(
        chunk=pb.GenerateStreamChunk(
            token_ids=delta.token_ids,
            prompt_tokens=delta.prompt_tokens,
            completion_tokens=len(delta.token_ids),
            cached_tokens=delta.cached_tokens,
            output_logprobs=None if delta.logprobs is None else output_logprobs(delta.logprobs, delta.token_ids),
            input_logprobs=None if prompt is None else input_logprobs(prompt),
            index=delta.index,
        )
    )


def output_logprobs(columns: LogprobColumns, token_ids: Sequence[int]) -> pb.OutputLogProbs:
    """Returns the log-probabilities of output tokens."""
    return pb.OutputLogProbs(token_logprobs=columns.values, token_ids=token_ids, top_logprobs=_top_logprobs(columns))


def input_logprobs(prompt: PromptLogprobs) -> pb.InputLogProbs:
    """Returns the log-probabilities of a prompt's tokens; the first has none."""
    unknown, columns = prompt.start, prompt.columns
    return pb.InputLogProbs(
        token_logprobs=[pb.InputTokenLogProb()] * unknown
        + [pb.InputTokenLogProb(value=value) for value in columns.values.tolist()],
        token_ids=prompt.token_ids,
        top_logprobs=[pb.TopLogProbs()] * unknown + _top_logprobs(columns),
    )


def _top_logprobs(columns: LogprobColumns) -> list[pb.TopLogProbs]:
    pairs = zip(columns.top_values.tolist(), columns.top_ids.tolist(), strict=True)
    return [pb.TopLogProbs(values=values, token_ids=token_ids) for values, token_ids in pairs]


def complete(delta: Delta, output_ids: Sequence[int], params: SamplingParams) -> pb.GenerateResponse:
    """Returns the last message of a sample. delta: its last one. output_ids: all of its ids."""
    assert delta.finish_reason is not None
    answer = pb.GenerateComplete(
        output_ids=output_ids,
        finish_reason=_REASONS[delta.finish_reason],
        prompt_tokens=delta.prompt_tokens,
        completion_tokens=len(output_ids),
        cached_tokens=delta.cached_tokens,
        index=delta.index,
    )
    if delta.stop_string is not None:
        answer.matched_stop_str = delta.stop_string
    elif delta.finish_reason is FinishReason.STOP and output_ids and output_ids[-1] in params.stop_token_ids:
        answer.matched_token_id = output_ids[-1]
    return pb.GenerateResponse(complete=answer)
