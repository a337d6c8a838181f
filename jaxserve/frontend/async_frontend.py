"""Runs the front end on an asyncio event loop, with one stream of deltas per request.

A thread waits for the engine's messages and passes them to the loop, which turns them into deltas. A slow reader finds
one delta with everything new. Unread output is bounded: the request of a reader that falls further behind is ended, so
that it holds neither memory nor a place in the engine for long. No reader ever blocks another.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable, Sequence, Set
from typing import TypeVar

from jaxserve.config.failpoints import Failpoints
from jaxserve.config.structured_outputs_config import StructuredOutputsConfig
from jaxserve.engine.channel import END_SECONDS, EngineClient
from jaxserve.engine.messages import EngineFailed, EngineReady, EngineStats, FromEngine
from jaxserve.engine.watchdog import Watchdog
from jaxserve.frontend.admission import Admission
from jaxserve.frontend.cache_calls import CacheCalls
from jaxserve.frontend.cache_followers import CacheFollower, CacheFollowers
from jaxserve.frontend.captures import Captures
from jaxserve.frontend.chat_text import RenderedText, texts_of
from jaxserve.frontend.delta import Cause, DeadlineError, Delta, EngineDeadError, QueueFullError, rejection_reason
from jaxserve.frontend.delta_stream import DeltaStream, FaultyStream
from jaxserve.frontend.encoding import SHORT_TEXT
from jaxserve.frontend.frontend import FrontEnd
from jaxserve.frontend.openai_chat import Chat
from jaxserve.frontend.preparation_steps import Steps, finish
from jaxserve.frontend.reader import EngineReader
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.frontend.workers import Workers, WorkersClosedError
from jaxserve.pooling_params import PoolingParams
from jaxserve.request import RequestOptions
from jaxserve.sampling_params import SamplingParams
from jaxserve.telemetry.request_meter import RequestMeter
from jaxserve.telemetry.request_trace import RequestTrace

T = TypeVar("T")

_log = logging.getLogger(__name__)

_MOST_LOGGED = 2000
"""Maximum characters or token ids of a prompt in the log, where prompts are logged at all."""

CPU_SHARE = 0.3
"""Maximum share of the loop's time for streaming when the engine runs on the CPU (see `EngineReader`)."""


def _logged(prompt: str | Sequence[int]) -> str:
    """Returns a prompt as a log that was asked to show prompts has it: on one line, and only its beginning."""
    beginning = prompt[:_MOST_LOGGED]
    more = f" ... {len(prompt)} in all" if len(prompt) > _MOST_LOGGED else ""
    return f"{(beginning if isinstance(beginning, str) else list(beginning))!r}{more}"


def _num_bytes(prompt: object) -> int:
    """Returns an upper bound of a text's bytes from its length alone; for a list of token ids its length."""
    if isinstance(prompt, str):
        return len(prompt) if prompt.isascii() else 4 * len(prompt)
    return len(prompt) if isinstance(prompt, Sequence) else 0


class AsyncFrontEnd:
    """Streams requests of one engine on the running event loop, in which it must be created and used.

    Args:
        seed: as for `FrontEnd`.
        max_unread_tokens: unread token ids that one request may have; the request of a slower reader ends with ABORT
            and cause READER, and its unread output is dropped.
        step_timeout: as `ServerConfig.step_timeout`; an engine that exceeds it has failed, and is killed.
        on_tokens: is told of tokens to be charged to an owner: those of a prompt when it is sent to the engine, those
            of an output when it ends.
        log_prompts: logs each request's prompt.
        failpoints: as `EngineConfig.failpoints`; only those of a front end count here.
        admission: decides which requests are let in; None bounds their number alone.
        metrics: what requests are counted in.
        grammars: bounds the grammars of structured outputs.
    """

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer | None,
        *,
        seed: int | None = None,
        max_unread_tokens: int = 8192,
        step_timeout: float | None = None,
        on_tokens: Callable[[str, int], None] | None = None,
        log_prompts: bool = False,
        failpoints: Sequence[str] = (),
        admission: Admission | None = None,
        metrics: RequestMeter | None = None,
        grammars: StructuredOutputsConfig = StructuredOutputsConfig(),
    ):
        self._max_unread_tokens = max_unread_tokens
        self._loop = asyncio.get_running_loop()
        # An engine on the CPU computes on the very cores that stream its tokens.
        share = CPU_SHARE if client.ready.info.platform == "cpu" else 1.0
        self._reader = EngineReader(client, self._loop, share)
        self._metrics = metrics or RequestMeter()
        self._core = FrontEnd(
            self._reader,
            tokenizer,
            seed=seed,
            failpoints=failpoints,
            admission=admission,
            metrics=self._metrics,
            grammars=grammars,
        )
        if tokenizer is not None:
            tokenizer.take_long_texts_apart()
        self._captures = Captures(self._reader.send)
        self._cache_calls = CacheCalls(self._reader.send)
        self._cache_followers = CacheFollowers(self._reader.send)
        self._send_hit = Failpoints(failpoints).at("send")
        self._admission = admission
        self._streams: dict[tuple[str, str], DeltaStream] = {}  # by owner and request id
        self._on_tokens = on_tokens
        self._log_prompts = log_prompts
        self._closing = ""
        self._idle = asyncio.Event()
        self._idle.set()
        self._timer: asyncio.TimerHandle | None = None
        self._workers = Workers()
        self._reader.start(self._handle, busy=lambda: self._core.num_open > 0)
        self._watchdog = Watchdog(step_timeout)
        self._watch_timer = self._loop.call_later(self._watchdog.interval, self._watch)

    @property
    def ready(self) -> EngineReady:
        """The engine's ready message."""
        return self._core.ready

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._core.tokenizer

    @property
    def stats(self) -> EngineStats:
        """The engine's latest counts."""
        return self._core.stats

    @property
    def admission(self) -> Admission | None:
        """What decides which requests are let in, for its counts."""
        return self._admission

    @property
    def failure(self) -> str:
        """The engine's last line once it has ended; empty while it runs."""
        return self._core.failure

    @property
    def num_open(self) -> int:
        """Number of unfinished requests."""
        return self._core.num_open

    @property
    def captures(self) -> Captures:
        """Captures of what the engine does."""
        return self._captures

    async def flush_prefix_cache(self) -> int:
        """Forgets the pages that the prefix cache holds; see `CacheCalls.flush`."""
        self._check_open()
        return await self._cache_calls.flush()

    def follow_cache(self, tenant: str | None) -> contextlib.AbstractContextManager[CacheFollower]:
        """Follows what happens to a tenant's pages of the prefix cache, or to all for None; see `CacheFollowers`."""
        self._check_open()
        return self._cache_followers.follow(tenant, has_computed=self.num_open > 0 or self.stats.num_steps > 0)

    async def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | PoolingParams,
        options: RequestOptions = RequestOptions(),
        *,
        request_id: str | None = None,
        owner: str = "",
        trace: RequestTrace | None = None,
        shown_token_ids: Set[int] = frozenset(),
        take_prompt: Callable[[Sequence[int]], object] = lambda token_ids: None,
    ) -> DeltaStream:
        """Sends a request and returns its stream. Raises as `FrontEnd.submit` does, at once or, among many
        refusals, soon.

        owner: whose request it is. trace: the request's place in a trace. shown_token_ids: special tokens that the text
        shows. take_prompt: is given the prompt's token ids.
        """
        try:
            with self._metrics.rejections(rejection_reason, request_id, trace) as arrived:
                self._check_accepting(prompt, params, options)
                self._core.check_new(request_id, options.deadline, owner)
                steps = self._core.preparation.steps(prompt, params, options, request_id, shown_token_ids)
                size = _num_bytes(prompt)
                unchecked = self._core.preparation.known_grammar(params) is None
                if size <= SHORT_TEXT and not unchecked:
                    prepared = finish(steps)
                else:
                    prepared = await self._work_until(options.deadline, steps, size, checks_grammar=unchecked)
                    self._check_open()
                request_id = self._core.start(prepared, owner, arrived, trace)
        except QueueFullError:
            if self._admission is not None and (seconds := self._admission.seconds_to_refuse):
                await asyncio.sleep(seconds)
            raise
        take_prompt(prepared.prompt_token_ids)
        if (hit := self._send_hit) is None:
            stream = DeltaStream(self.abort, request_id, owner)
        else:
            stream = FaultyStream(self.abort, request_id, owner, hit)
        self._streams[owner, request_id] = stream
        self._charge(owner, len(prepared.prompt_token_ids))
        if self._log_prompts:
            _log.info("request %r of %r: prompt %s", request_id, owner, _logged(prompt))
        self._idle.clear()
        self._set_timer()
        return stream

    async def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        options: RequestOptions = RequestOptions(),
        *,
        request_id: str | None = None,
        owner: str = "",
    ) -> AsyncIterator[Delta]:
        """Submits a request and yields its deltas; errors of `submit` are raised by the first step of the iteration.

        An iteration that is left early should be closed (`contextlib.aclosing`); then, as when its task is canceled,
        the request is aborted.
        """
        async with await self.submit(prompt, params, options, request_id=request_id, owner=owner) as stream:
            async for delta in stream:
                yield delta

    def check_size(self, prompt: str | Sequence[int], params: SamplingParams | PoolingParams) -> None:
        """Refuses a prompt that is certainly too long, in constant time. Raises as `submit` does."""
        with self._metrics.rejections(rejection_reason):
            self._core.preparation.check_size(prompt, params)

    def check_text_bytes(self, num_bytes: int) -> None:
        """Refuses a text of `num_bytes` bytes that is certainly too long, before it is read.

        Raises as `submit` does.
        """
        with self._metrics.rejections(rejection_reason):
            self._core.preparation.check_text_bytes(num_bytes)

    def check_ids_bytes(self, num_bytes: int, most_bytes_per_id: int) -> None:
        """Refuses `num_bytes` bytes of token ids, of at most `most_bytes_per_id` each, if they are certainly too
        many.
        """
        with self._metrics.rejections(rejection_reason):
            self._core.preparation.check_ids_bytes(num_bytes, most_bytes_per_id)

    async def work(self, steps: Steps[T], num_bytes: int, *, checks_grammar: bool = False) -> T:
        """Runs `steps`, which process `num_bytes` bytes, in threads where these are many or where they check a grammar;
        returns their result.

        Raises:
            EngineDeadError: the front end is closed meanwhile.
            QueueFullError: too much text waits.
            Exception: whatever the steps raise.
        """
        if num_bytes <= SHORT_TEXT and not checks_grammar:
            return finish(steps)
        try:
            return await self._workers.run(steps, num_bytes, checks_grammar=checks_grammar)
        except WorkersClosedError:
            raise EngineDeadError(self._closing) from None

    async def render_chat(self, chat: Chat) -> RenderedText:
        """Returns a conversation as the text of a prompt.

        Raises:
            ValueError: without a tokenizer, and as `Tokenizer.render_chat` and `ChatFormat.arguments` do.
            EngineDeadError: the front end is closed meanwhile.
            QueueFullError: too many conversations wait.
        """
        if (tokenizer := self.tokenizer) is None:
            raise ValueError("messages need a tokenizer, and this server has none; send a prompt of token ids")
        given = tokenizer.chat_format.arguments(chat)

        def steps() -> Steps[RenderedText]:
            yield 0  # what comes before runs on the loop, what comes behind in a thread
            return tokenizer.render_chat(chat.messages, **given)

        size = sum(len(text) for text in texts_of([chat.messages, given["tools"], given["template_kwargs"]]))
        try:
            return await self._workers.run(steps(), size, renders=True)
        except WorkersClosedError:
            raise EngineDeadError(self._closing) from None

    async def _work_until(
        self, deadline: float | None, steps: Steps[T], num_bytes: int, *, checks_grammar: bool = False
    ) -> T:
        if deadline is None:
            return await self.work(steps, num_bytes, checks_grammar=checks_grammar)
        try:
            async with asyncio.timeout(deadline - self._core.now()):
                return await self.work(steps, num_bytes, checks_grammar=checks_grammar)
        except TimeoutError:
            work = "grammar was checked" if checks_grammar else "prompt was tokenized"
            raise DeadlineError(f"deadline passed while the {work}") from None

    def abort(self, request_id: str, owner: str = "") -> bool:
        """Ends a request of the owner, which its stream's last delta reports.

        Returns False when the owner has no such unfinished request, whatever others have.
        """
        deltas = self._core.abort(request_id, owner=owner)
        self._deliver(deltas)
        return bool(deltas)

    async def drain(self, seconds: float) -> None:
        """Refuses new requests and lets open ones finish for up to `seconds` seconds."""
        if not self._closing:
            self._closing = "the server is shutting down"
        try:
            if seconds > 0:
                await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            _log.info("%d requests were still running after %g s", self.num_open, seconds)

    async def close(self, drain_seconds: float = 0.0, end_seconds: float = END_SECONDS) -> str:
        """Refuses new requests, lets open ones finish for up to drain_seconds, then ends the rest and the engine.

        Idempotent. Requests that are cut off get a last delta of reason ERROR and cause CLOSING. end_seconds: until an
        engine that does not end by itself is killed. Returns one line on what went wrong with the engine, or "".
        """
        await self.drain(drain_seconds)
        self._deliver(self._core.end_all(self._closing))
        self._cache_calls.close(self._closing)
        self._cache_followers.close(self._closing)
        if self._timer is not None:
            self._timer.cancel()
        self._watch_timer.cancel()
        self._workers.close()
        self._reader.stop()
        return await self._loop.run_in_executor(None, self._reader.close, end_seconds)

    def kill(self) -> None:
        """Kills a hung engine without asking it; `close` reports the outcome."""
        self._reader.kill()

    def _check_accepting(
        self, prompt: str | Sequence[int], params: SamplingParams | PoolingParams, options: RequestOptions
    ) -> None:
        self._check_open()
        self._core.check_accepting(params, options, self._core.preparation.least_tokens(prompt, params))

    def _check_open(self) -> None:
        if self._closing:
            raise EngineDeadError(self._closing)

    def _handle(self, messages: Sequence[FromEngine]) -> None:
        for message in messages:
            self._captures.handle(message)
            self._cache_calls.handle(message)
            self._cache_followers.handle(message)
            self._deliver(self._core.handle(message))

    def _watch(self) -> None:
        """Checks periodically that the engine makes progress; one that hangs has failed."""
        problem = self._watchdog.look(self._loop.time(), self._reader.progress())
        if self.failure:
            return
        if problem is None:
            self._watch_timer = self._loop.call_later(self._watchdog.interval, self._watch)
        else:
            self._handle([EngineFailed(problem)])
            self._reader.kill()

    def _deliver(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            stream = self._streams[delta.owner, delta.request_id]
            stream.push(delta)
            if delta.finish_reason is not None:
                self._ended(stream, delta)
            elif stream.num_unread > self._max_unread_tokens:
                self._end_unread(stream)
        if not self._core.num_open:
            self._idle.set()

    def _end_unread(self, stream: DeltaStream) -> None:
        """Ends the request of a reader that is too far behind, and drops its unread output."""
        error = (
            f"{stream.num_unread} output tokens wait to be read; at most {self._max_unread_tokens} (max_unread_tokens) "
            "may: read faster"
        )
        lasts = self._core.abort(stream.request_id, error, Cause.READER, owner=stream.owner)
        stream.drop_unread()
        for last in lasts:
            stream.push(dataclasses.replace(last, token_ids=(), text="", logprobs=None))
            self._ended(stream, last)

    def _ended(self, stream: DeltaStream, last: Delta) -> None:
        """Charges a sample that has ended, and forgets the stream with the last one."""
        if last.ends_request:
            del self._streams[stream.owner, stream.request_id]
        self._charge(stream.owner, last.output_tokens)

    def _charge(self, owner: str, num_tokens: int) -> None:
        if self._on_tokens is not None:
            self._on_tokens(owner, num_tokens)

    def _set_timer(self) -> None:
        deadline = self._core.next_deadline
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if deadline is not None:
            self._timer = self._loop.call_later(max(deadline - self._core.now(), 0.0), self._expire)

    def _expire(self) -> None:
        self._timer = None
        self._deliver(self._core.expire())
        self._set_timer()
