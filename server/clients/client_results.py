"""Defines what the clients of both ports take and return."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jaxserve.config.plain_params import params_of
from jaxserve.request import FinishReason
from jaxserve.sampling_params import RequestOutputKind, SamplingParams


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
class TokenLogprob:
    """Holds the log-probability of a token and its rank (1 is the likeliest), which the first token of a prompt lacks,
    and the likeliest ids with theirs. Over HTTP there is no rank."""

    token_id: int
    logprob: float | None = None
    rank: int | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Chunk:
    """One message of a stream: new token ids and text of a sample, and in its last one the finish reason and usage.

    With an output_kind other than delta, each has all token ids and all text so far. logprobs: of the token ids, and
    prompt_logprobs: of the prompt, where they are wanted. usage: of the sample over gRPC; over HTTP, of all samples, in
    the last message of the stream. index: of the sample.
    """

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    index: int = 0


@dataclasses.dataclass(frozen=True)
class Completion:
    """A complete response, or one sample of it: logprobs, prompt_logprobs, usage and index are as in `Chunk`."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    index: int = 0


class ModelInfo(Protocol):
    """Describes the served model; what both ports say of it."""

    @property
    def name(self) -> str: ...

    @property
    def max_model_len(self) -> int: ...


def join(chunks: Sequence[Chunk], params: Params = None) -> Completion:
    """Joins the chunks of one finished stream, or those of one sample of it. params: of the request; what a chunk holds
    depends on them."""
    last = chunks[-1]
    if any(chunk.index != last.index for chunk in chunks):
        raise ValueError(f"request {last.request_id} has several samples; join_samples takes its chunks")
    if last.finish_reason is None or last.usage is None:
        raise ValueError(f"request {last.request_id} has no finish reason yet; join takes a finished stream")
    shown = chunks
    if not holds_news(params):
        shown = chunks[-1:]
    return Completion(
        request_id=last.request_id,
        token_ids=tuple(token_id for chunk in shown for token_id in chunk.token_ids),
        text="".join(chunk.text for chunk in shown),
        finish_reason=last.finish_reason,
        usage=last.usage,
        logprobs=tuple(one for chunk in shown for one in chunk.logprobs),
        prompt_logprobs=tuple(one for chunk in chunks for one in chunk.prompt_logprobs),
        index=last.index,
    )


def join_samples(chunks: Sequence[Chunk], params: Params = None) -> list[Completion]:
    """Joins the chunks of one finished stream to a completion for each sample, in the order of their indices."""
    samples: dict[int, list[Chunk]] = {}
    for chunk in chunks:
        samples.setdefault(chunk.index, []).append(chunk)
    return [join(samples[index], params) for index in sorted(samples)]


def record_of(result: Chunk | Completion) -> dict[str, Any]:
    """Returns a result as JSON has it; log-probabilities and truncated tokens only where there are any."""
    record = dataclasses.asdict(result)
    if result.usage is not None and not result.usage.truncated_tokens:
        del record["usage"]["truncated_tokens"]
    for name in ("logprobs", "prompt_logprobs"):
        if not record[name]:
            del record[name]
    return record | {"finish_reason": None if result.finish_reason is None else result.finish_reason.value}
