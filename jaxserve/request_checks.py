"""Checks a request against what depends on the model: its vocabulary, its context and the page pool."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxserve.config.id_checks import first_wrong_id
from jaxserve.config.logprobs_config import MAX_LOGPROBS
from jaxserve.config.parallel_samples import DEFAULT_MAX_N
from jaxserve.config.shown import shown
from jaxserve.request import Pooling
from jaxserve.sampling_params import SamplingParams

MAX_PROMPT_LOGPROBS = 2**24
"""Maximum number of log-probabilities of a prompt, those of the likeliest ids included: they come in one message."""


class InfeasibleError(ValueError):
    """Signals a well-formed request that this server could never run, however long it waits."""


@dataclasses.dataclass(frozen=True)
class ModelLimits:
    """Holds the limits of a running engine that a request is checked against.

    vocab_size: token ids lie in [0, vocab_size).
    max_model_len: prompt and output tokens of one request together, at most.
    pool_tokens: tokens that the whole page pool can hold for one request.
    max_prompt_len: prompt tokens at most (less than max_model_len only when chunked prefill is off).
    eos_token_ids: the model's own stop ids.
    default_max_tokens: of requests that set none, as far as there is room; None: all of the room.
    max_logprobs: likeliest ids of one position that a request may ask for.
    logprobs_mode: what log-probabilities are, as `LogprobsConfig.logprobs_mode`.
    max_n: samples of one request, at most. embedding_size: numbers in an embedding, unless fewer are asked for.
    pooling, normalize: how embeddings are made where a request does not say.
    """

    vocab_size: int
    max_model_len: int
    pool_tokens: int
    max_prompt_len: int
    eos_token_ids: tuple[int, ...]
    default_max_tokens: int | None = None
    max_logprobs: int = MAX_LOGPROBS
    logprobs_mode: str = "raw_logprobs"
    max_n: int = DEFAULT_MAX_N
    embedding_size: int = 0
    pooling: Pooling = Pooling.LAST
    normalize: bool = True

    def room(self, length: int, min_tokens: int) -> int:
        """Returns the output tokens of a request that sets no limit, behind a prompt of `length` tokens."""
        rest = self.max_model_len - length
        return rest if self.default_max_tokens is None else min(rest, max(self.default_max_tokens, min_tokens))

    def most_prompt_tokens(self, max_tokens: int) -> int:
        """Returns the longest prompt beside `max_tokens` output tokens; below 1 where there is no room for one."""
        return min(self.max_prompt_len, self.max_model_len - max_tokens, self.pool_tokens - max_tokens + 1)

    def resolved_logprobs(self, wanted: int | None) -> int | None:
        """Returns how many of the likeliest ids a checked `logprobs` or `prompt_logprobs` asks for."""
        return self.max_logprobs if wanted == -1 else wanted


def check_logprobs(params: SamplingParams, limits: ModelLimits, name_of_output: str = "logprobs") -> None:
    """Checks what a request asks for of log-probabilities, in constant time. Raises ValueError naming the field.

    name_of_output: the field that the client gave for `logprobs`.
    """
    for name, wanted in ((name_of_output, params.logprobs), ("prompt_logprobs", params.prompt_logprobs)):
        if wanted is not None and wanted > limits.max_logprobs:
            raise ValueError(
                f"{name} is {wanted}; this server returns at most max_logprobs {limits.max_logprobs} ids: ask for "
                "fewer, or raise LogprobsConfig.max_logprobs"
            )


def check_samples(params: SamplingParams, limits: ModelLimits) -> None:
    """Checks how many samples are asked for, before anything is done for one. Raises ValueError."""
    if params.n > limits.max_n:
        raise ValueError(
            f"n is {params.n}; at most {limits.max_n} samples of one request are allowed (max_n, and max_num_seqs + "
            "max_num_waiting): lower it or send several requests"
        )


def validate_request(prompt_token_ids: Sequence[int], params: SamplingParams, limits: ModelLimits) -> int:
    """Checks a prompt and its parameters against the engine; returns the resolved max_tokens.

    The prompt's length is checked before its ids. Raises ValueError (the client's fault) or InfeasibleError (fits the
    context, never the pool), each naming the field, its value and the limit.
    """
    check_samples(params, limits)
    max_tokens = check_length(len(prompt_token_ids), params, limits)
    check_logprobs(params, limits)
    width = limits.resolved_logprobs(params.prompt_logprobs)
    if width is not None and (total := len(prompt_token_ids) * (1 + width)) > MAX_PROMPT_LOGPROBS:
        raise ValueError(
            f"prompt_logprobs is {params.prompt_logprobs}; for {len(prompt_token_ids)} tokens, with {width} ids each, "
            f"these are {total} values, and at most {MAX_PROMPT_LOGPROBS} are allowed: ask for fewer ids"
        )
    check_token_ids(prompt_token_ids, limits)
    _check_ids(params, limits)
    return max_tokens


def check_token_ids(token_ids: Sequence[int], limits: ModelLimits) -> None:
    """Checks that the ids of a prompt are in the vocabulary. Raises ValueError."""
    if (index := first_wrong_id(token_ids, limits.vocab_size)) is not None:
        raise ValueError(
            f"prompt_token_ids[{index}] is {shown(token_ids[index])}; token ids must be whole numbers from 0 to "
            f"{limits.vocab_size - 1}"
        )


def _check_ids(params: SamplingParams, limits: ModelLimits) -> None:
    """Checks the token ids of sampling parameters against the vocabulary and each other."""
    for name, ids in (
        ("stop_token_ids", params.stop_token_ids),
        ("allowed_token_ids", params.allowed_token_ids or ()),
        ("logit_bias", [token_id for token_id, _ in params.logit_bias]),
    ):
        if ids and max(ids) >= limits.vocab_size:
            raise ValueError(f"{name} has {max(ids)}; token ids must be from 0 to {limits.vocab_size - 1}")
    stop = {*params.stop_token_ids, *(() if params.ignore_eos else limits.eos_token_ids)}
    if params.min_tokens and params.allowed_token_ids is not None and stop.issuperset(params.allowed_token_ids):
        raise ValueError(
            f"min_tokens is {params.min_tokens} and allowed_token_ids has only stop tokens, which cannot be drawn "
            "before that: allow another token, or lower min_tokens to 0"
        )


def check_length(length: int, params: SamplingParams, limits: ModelLimits, *, size: str = "") -> int:
    """Checks how long a prompt is; returns the resolved max_tokens. Raises as `validate_request` does.

    size: of a text that is not encoded to its end, as "9 characters"; `length` is then the fewest tokens that it can
    have. What is refused for that number is refused for every larger one.
    """
    known = not size
    prompt = f"prompt has {'' if known else f'{size}, at least '}{length} tokens"
    if known and not length:
        raise ValueError("prompt is empty; at least one token is needed")
    if length >= limits.max_model_len:
        raise ValueError(
            f"{prompt}; with at least one output token it must fit max_model_len {limits.max_model_len}: shorten the "
            "prompt"
        )
    if length > limits.max_prompt_len:
        raise ValueError(
            f"{prompt}; without chunked prefill at most max_num_batched_tokens {limits.max_prompt_len} are allowed: "
            "shorten it or enable chunked prefill"
        )
    max_tokens = limits.room(length, params.min_tokens) if params.max_tokens is None else params.max_tokens
    together = f"{prompt} and max_tokens is {max_tokens}; together {'' if known else 'at least '}{length + max_tokens}"
    if length + max_tokens > limits.max_model_len:
        raise ValueError(
            f"{together} exceed max_model_len {limits.max_model_len}: lower max_tokens or shorten the prompt"
        )
    if params.min_tokens > max_tokens:
        raise ValueError(f"min_tokens is {params.min_tokens}; only max_tokens {max_tokens} can be generated")
    if length + max_tokens - 1 > limits.pool_tokens:
        if params.max_tokens is None and length + max(params.min_tokens, 1) - 1 <= limits.pool_tokens:
            return limits.pool_tokens - length + 1
        raise InfeasibleError(
            f"{together} exceed the page pool of {limits.pool_tokens} tokens: lower max_tokens or give the server more "
            "pages"
        )
    return max_tokens
