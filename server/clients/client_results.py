"""Defines what the clients of both ports take and return."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jaxserve.config.plain_params import params_of
from jaxserve.request import FinishReason, RequestOutputKind, SamplingParams


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Holds a prompt for the model's chat template: messages with a role and content, and a name where given."""

    messages: Sequence[Mapping[str, str]]


Prompt = str | Sequence[int] | Conversation
"""A text, token ids, or a conversation."""

Params = SamplingParams | Mapping[str, Any] | None
"""Sampling parameters: all of them, or plain values of some by name; the server has its own defaults of the others, and
with None of all.
"""


def holds_news(params: Params) -> bool:
    """Tells whether the chunks of a request's stream hold what is new; else each holds all of the output so far."""
    if params is None:
        return True
    kind = (params if isinstance(params, SamplingParams) else params_of(params, {})).output_kind
    return kind in (None, RequestOutputKind.DELTA)


@dataclasses.dataclass(frozen=True)
class Usage:
    """Token counts of a finished request.

    cached_tokens: of the prompt, found in the prefix cache. truncated_tokens: cut off the prompt.
    """

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    truncated_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One message of a stream: new token ids and text, and in the last one the finish reason and usage.

    With an output_kind other than delta, each has all token ids and all text so far.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """A complete response."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    usage: Usage


class ModelInfo(Protocol):
    """Describes the served model; what both ports say of it."""

    @property
    def name(self) -> str: ...

    @property
    def max_model_len(self) -> int: ...


def join(chunks: Sequence[Chunk], params: Params = None) -> Completion:
    """Joins the chunks of one finished stream. params: of the request; what a chunk holds depends on them."""
    last = chunks[-1]
    if last.finish_reason is None or last.usage is None:
        raise ValueError(f"request {last.request_id} has no finish reason yet; join takes a finished stream")
    if not holds_news(params):
        chunks = chunks[-1:]
    return Completion(
        request_id=last.request_id,
        token_ids=tuple(token_id for chunk in chunks for token_id in chunk.token_ids),
        text="".join(chunk.text for chunk in chunks),
        finish_reason=last.finish_reason,
        usage=last.usage,
    )


def chunk_record(chunk: Chunk) -> dict[str, Any]:
    """Returns a chunk as JSON has it."""
    record = dataclasses.asdict(chunk)
    return record | {"finish_reason": None if chunk.finish_reason is None else chunk.finish_reason.value}
