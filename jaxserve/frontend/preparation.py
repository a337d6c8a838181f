"""Validates and tokenizes a request before it is sent to the engine.

The cheapest checks come first: names, numbers and the prompt's length before its contents.
"""

from __future__ import annotations

import dataclasses
import itertools
import uuid
from collections.abc import Sequence, Set

from jaxserve.config.id_checks import IDS_PER_PART
from jaxserve.config.structured_outputs_config import StructuredOutputsConfig
from jaxserve.frontend.bad_words import bad_words_token_ids
from jaxserve.frontend.beams import check_search, check_search_length
from jaxserve.frontend.chat_text import RenderedText
from jaxserve.frontend.encoding import SHORT_TEXT
from jaxserve.frontend.grammar_checker import GrammarChecker
from jaxserve.frontend.preparation_steps import Steps
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.pooling_params import PoolingParams, check_pooled_length
from jaxserve.request import RequestOptions, check_identity
from jaxserve.request_checks import (
    ModelLimits,
    check_length,
    check_logprobs,
    check_samples,
    check_token_ids,
    validate_request,
)
from jaxserve.sampling_params import SamplingParams

_NOTHING_SAMPLED = SamplingParams(temperature=0.0, max_tokens=PoolingParams.max_tokens)
"""Sampling parameters of a request for an embedding."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Holds a tokenized and validated request, ready for `FrontEnd.start`. max_tokens is resolved.

    truncated_tokens: cut off the beginning of the prompt. bad_words_token_ids: the token sequences of bad_words.
    prompt_logprobs_start: index of the first prompt token whose log-probability counts. grammar: of the output,
    checked; empty where it has none. shown_token_ids: special tokens that the text shows, for a parser. pooling: what a
    request for an embedding asks for.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int
    options: RequestOptions
    truncated_tokens: int = 0
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    prompt_logprobs_start: int = 1
    grammar: str = ""
    shown_token_ids: Set[int] = frozenset()
    pooling: PoolingParams | None = None


class Preparation:
    """Validates and tokenizes requests to one engine. Thread-safe.

    Args:
        tokenizer: None refuses texts, stop strings and structured outputs.
        limits: of the engine.
        config: bounds the grammars of structured outputs.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        limits: ModelLimits,
        config: StructuredOutputsConfig = StructuredOutputsConfig(),
    ):
        self._tokenizer = tokenizer
        self._limits = limits
        self._grammars = None if tokenizer is None else GrammarChecker(tokenizer.directory, config)

    def steps(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | PoolingParams,
        options: RequestOptions,
        request_id: str | None = None,
        shown_token_ids: Set[int] = frozenset(),
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
        check_samples(params, self._limits)
        check_logprobs(params, self._limits)
        check_search(params, self._limits)
        if params.stop and self._tokenizer is None:
            raise ValueError("stop needs text, and this server has no tokenizer; use stop_token_ids")
        grammar = self.known_grammar(params)
        kept = self._kept_tokens(params)
        token_ids, num_tokens = yield from self._encode_steps(prompt, params, kept)
        max_tokens = validate_request(token_ids, params, self._limits)
        check_search_length(len(token_ids), params, max_tokens, self._limits)
        bad_words = bad_words_token_ids(params.bad_words, self._tokenizer, self._limits.vocab_size)
        truncated = num_tokens - len(token_ids)
        if grammar is None:
            assert self._grammars is not None
            assert params.structured_outputs is not None
            yield 0  # it waits for a process
            grammar = self._grammars.check(params.structured_outputs)
        return Prepared(
            request_id,
            token_ids,
            params,
            max_tokens,
            options,
            truncated,
            bad_words,
            grammar=grammar,
            shown_token_ids=shown_token_ids,
        )

    def _pooling_steps(
        self, prompt: str | Sequence[int], params: PoolingParams, options: RequestOptions, request_id: str
    ) -> Steps[Prepared]:
        """Prepares a request for an embedding, as `steps` does."""
        kept = self._kept_tokens(params)
        token_ids, num_tokens = yield from self._encode_steps(prompt, params, kept)
        check_pooled_length(len(token_ids), self._limits)
        check_token_ids(token_ids, self._limits)
        truncated = num_tokens - len(token_ids)
        return Prepared(request_id, token_ids, _NOTHING_SAMPLED, params.max_tokens, options, truncated, pooling=params)

    def known_grammar(self, params: SamplingParams | PoolingParams) -> str | None:
        """Returns the checked grammar of a request, "" where it has none, and None where it has yet to be checked,
        which may take seconds. Raises ValueError for one that is refused unread."""
        structured = None if isinstance(params, PoolingParams) else params.structured_outputs
        if structured is None:
            return ""
        if self._grammars is None:
            raise ValueError("structured_outputs need a tokenizer, and this server has none; leave them out")
        self._grammars.check_size(structured)
        return self._grammars.known(structured)

    def _kept_tokens(self, params: SamplingParams | PoolingParams) -> int | None:
        """Returns the tokens at the end of a prompt to which it is truncated; None where that is not asked for.

        Raises ValueError for more than the model has room for.
        """
        if isinstance(params, PoolingParams):
            params.check(self._limits)
            return params.kept_tokens(self._limits)
        asked = params.truncate_prompt_tokens
        if asked is None:
            return None
        limits = self._limits
        if asked == -1:
            return max(limits.most_prompt_tokens(params.max_tokens or max(params.min_tokens, 1)), 1)
        if asked > (most := min(limits.max_prompt_len, limits.max_model_len - 1)):
            raise ValueError(
                f"truncate_prompt_tokens is {asked}; at most {most} prompt tokens fit max_model_len "
                f"{limits.max_model_len} beside one output token: lower it, or use -1 for as many as fit"
            )
        return asked

    def _encode_steps(
        self, prompt: str | Sequence[int], params: SamplingParams | PoolingParams, kept: int | None
    ) -> Steps[tuple[tuple[int, ...], int]]:
        """Encodes a prompt to token ids, which are not yet checked against the model. Raises ValueError.

        Ends as soon as the prompt is known to be too long. Returns the last `kept` of them (None: all), and the number
        of all.
        """
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise ValueError("prompt is text, and this server has no tokenizer; send prompt_token_ids")
            # Checked here too: the tokenizer would make a prompt of <bos> alone out of no text.
            if not prompt:
                raise ValueError("prompt is empty; at least one token is needed")
            token_ids: list[int] = []
            num_cut = 0

            def take(more: list[int], least_more: int) -> None:
                nonlocal num_cut
                token_ids.extend(more)
                if kept is None:
                    self._check_text_size(len(token_ids) + least_more, prompt, params)
                elif len(token_ids) > kept:
                    num_cut += len(token_ids) - kept
                    del token_ids[:-kept]

            yield from self._tokenizer.encode_steps(prompt, take, not isinstance(prompt, RenderedText))
            return tuple(token_ids), num_cut + len(token_ids)
        if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Sequence):
            raise ValueError(f"prompt is of type {type(prompt).__name__}; it must be text or a sequence of token ids")
        self.check_size(prompt, params)
        yield 0
        listed: list[int] = []
        rest = iter(prompt if kept is None else prompt[-kept:])
        while part := tuple(itertools.islice(rest, IDS_PER_PART)):  # a message makes each number anew
            listed.extend(part)
        return tuple(listed), len(prompt)

    def check_size(self, prompt: str | Sequence[int], params: SamplingParams | PoolingParams) -> None:
        """Refuses a prompt that is certainly too long, in constant time: by the number of its token ids or characters
        alone.

        Raises as `steps` does.
        """
        if isinstance(params, SamplingParams):
            check_samples(params, self._limits)
            check_logprobs(params, self._limits)
            check_search(params, self._limits)
        if (kept := self._kept_tokens(params)) is not None:
            if not isinstance(prompt, str):
                self._check_length(min(len(prompt), kept), params)
        elif isinstance(prompt, str):
            if self._tokenizer is not None:
                self._check_text_size(self._tokenizer.least_tokens(len(prompt)), prompt, params)
        else:
            self._check_length(len(prompt), params)

    def least_tokens(self, prompt: str | Sequence[int], params: SamplingParams | PoolingParams) -> int:
        """Returns the fewest tokens that a prompt can have, in constant time; at least 1 also of what is no prompt."""
        if not isinstance(prompt, str):
            least = len(prompt) if isinstance(prompt, Sequence) else 1
        else:
            least = 1 if self._tokenizer is None else self._tokenizer.least_tokens(len(prompt))
        kept = self._kept_tokens(params)
        return max(least if kept is None else min(least, kept), 1)

    def check_text_bytes(self, num_bytes: int) -> None:
        """Refuses a text of `num_bytes` bytes that is certainly too long, whatever its content and parameters: but for
        truncate_prompt_tokens.

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
        else:
            check_pooled_length(length, self._limits, size=size)
