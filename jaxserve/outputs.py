"""Outputs of `LLM` and `AsyncLLM`; names follow vLLM's."""

from __future__ import annotations

import dataclasses
import math

from jaxserve.embedding_output import EmbeddingOutput, EmbeddingRequestOutput
from jaxserve.frontend.logprob_outputs import PositionLogprobs, position_logprobs, prompt_positions
from jaxserve.frontend.offline import FinishedRequest
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.logprob_columns import LogprobColumns
from jaxserve.request import FinishReason


@dataclasses.dataclass(frozen=True)
class CompletionOutput:
    """Holds one generated output. index: of the sample (n).

    text: continues the prompt, so that both together are the text of all tokens; special tokens are not shown.
    finish_reason: "stop", "length", "deadline" when its deadline passed or was out of reach, or "error" when this
    request failed in the engine; "abort" and, before the end, None of AsyncLLM alone.
    logprobs: of each token, by token id, and cumulative_logprob: the sum of the tokens' own, where they are wanted.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    logprobs: list[PositionLogprobs] | None = None
    cumulative_logprob: float | None = None


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """Holds a prompt and its result. outputs: one for each of the n samples.

    prompt: None when token ids were given. num_cached_tokens: prompt tokens taken from the prefix cache.
    error: one line when an output's finish_reason is "deadline" or "error": that of the first such one.
    num_truncated_tokens: cut off the beginning of the prompt, as truncate_prompt_tokens asks; prompt_token_ids are the
    others.
    prompt_logprobs: of each token of the prompt, by token id, where they are wanted; None for the first.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    num_cached_tokens: int
    error: str = ""
    num_truncated_tokens: int = 0
    prompt_logprobs: list[PositionLogprobs | None] | None = None


def embedding_request_output(text: str | None, completion: FinishedRequest) -> EmbeddingRequestOutput:
    return EmbeddingRequestOutput(
        request_id=completion.request_id,
        prompt=text,
        prompt_token_ids=completion.prompt_token_ids,
        outputs=EmbeddingOutput.from_bytes(completion.embedding),
        num_cached_tokens=completion.num_cached_tokens,
        error=completion.error,
        num_truncated_tokens=completion.num_truncated_tokens,
    )


def completion_output(
    index: int,
    text: str,
    token_ids: tuple[int, ...],
    finish_reason: FinishReason | None,
    logprobs: LogprobColumns | None,
    tokenizer: Tokenizer | None,
) -> CompletionOutput:
    """Returns an output of a request. logprobs: of the token ids, where they are wanted. tokenizer: gives the texts of
    ids that have log-probabilities."""
    positions = None if logprobs is None else position_logprobs(logprobs, token_ids, tokenizer)
    return CompletionOutput(
        index=index,
        text=text,
        token_ids=token_ids,
        finish_reason=None if finish_reason is None else finish_reason.value,
        logprobs=positions,
        cumulative_logprob=None if logprobs is None else math.fsum(logprobs.values.tolist()),
    )


def request_output(text: str | None, completion: FinishedRequest, tokenizer: Tokenizer | None) -> RequestOutput:
    outputs = [
        completion_output(index, sample.text, sample.token_ids, sample.finish_reason, sample.logprobs, tokenizer)
        for index, sample in enumerate(completion.samples)
    ]
    prompt_logprobs = None
    if completion.prompt_logprobs is not None:
        prompt_logprobs = prompt_positions(completion.prompt_logprobs, tokenizer)
    return RequestOutput(
        request_id=completion.request_id,
        prompt=text,
        prompt_token_ids=completion.prompt_token_ids,
        outputs=tuple(outputs),
        finished=True,
        num_cached_tokens=completion.num_cached_tokens,
        error=completion.error,
        num_truncated_tokens=completion.num_truncated_tokens,
        prompt_logprobs=prompt_logprobs,
    )
