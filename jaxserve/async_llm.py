"""Generates and embeds text with asyncio in Python: `AsyncLLM(model=...)`; names follow vLLM's.

    async with AsyncLLM(model="models/tiny/checkpoint") as llm:
        async for output in llm.generate("12+34=", SamplingParams(temperature=0), "request-1"):
            print(output.outputs[0].text)

Any number of generators may run at once, each in a task of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Any

from jaxserve.beam_search_api import BeamSearchOutput, BeamSearchParams, search_output, search_params
from jaxserve.config.plain_params import params_of
from jaxserve.config.sampling_fields import MAX_INT32
from jaxserve.config.settings import EngineConfig
from jaxserve.config.structured_outputs_config import StructuredOutputsConfig
from jaxserve.embedding_output import EmbeddingOutput, EmbeddingRequestOutput
from jaxserve.engine.channel import EngineClient
from jaxserve.engine.process import EngineProcess
from jaxserve.frontend.async_frontend import AsyncFrontEnd
from jaxserve.frontend.delta import Cause, DeadlineError, Delta, EngineDeadError, PromptLogprobs
from jaxserve.frontend.logprob_outputs import prompt_positions
from jaxserve.frontend.offline import FinishedSample
from jaxserve.frontend.output_kinds import OutputUpdates
from jaxserve.frontend.tokenizer import Tokenizer, load_tokenizer
from jaxserve.frontend.warm_prefix import WARM_UP, WarmedPrefix, check_warm_up
from jaxserve.outputs import CompletionOutput, RequestOutput, completion_output
from jaxserve.pooling_params import PoolingParams
from jaxserve.prompts import Prompt, prompt_content
from jaxserve.request import RequestOptions
from jaxserve.sampling_params import RequestOutputKind, SamplingParams


class AsyncLLM:
    """Runs a model in an engine process of its own and streams requests on the running event loop.

    Use it in an `async with`, or call `start` and `shutdown`. All calls must be made on the event loop that starts it.

    Args:
        model: checkpoint directory; options are the fields of EngineConfig, SchedulerConfig and CacheConfig, as for
            `LLM`.
        config: the whole configuration instead of model and options.
        client, tokenizer: an engine that is already running, with its tokenizer; config then gives only the seed.

    Raises ValueError, one line, for an unusable option or tokenizer; `start` for a checkpoint that cannot be served.
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
        if client is not None and (model is not None or options):
            raise ValueError("client is an engine that is already running; it takes no model or engine options")
        if client is None and config is not None and (model is not None or options or tokenizer is not None):
            raise ValueError("config is the whole configuration; give model and options in it, or give no config")
        if client is None and config is None:
            names = {"model": model, "tokenizer": tokenizer}
            named = {name: value for name, value in names.items() if value is not None}
            config = EngineConfig.from_options(**options, **named)
        self._config = config
        self._client = client
        self._tokenizer: Tokenizer | None = tokenizer
        if client is None:
            assert config is not None
            self._tokenizer = load_tokenizer(config)
        self._front_end: AsyncFrontEnd | None = None
        self._launch: asyncio.Future[EngineProcess] | None = None
        self._starting = asyncio.Lock()
        self._closed = False

    async def start(self) -> AsyncFrontEnd:
        """Starts the engine, which the first request does otherwise; returns when the model is loaded.

        Raises:
            ValueError: the configuration or the checkpoint is unusable.
            EngineDeadError: it was shut down.
        """
        async with self._starting:
            if self._closed:
                raise EngineDeadError("the engine was shut down; make another AsyncLLM")
            if self._front_end is None:
                if self._client is None:
                    self._client = await self._launched()
                seed = 0 if self._config is None else self._config.seed
                # Whoever reads slowly holds up nobody else here, and what waits is bounded by the context.
                self._front_end = AsyncFrontEnd(
                    self._client,
                    self._tokenizer,
                    seed=seed,
                    max_unread_tokens=MAX_INT32,
                    grammars=StructuredOutputsConfig() if self._config is None else self._config.structured_outputs,
                )
            return self._front_end

    async def _launched(self) -> EngineClient:
        """Launches the engine's process once, whoever waits for it; a waiting task that is canceled leaves it be."""
        assert self._config is not None
        launch = self._launch
        if launch is None or (launch.done() and launch.exception() is not None):
            launch = self._launch = asyncio.ensure_future(asyncio.to_thread(EngineProcess, self._config))
        return await asyncio.shield(launch)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
        deadline: float | None = None,
        cache_salt: str = "",
        prefix_caching: bool = True,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Generates from a prompt and yields outputs as `SamplingParams.output_kind` says: all so far, each time there
        is more (cumulative, the default), what is new (delta), or all of it at the end (final_only).

        Each output is of one sample, but for final_only, where it is of all; the last one is `finished`. Closing the
        generator (`aclose`, or leaving a loop over it), or canceling the task that waits in it, aborts the request and
        frees its pages.

        Args:
            prompt: text, `{"prompt": text}` or `{"prompt_token_ids": ids}`.
            sampling_params: None for the defaults of the checkpoint.
            request_id: a name that no unfinished request has; None makes one.
            priority: higher is more urgent.
            tenant: the tenant that service is counted for.
            deadline: seconds of `time.time`; a request that has not ended by then ends with "deadline".
            cache_salt: requests of a tenant share cached pages only with the same salt.
            prefix_caching: the request reads and fills the prefix cache.

        Raises:
            ValueError: the request can never be served.
            QueueFullError: too many requests are unfinished.
            DuplicateRequestError: an unfinished request has this id.
            DeadlineError: the deadline has already passed.
            EngineDeadError: the engine has failed, or was shut down.
        """
        content = prompt_content(prompt)
        options = RequestOptions(tenant, priority, deadline, cache_salt, prefix_caching)
        front_end = await self.start()
        params = sampling_params
        if params is None:  # max_tokens, where it is a default, gives way to a long prompt
            params = params_of({}, front_end.ready.sampling_defaults)
        prompt_token_ids: list[int] = []
        submitted = front_end.submit(
            content, params, options, request_id=request_id, take_prompt=prompt_token_ids.extend
        )
        async with await submitted as stream:
            outputs = _Outputs(content, tuple(prompt_token_ids), params, self._tokenizer)
            async for delta in stream:
                _check_engine(delta)
                output = outputs.of(delta)
                if output is not None:
                    yield output

    async def beam_search(
        self,
        prompt: Prompt,
        params: BeamSearchParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
        deadline: float | None = None,
        cache_salt: str = "",
        prefix_caching: bool = True,
    ) -> BeamSearchOutput:
        """Searches for the likeliest outputs of a prompt. Canceling the task that waits aborts the search.

        Arguments and errors are as for `generate`. A search that is aborted, or not in time, returns what there is of
        its outputs.

        Raises:
            ValueError: also for a beam that is too wide.
        """
        content = prompt_content(prompt)
        options = RequestOptions(tenant, priority, deadline, cache_salt, prefix_caching)
        front_end = await self.start()
        searched = search_params(params, front_end.ready.limits)
        token_ids: list[int] = []
        submitted = front_end.submit(content, searched, options, request_id=request_id, take_prompt=token_ids.extend)
        samples: dict[int, FinishedSample] = {}
        async with await submitted as stream:
            async for delta in stream:
                _check_engine(delta)
                assert delta.finish_reason is not None  # an output of a search comes at once
                samples[delta.index] = FinishedSample(
                    delta.token_ids, delta.text, delta.finish_reason, delta.error, delta.logprobs
                )
        return search_output(tuple(token_ids), [samples[index] for index in sorted(samples)], self._tokenizer)

    async def encode(
        self,
        prompt: Prompt,
        pooling_params: PoolingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        tenant: str = "",
        deadline: float | None = None,
        cache_salt: str = "",
        prefix_caching: bool = True,
    ) -> AsyncGenerator[EmbeddingRequestOutput, None]:
        """Embeds a prompt and yields the one output. Arguments and errors are as for `generate`.

        Raises:
            DeadlineError: the deadline has passed, before or while the prompt was computed.
            RuntimeError: the engine could not compute the request; the text says why.
        """
        content = prompt_content(prompt)
        params = PoolingParams() if pooling_params is None else pooling_params
        options = RequestOptions(tenant, priority, deadline, cache_salt, prefix_caching)
        front_end = await self.start()
        token_ids: list[int] = []
        submitted = front_end.submit(content, params, options, request_id=request_id, take_prompt=token_ids.extend)
        async with await submitted as stream:
            async for delta in stream:
                _check_engine(delta)
                if delta.cause is Cause.DEADLINE:
                    raise DeadlineError(delta.error)
                if delta.cause is not None:
                    raise RuntimeError(delta.error)
                yield EmbeddingRequestOutput(
                    request_id=delta.request_id,
                    prompt=content if isinstance(content, str) else None,
                    prompt_token_ids=tuple(token_ids),
                    outputs=EmbeddingOutput.from_bytes(delta.embedding),
                    num_cached_tokens=delta.cached_tokens,
                    num_truncated_tokens=delta.truncated_tokens,
                )

    async def embed(
        self, prompt: Prompt, pooling_params: PoolingParams | None = None, **options: Any
    ) -> EmbeddingRequestOutput:
        """Returns the embedding of a prompt. Arguments and errors are as for `encode`."""
        async with contextlib.aclosing(self.encode(prompt, pooling_params, **options)) as outputs:
            return await anext(outputs)

    async def warm_prefix(self, prompt: Prompt, request_id: str | None = None, **options: Any) -> WarmedPrefix:
        """Computes a prompt, so that requests that begin with it find its pages; generates nothing.

        Args:
            prompt: as for `generate`, whose errors this raises too.
            request_id: a name that no unfinished request has; None makes one.
            options: priority, tenant, deadline and cache_salt; requests of this tenant and salt find the pages.

        Raises:
            ValueError: the engine shares no pages (enable_prefix_caching).
        """
        front_end = await self.start()
        check_warm_up(RequestOptions(**options), prefix_caching=front_end.ready.prefix_caching)
        async with contextlib.aclosing(self.encode(prompt, WARM_UP, request_id, **options)) as outputs:
            output = await anext(outputs)
        return WarmedPrefix(output.request_id, len(output.prompt_token_ids), output.num_cached_tokens)

    async def reset_prefix_cache(self) -> int:
        """Empties the prefix cache; returns the pages that became free. Running requests go on.

        Raises EngineDeadError: the engine has failed, or was shut down.
        """
        return await (await self.start()).flush_prefix_cache()

    async def abort(self, request_id: str | Sequence[str]) -> None:
        """Aborts requests, whose generators then end with finish reason "abort"; unknown ids are passed over."""
        names = [request_id] if isinstance(request_id, str) else request_id
        if self._front_end is not None:
            for name in names:
                self._front_end.abort(name)

    async def get_tokenizer(self) -> Tokenizer | None:
        """Returns the tokenizer; None with skip_tokenizer_init."""
        return self._tokenizer

    @property
    def num_unfinished_requests(self) -> int:
        """Number of requests that have not ended."""
        return 0 if self._front_end is None else self._front_end.num_open

    @property
    def errored(self) -> bool:
        """Whether the engine has failed."""
        return self._front_end is not None and bool(self._front_end.failure)

    async def check_health(self) -> None:
        """Raises EngineDeadError when the engine has failed, or was shut down."""
        front_end = await self.start()
        if front_end.failure:
            raise EngineDeadError(f"the engine has ended: {front_end.failure}")

    async def shutdown(self) -> None:
        """Ends unfinished requests with an error, and the engine; idempotent."""
        self._closed = True
        async with self._starting:
            if self._front_end is not None:
                await self._front_end.close()
            elif self._client is not None:
                await asyncio.to_thread(self._client.close)
            elif self._launch is not None:
                await asyncio.to_thread((await self._launch).close)

    async def __aenter__(self) -> AsyncLLM:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.shutdown()


def _check_engine(delta: Delta) -> None:
    """Raises EngineDeadError for a request that ended with the engine."""
    if delta.cause in (Cause.ENGINE, Cause.CLOSING):
        raise EngineDeadError(delta.error)


class _Outputs:
    """Makes the outputs of one request from its deltas, of the kind that it asks for.

    content, prompt_token_ids: of the prompt. tokenizer: of the engine.
    """

    def __init__(
        self,
        content: str | Sequence[int],
        prompt_token_ids: tuple[int, ...],
        params: SamplingParams,
        tokenizer: Tokenizer | None,
    ):
        self._prompt = content if isinstance(content, str) else None
        self._prompt_token_ids = prompt_token_ids
        self._tokenizer = tokenizer if params.detokenize else None
        self._kind = params.output_kind or RequestOutputKind.CUMULATIVE
        self._updates = OutputUpdates(self._kind)
        self._prompt_logprobs: PromptLogprobs | None = None
        self._ended: list[CompletionOutput] = []
        self._left = params.n
        self._error = ""

    def of(self, delta: Delta) -> RequestOutput | None:
        """Takes the next delta; returns the output that is due with it, if one is."""
        update = self._updates.of(delta)
        if update is None:
            return None
        self._error = self._error or update.error
        self._prompt_logprobs = update.prompt_logprobs or self._prompt_logprobs
        prompt = update.prompt_logprobs if self._kind is RequestOutputKind.DELTA else self._prompt_logprobs
        completion = completion_output(
            update.index, update.text, update.token_ids, update.finish_reason, update.logprobs, self._tokenizer
        )
        self._left -= update.finish_reason is not None
        outputs = [completion]
        if self._kind is RequestOutputKind.FINAL_ONLY:
            self._ended.append(completion)
            if self._left:
                return None
            outputs = sorted(self._ended, key=lambda one: one.index)
        return RequestOutput(
            request_id=update.request_id,
            prompt=self._prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=tuple(outputs),
            finished=not self._left,
            num_cached_tokens=update.cached_tokens,
            error=self._error,
            num_truncated_tokens=update.truncated_tokens,
            prompt_logprobs=None if prompt is None else prompt_positions(prompt, self._tokenizer),
        )
