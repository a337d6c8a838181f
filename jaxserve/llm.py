"""Generates and embeds text offline in Python: `LLM(model=...).generate(prompts, params)`; names follow vLLM's."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

from jaxserve.beam_search_api import BeamSearchOutput, BeamSearchParams, search_output, search_params
from jaxserve.config.plain_params import params_of
from jaxserve.config.settings import EngineConfig
from jaxserve.config.structured_outputs_config import StructuredOutputsConfig
from jaxserve.embedding_output import EmbeddingRequestOutput
from jaxserve.engine.channel import EngineClient
from jaxserve.engine.inline import InlineEngine
from jaxserve.engine.messages import FlushPrefixCache, PrefixCacheFlushed
from jaxserve.frontend.continuations import SCORING, ScoreOutput, continued
from jaxserve.frontend.delta import EngineDeadError
from jaxserve.frontend.frontend import FrontEnd, Prepared
from jaxserve.frontend.offline import FinishedRequest, TokenBar, run_all
from jaxserve.frontend.openai_messages import parse_messages
from jaxserve.frontend.tokenizer import Tokenizer, load_tokenizer
from jaxserve.frontend.warm_prefix import WARM_UP, WarmedPrefix, check_warm_up
from jaxserve.outputs import (
    RequestOutput,
    embedding_request_output,
    request_output,
)
from jaxserve.pooling_params import PoolingParams
from jaxserve.prompts import Prompt, naming_prompt, one_each, options_each, prompt_content
from jaxserve.request import RequestOptions
from jaxserve.sampling_params import SamplingParams


class LLM:
    """Runs a model and an engine in this process.

    model: checkpoint directory; options are the fields of EngineConfig, SchedulerConfig and CacheConfig (vLLM's names).
    config: the whole configuration instead of model and options.
    client, tokenizer: an engine that is already running, with its tokenizer; config then gives only the seed.
    Raises ValueError, one line, for an unusable option, checkpoint or tokenizer. Close it, or use it in a `with`.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        config: EngineConfig | None = None,
        client: EngineClient | None = None,
        tokenizer: Any = None,
        **options: Any,
    ):
        if client is None:
            config, tokenizer, client = _start(model, config, tokenizer, options)
        elif model is not None or options:
            raise ValueError("client is an engine that is already running; it takes no model or engine options")
        self._client = client
        self._front_end = FrontEnd(
            client,
            tokenizer,
            seed=0 if config is None else config.seed,
            grammars=StructuredOutputsConfig() if config is None else config.structured_outputs,
        )
        self._ids = itertools.count()

    @property
    def front_end(self) -> FrontEnd:
        return self._front_end

    def get_tokenizer(self) -> Tokenizer | None:
        """Returns the tokenizer; None with skip_tokenizer_init."""
        return self._front_end.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] = 0,
        tenant: str | Sequence[str] = "",
        deadline: float | Sequence[float | None] | None = None,
        cache_salt: str | Sequence[str] = "",
        prefix_caching: bool | Sequence[bool] = True,
    ) -> list[RequestOutput]:
        """Generates an output for each prompt and returns them in order, however many there are.

        The options are one value for all prompts or one for each. Policies apply priority, tenant and deadline among
        the requests in flight, at most twice max_num_seqs.

        Args:
            prompts: one prompt, or several.
            sampling_params: one for all, one for each, or None for those of `get_default_sampling_params`.
            use_tqdm: shows a progress bar.
            priority: higher is more urgent.
            tenant: the tenant that service is counted for.
            deadline: seconds of `time.time`; a request that has not ended by then ends with "deadline".
            cache_salt: requests of a tenant share cached pages only with the same salt.
            prefix_caching: a request reads and fills the prefix cache.

        Raises:
            ValueError: a prompt is invalid; the error names its index and comes before anything is computed.
            EngineDeadError: the engine failed.
        """
        given: list[Prompt] = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        params = self._params_for(given, sampling_params)
        options = options_each(given, tenant, priority, deadline, cache_salt, prefix_caching)
        texts, requests = self._prepare(given, params, options)
        completions = self._complete(requests, use_tqdm)
        return [
            request_output(
                text, completions[request.request_id], self.get_tokenizer() if request.params.detokenize else None
            )
            for text, request in zip(texts, requests, strict=True)
        ]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[RequestOutput]:
        """Generates the answer to a conversation, or to each of several, in the model's chat template.

        Args:
            messages: one conversation, a list of messages in OpenAI's form, or a list of conversations.
            sampling_params: as for `generate`.
            use_tqdm: shows a progress bar.
            add_generation_prompt: ends the prompt where the answer begins.
            chat_template_kwargs: further arguments of the template.
            options: priority, tenant, deadline, cache_salt and prefix_caching, as for `generate`.

        Raises:
            ValueError: there is no tokenizer or template, a message is invalid, or as `generate` does.
            EngineDeadError: the engine failed.
        """
        tokenizer = self._front_end.tokenizer
        if tokenizer is None:
            raise ValueError("messages need a tokenizer, and this engine has none; use generate with prompt_token_ids")
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = messages if several else [messages]
        prompts = [
            tokenizer.render_chat(
                parse_messages(list(conversation)),
                add_generation_prompt=add_generation_prompt,
                template_kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm, **options)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] = 0,
        tenant: str | Sequence[str] = "",
        deadline: float | Sequence[float | None] | None = None,
        cache_salt: str | Sequence[str] = "",
        prefix_caching: bool | Sequence[bool] = True,
    ) -> list[EmbeddingRequestOutput]:
        """Embeds each prompt and returns the embeddings in order, however many there are.

        Args:
            prompts: one prompt, or several.
            pooling_params: one for all, one for each, or None for the defaults.
            use_tqdm: shows a progress bar.
            priority, tenant, deadline, cache_salt, prefix_caching: as for `generate`.

        Raises:
            ValueError: a prompt is invalid; the error names its index and comes before anything is computed.
            EngineDeadError: the engine failed.
        """
        given: list[Prompt] = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        params = one_each("pooling_params", given, PoolingParams() if pooling_params is None else pooling_params)
        options = options_each(given, tenant, priority, deadline, cache_salt, prefix_caching)
        texts, requests = self._prepare(given, params, options)
        completions = self._complete(requests, use_tqdm)
        return [
            embedding_request_output(text, completions[request.request_id])
            for text, request in zip(texts, requests, strict=True)
        ]

    def _prepare(
        self,
        given: Sequence[Prompt],
        params: Sequence[SamplingParams] | Sequence[PoolingParams],
        options: Sequence[Callable[[], RequestOptions]],
    ) -> tuple[list[str | None], list[Prepared]]:
        """Returns the text of each prompt that is one, and the prepared requests. Raises ValueError."""
        texts: list[str | None] = []
        requests: list[Prepared] = []
        for index, (prompt, prompt_params) in enumerate(zip(given, params, strict=True)):
            with naming_prompt(f"prompts[{index}]"):
                content = prompt_content(prompt)
                prepared = self._front_end.prepare(
                    content,
                    prompt_params,
                    options[index](),
                    request_id=str(next(self._ids)),
                )
            texts.append(content if isinstance(content, str) else None)
            requests.append(prepared)
        return texts, requests

    def get_default_sampling_params(self) -> SamplingParams:
        """Returns the parameters of a request that brings none: the checkpoint's defaults, from its
        generation_config.json, where it has some and EngineConfig.generation_config is not "vllm".
        """
        return SamplingParams(**dict[str, Any](self._client.ready.sampling_defaults))

    def _params_for(
        self, prompts: Sequence[Prompt], sampling_params: SamplingParams | Sequence[SamplingParams] | None
    ) -> Sequence[SamplingParams]:
        if sampling_params is None:  # max_tokens, where it is a default, gives way to a long prompt
            sampling_params = params_of({}, self._client.ready.sampling_defaults)
        if isinstance(sampling_params, SamplingParams):
            return [sampling_params] * len(prompts)
        return one_each("sampling_params", prompts, sampling_params)

    def score(
        self,
        prompt: Prompt | Sequence[Prompt],
        continuations: Prompt | Sequence[Prompt],
        use_tqdm: bool = True,
        *,
        priority: int | Sequence[int] = 0,
        tenant: str | Sequence[str] = "",
        deadline: float | Sequence[float | None] | None = None,
        cache_salt: str | Sequence[str] = "",
        prefix_caching: bool | Sequence[bool] = True,
    ) -> list[ScoreOutput]:
        """Scores continuations of a prompt by the sum of their tokens' log-probabilities; returns them in order.

        They are computed like prompts of `generate`, batched together; each computes the whole prompt. Prompt and
        continuation together must be shorter than max_model_len.

        Args:
            prompt: of all continuations, or one for each. A text and a continuation's text are encoded as one.
            continuations: one, or several.
            use_tqdm: shows a progress bar.
            priority, tenant, deadline, cache_salt, prefix_caching: as for `generate`.

        Raises:
            ValueError: a prompt or continuation is invalid; the error names the continuation's index and comes before
                anything is computed.
            EngineDeadError: the engine failed.
        """
        given: list[Prompt] = [continuations] if isinstance(continuations, str | Mapping) else list(continuations)
        prompts = [prompt] * len(given) if isinstance(prompt, str | Mapping) else one_each("prompt", given, prompt)
        options = options_each(given, tenant, priority, deadline, cache_salt, prefix_caching)
        requests: list[Prepared] = []
        for index, (before, continuation) in enumerate(zip(prompts, given, strict=True)):
            with naming_prompt(f"continuations[{index}]"):
                whole, start = continued(prompt_content(before), prompt_content(continuation), self.get_tokenizer())
                prepared = self._front_end.prepare(whole, SCORING, options[index](), request_id=str(next(self._ids)))
            requests.append(dataclasses.replace(prepared, prompt_logprobs_start=start))
        completions = self._complete(requests, use_tqdm)
        return [ScoreOutput.of(completions[request.request_id], request.prompt_logprobs_start) for request in requests]

    def warm_prefix(
        self,
        prompts: Prompt | Sequence[Prompt],
        use_tqdm: bool = False,
        *,
        priority: int | Sequence[int] = 0,
        tenant: str | Sequence[str] = "",
        deadline: float | Sequence[float | None] | None = None,
        cache_salt: str | Sequence[str] = "",
    ) -> list[WarmedPrefix]:
        """Computes prompts, so that requests that begin with them find their pages; generates nothing.

        Args:
            prompts: one prompt, or several.
            use_tqdm: shows a progress bar.
            priority, tenant, deadline, cache_salt: as for `generate`; requests of this tenant and salt find the pages.

        Returns:
            What each prompt found and computed, in order.

        Raises:
            ValueError: a prompt is invalid, or the engine shares no pages (enable_prefix_caching).
            RuntimeError: a prompt was not computed; the text says why.
            EngineDeadError: the engine failed.
        """
        given: list[Prompt] = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        check_warm_up(RequestOptions(), prefix_caching=self._client.ready.prefix_caching)
        options = options_each(given, tenant, priority, deadline, cache_salt, True)
        _, requests = self._prepare(given, [WARM_UP] * len(given), options)
        completions = self._complete(requests, use_tqdm)
        found = [completions[request.request_id] for request in requests]
        for one in found:
            if one.error:
                raise RuntimeError(one.error)
        return [WarmedPrefix(one.request_id, len(one.prompt_token_ids), one.num_cached_tokens) for one in found]

    def reset_prefix_cache(self) -> int:
        """Empties the prefix cache; returns the pages that became free.

        Raises EngineDeadError: the engine has ended.
        """
        self._client.send(FlushPrefixCache(0))
        while True:
            for message in self._client.receive():
                self._front_end.handle(message)
                if isinstance(message, PrefixCacheFlushed):
                    return message.num_pages
            if self._front_end.failure:
                raise EngineDeadError(f"the engine has ended: {self._front_end.failure}")

    def beam_search(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: BeamSearchParams,
        use_tqdm: bool = False,
        *,
        priority: int | Sequence[int] = 0,
        tenant: str | Sequence[str] = "",
        deadline: float | Sequence[float | None] | None = None,
        cache_salt: str | Sequence[str] = "",
        prefix_caching: bool | Sequence[bool] = True,
    ) -> list[BeamSearchOutput]:
        """Searches for the likeliest outputs of each prompt and returns them in order of the prompts.

        Args:
            prompts: one prompt, or several.
            params: of all.
            use_tqdm: shows a progress bar.
            priority, tenant, cache_salt, prefix_caching: as for `generate`.
            deadline: as there; a search that has not ended by then ends with what there is of its outputs.

        Raises:
            ValueError: a prompt is invalid, or the beam too wide; the error comes before anything is computed.
            EngineDeadError: the engine failed.
        """
        given: list[Prompt] = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        searched = search_params(params, self._client.ready.limits)
        options = options_each(given, tenant, priority, deadline, cache_salt, prefix_caching)
        _, requests = self._prepare(given, [searched] * len(given), options)
        completions = self._complete(requests, use_tqdm)
        found = [completions[request.request_id] for request in requests]
        return [search_output(one.prompt_token_ids, one.samples, self.get_tokenizer()) for one in found]

    def _complete(self, requests: Sequence[Prepared], use_tqdm: bool) -> dict[str, FinishedRequest]:
        completions: dict[str, FinishedRequest] = {}
        bar = TokenBar(len(requests), enabled=use_tqdm)
        try:
            with contextlib.closing(
                run_all(self._front_end, self._client, requests, bar.add_tokens)
            ) as finished:  # an interrupt aborts what is under way
                for completion in finished:
                    completions[completion.request_id] = completion
                    bar.add_request(len(completion.prompt_token_ids))
        finally:
            bar.close()
        return completions

    def close(self) -> None:
        """Ends the engine; idempotent."""
        self._client.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _start(
    model: str | None, config: EngineConfig | None, tokenizer: Any, options: dict[str, Any]
) -> tuple[EngineConfig, Tokenizer | None, EngineClient]:
    if config is not None and (model is not None or options or tokenizer is not None):
        raise ValueError("config is the whole configuration; give model and options in it, or give no config")
    if config is None:
        names = {"model": model, "tokenizer": tokenizer}
        config = EngineConfig.from_options(
            **options, **{name: value for name, value in names.items() if value is not None}
        )
    # Before the engine: a faulty tokenizer is found in a moment, the model takes longer.
    return config, load_tokenizer(config), InlineEngine(config, progress=True)
