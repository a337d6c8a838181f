"""Defines what the clients of both ports take and return."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jaxserve.request import FinishReason


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Holds a prompt for the model's chat template: messages with a role and content, and a name where given."""

    messages: Sequence[Mapping[str, str]]


Prompt = str | Sequence[int] | Conversation
"""A text, token ids, or a conversation."""


@dataclasses.dataclass(frozen=True)
class Usage:
    """Token counts of a finished request; cached_tokens are the prompt's tokens found in the prefix cache."""

    prompt_tokens: int
    output_tokens: int
    cached_tokens: int


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One message of a stream: new token ids and text of a sample, and in its last one the finish reason and usage.

    usage: of the sample over gRPC; over HTTP, of all samples, in the last message of the stream. index: of the sample.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    index: int = 0


@dataclasses.dataclass(frozen=True)
class Completion:
    """A complete response, or one sample of it: usage and index are as in `Chunk`."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    usage: Usage
    index: int = 0


class ModelInfo(Protocol):
    """Describes the served model; what both ports say of it."""

    @property
    def name(self) -> str: ...

    @property
    def max_model_len(self) -> int: ...


def join(chunks: Sequence[Chunk]) -> Completion:
    """Joins the chunks of one finished stream, or those of one sample of it."""
    last = chunks[-1]
    if any(chunk.index != last.index for chunk in chunks):
        raise ValueError(f"request {last.request_id} has several samples; join_samples takes its chunks")
    if last.finish_reason is None or last.usage is None:
        raise ValueError(f"request {last.request_id} has no finish reason yet; join takes a finished stream")
    return Completion(
        request_id=last.request_id,
        token_ids=tuple(token_id for chunk in chunks for token_id in chunk.token_ids),
        text="".join(chunk.text for chunk in chunks),
        finish_reason=last.finish_reason,
        usage=last.usage,
        index=last.index,
    )


def join_samples(chunks: Sequence[Chunk]) -> list[Completion]:
    """Joins the chunks of one finished stream to a completion for each sample, in the order of their indices."""
    samples: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        samples.setdefault(chunk.index, []).append(chunk)
    return [join(samples[index]) for index in sorted(samples)]


def chunk_record(chunk: Chunk) -> dict[str, Any]:
    """Returns a chunk as JSON has it."""
    record = dataclasses.asdict(chunk)
    return record | {"finish_reason": None if chunk.finish_reason is None else chunk.finish_reason.value}
