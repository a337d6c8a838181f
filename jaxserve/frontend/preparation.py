"""Validates and tokenizes a request before it is sent to the engine.

The cheapest checks come first: names, numbers and the prompt's length before its contents.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Sequence

from jaxserve.frontend.chat_text import RenderedText
from jaxserve.frontend.encoding import SHORT_TEXT
from jaxserve.frontend.preparation_steps import Steps
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.pooling_params import PoolingParams, check_pooled_length
from jaxserve.request import (
    ModelLimits,
    RequestOptions,
    SamplingParams,
    check_identity,
    check_length,
    check_token_ids,
    validate_request,
)

_NOTHING_SAMPLED = SamplingParams(temperature=0.0, max_tokens=PoolingParams.max_tokens)
"""Sampling parameters of a request for an embedding."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Holds a tokenized and validated request, ready for `FrontEnd.start`. max_tokens is resolved. pooling: what a
    request for an embedding asks for."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    options: RequestOptions
    pooling: PoolingParams | None = None


class Preparation:
    """Validates and tokenizes requests to one engine. Thread-safe. tokenizer: None refuses texts and stop strings."""

    def __init__(self, tokenizer: Tokenizer | None, limits: ModelLimits):
        self._tokenizer = tokenizer
        self._limits = limits

    def steps(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | PoolingParams,
        options: RequestOptions,
        request_id: str | None = None,
    ) -> Steps[Prepared]:
        """Prepares a request in steps. Each step may run in any thread; the first takes no longer for a long prompt.

        Raises:
            ValueError: the request can never be valid.
            InfeasibleError: the request can never be served on this server.
        """
        if request_id is None:
            request_id = uuid.uuid4().hex
        elif not request_id:
            raise ValueError("request_id is empty; leave it out to be given one")
        check_identity("request_id", request_id)
        if isinstance(params, PoolingParams):
            return (yield from self._pooling_steps(prompt, params, options, request_id))
        if params.stop and self._tokenizer is None:
            raise ValueError("stop needs text, and this server has no tokenizer; use stop_token_ids")
        token_ids = yield from self._encode_steps(prompt, params)
        max_tokens = validate_request(token_ids, params, self._limits)
        return Prepared(request_id, token_ids, params, max_tokens, options)

    def _pooling_steps(
        self, prompt: str | Sequence[int], params: PoolingParams, options: RequestOptions, request_id: str
    ) -> Steps[Prepared]:
        """Prepares a request for an embedding, as `steps` does."""
        params.check(self._limits)
        token_ids = params.truncated((yield from self._encode_steps(prompt, params)), self._limits)
        check_pooled_length(len(token_ids), self._limits)
        check_token_ids(token_ids, self._limits)
        return Prepared(request_id, token_ids, _NOTHING_SAMPLED, params.max_tokens, options, params)

    def _encode_steps(
        self, prompt: str | Sequence[int], params: SamplingParams | PoolingParams
    ) -> Steps[tuple[int, ...]]:
        """Encodes a prompt to token ids, which are not yet checked against the model. Raises ValueError.

        Ends as soon as the prompt is known to be too long.
        """
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise ValueError("prompt is text, and this server has no tokenizer; send prompt_token_ids")
            # Checked here too: the tokenizer would make a prompt of <bos> alone out of no text.
            if not prompt:
                raise ValueError("prompt is empty; at least one token is needed")
            token_ids: list[int] = []

            def take(more: list[int], least_more: int) -> None:
                token_ids.extend(more)
                self._check_text_size(len(token_ids) + least_more, prompt, params)

            yield from self._tokenizer.encode_steps(prompt, take, not isinstance(prompt, RenderedText))
            return tuple(token_ids)
        if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Sequence):
            raise ValueError(f"prompt is of type {type(prompt).__name__}; it must be text or a sequence of token ids")
        self.check_size(prompt, params)
        yield 0
        return tuple(prompt)

    def check_size(self, prompt: str | Sequence[int], params: SamplingParams | PoolingParams) -> None:
        """Refuses a prompt that is certainly too long, in constant time: by the number of its token ids or characters
        alone.

        Raises as `steps` does.
        """
        if isinstance(prompt, str):
            if self._tokenizer is not None:
                self._check_text_size(self._tokenizer.least_tokens(len(prompt)), prompt, params)
        else:
            self._check_length(len(prompt), params)

    def least_tokens(self, prompt: str | Sequence[int]) -> int:
        """Returns the fewest tokens that a prompt can have, in constant time; at least 1 also of what is no prompt."""
        if not isinstance(prompt, str):
            return max(len(prompt), 1) if isinstance(prompt, Sequence) else 1
        return 1 if self._tokenizer is None else max(self._tokenizer.least_tokens(len(prompt)), 1)

    def check_text_bytes(self, num_bytes: int) -> None:
        """Refuses a text of `num_bytes` bytes that is certainly too long, whatever its content and parameters.

        Raises as `steps` does.
        """
        if self._tokenizer is not None:
            least = self._tokenizer.least_tokens(num_bytes)
            check_length(max(least, 1), SamplingParams(), self._limits, size=f"{num_bytes} bytes")

    def check_ids_bytes(self, num_bytes: int, most_bytes_per_id: int) -> None:
        """Refuses a message of `num_bytes` bytes of token ids that is certainly too long."""
        least = max(num_bytes // most_bytes_per_id, 1)
        check_length(least, SamplingParams(), self._limits, size=f"{num_bytes} bytes of token ids")

    def _check_text_size(self, least: int, text: str, params: SamplingParams | PoolingParams) -> None:
        """Refuses a text with too many tokens, given that it has at least `least`."""
        if len(text) > SHORT_TEXT:  # a shorter one is encoded in no time; the error has the exact number then
            self._check_length(least, params, f"{len(text)} characters")

    def _check_length(self, length: int, params: SamplingParams | PoolingParams, size: str = "") -> None:
        """Refuses a prompt for its number of tokens. size: as for `check_length`."""
        if isinstance(params, SamplingParams):
            check_length(length, params, self._limits, size=size)
        elif params.truncate_prompt_tokens is None:
            check_pooled_length(length, self._limits, size=size)
