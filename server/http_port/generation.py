"""Answers completions and chat completions, whole or as a stream of events."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence

import msgspec

from jaxserve.config.http_config import HttpConfig
from jaxserve.frontend.async_frontend import AsyncFrontEnd
from jaxserve.frontend.chat_format import ReplyPlan
from jaxserve.frontend.delta import Delta, PromptLogprobs
from jaxserve.frontend.delta_stream import DeltaStream
from jaxserve.frontend.openai import COMPLETIONS_URL, BodyRequest, Dialect, parse_body
from jaxserve.frontend.openai_logprobs import LogprobShapes
from jaxserve.frontend.openai_replies import ReplyMessage
from jaxserve.frontend.openai_responses import Answer, response_body
from jaxserve.frontend.openai_structured import FORMAT_FIELDS
from jaxserve.frontend.output_kinds import OutputUpdates
from jaxserve.logprob_columns import LogprobColumns
from jaxserve.request import FinishReason, check_identity
from jaxserve.request_checks import check_logprobs
from jaxserve.sampling_params import RequestOutputKind
from jaxserve.serving.access.request_headers import request_options
from jaxserve.serving.http_port.body_route import BodyRoute, warn_of_unknown
from jaxserve.serving.http_port.errors import check_model
from jaxserve.serving.http_port.events import ChoiceEvents, ReplyEvents, StreamHead
from jaxserve.serving.http_port.exchange import REQUEST_ID, Exchange
from jaxserve.serving.http_port.json_bodies import Structure
from jaxserve.serving.problem import check_delta, fails_alone
from jaxserve.serving.served_model import ServedModel
from jaxserve.telemetry.request_trace import TRACE_HEADERS

_BYTES_PER_ID = 16
"""Bytes that decoding takes per token id; the text counts as the largest text that can be encoded."""

_LONG_TEXTS = tuple(f'"{name}"'.encode() for name in ("truncate_prompt_tokens", "structured_outputs", *FORMAT_FIELDS))
"""Fields beside which a text may be longer than a prompt can be."""


class Generation(BodyRoute):
    """Answers requests to one of openai.URLS; an ASGI application.

    Args:
        url: which one.
        served: the model.
        config: of the port.
        max_body_bytes: of a request.
    """

    def __init__(self, url: str, served: ServedModel, config: HttpConfig, max_body_bytes: int):
        self._url = url
        super().__init__(served, max_body_bytes)
        self._dialect = Dialect(
            streams=True,
            max_prompts=config.max_prompts,
            lower_first=True,
            allow_unknown=config.allow_unknown_fields,
        )

    async def _serve(self, exchange: Exchange) -> None:
        request_id = exchange.request_id()
        exchange.add_header(REQUEST_ID, request_id)
        frontend = self._served.accepting()
        body = await exchange.read_json(
            frontend,
            lambda body: self._parse(body, frontend.ready.sampling_defaults),
            lambda found: self._check_structure(frontend, found),
        )
        if body.request_id is not None:
            request_id = _renamed(exchange, body.request_id)
        with self._served.rejections():
            check_model(self._served.name, body.model)
        if body.unknown:
            warn_of_unknown(exchange, f"to {self._url}", body.unknown)
        with exchange.canceled_when_gone():
            run = _Run(frontend, self._url, self._served, exchange, body, request_id)
            async with contextlib.AsyncExitStack() as open_streams:
                await run.submit(open_streams)
                await (run.stream() if body.stream else run.complete())

    def _parse(self, body: dict[str, object], defaults: Mapping[str, int | float]) -> BodyRequest:
        with self._served.rejections():
            return parse_body(self._url, body, self._dialect, defaults)

    def _check_structure(self, frontend: AsyncFrontEnd, found: Structure) -> None:
        """Refuses a completion of a text that is certainly too long, undecoded, unless it may be there to be truncated,
        or be no prompt but a grammar, which is bounded by itself.

        A template may shorten a chat.
        """
        if self._url == COMPLETIONS_URL and not any(name in found.data for name in _LONG_TEXTS):
            frontend.check_text_bytes(found.longest_text)


def _renamed(exchange: Exchange, request_id: str) -> str:
    """Returns the request id of the body, which takes the place of the header's and of a drawn one. Raises
    ValueError.
    """
    check_identity("request_id", request_id)
    exchange.extra = [(name, value) for name, value in exchange.extra if name != REQUEST_ID.encode()]
    exchange.add_header(REQUEST_ID, request_id)
    return request_id


class _Collected:
    """Collects what the deltas of one sample say."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[LogprobColumns] = []
        self.last = Delta("")

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        if delta.logprobs is not None:
            self.logprobs.append(delta.logprobs)
        self.last = delta


class _Run:
    """Runs one parsed request."""

    def __init__(
        self,
        frontend: AsyncFrontEnd,
        url: str,
        served: ServedModel,
        exchange: Exchange,
        request: BodyRequest,
        request_id: str,
    ):
        self._frontend = frontend
        self._url = url
        self._served = served
        self._model = served.name
        self._exchange = exchange
        self._request = request
        self._request_id = request_id
        self._created = int(time.time())
        self._has_text = frontend.tokenizer is not None and request.params.detokenize
        self._shapes = LogprobShapes(
            frontend.tokenizer if request.params.detokenize else None,
            chat=request.chat is not None,
            as_ids=request.tokens_as_ids,
        )
        self._sending = asyncio.Lock()
        self._streams: list[DeltaStream] = []
        self._echoes: list[str] = []
        self._plan = ReplyPlan(request.params)

    async def submit(self, open_streams: contextlib.AsyncExitStack) -> None:
        """Submits every prompt; all or none. open_streams: closes them, which aborts those unfinished."""
        request, frontend = self._request, self._frontend
        with self._served.rejections():
            name = "logprobs" if request.chat is None else "top_logprobs"
            check_logprobs(request.params, frontend.ready.limits, name)
            options = request_options(self._exchange.caller, self._exchange.headers, request.options)
        headers = ((name, self._exchange.header(name)) for name in TRACE_HEADERS)
        trace = self._served.trace(headers, "text_completion" if request.chat is None else "chat")
        prompts = request.prompts
        if (chat := request.chat) is not None:
            prompts = [await frontend.render_chat(chat)]
            with self._served.rejections():
                self._plan = request.reply_plan(frontend.tokenizer, prompts[0])
                self._check_kind()
        for prompt in prompts:
            frontend.check_size(prompt, request.params)
        if request.echo:
            self._echoes = [await self._echo(prompt) for prompt in prompts]
        for index, prompt in enumerate(prompts):
            name = self._request_id if len(prompts) == 1 else f"{self._request_id}-{index}"
            stream = await frontend.submit(
                prompt,
                self._plan.params,
                options,
                request_id=name,
                owner=self._exchange.caller.name,
                trace=trace,
                shown_token_ids=self._plan.shown_token_ids,
            )
            self._streams.append(await open_streams.enter_async_context(stream))

    def _check_kind(self) -> None:
        """Raises ValueError for a stream of cumulative updates where replies are parsed, whose parts are deltas."""
        request = self._request
        if request.stream and self._plan.is_parsed and request.params.output_kind is RequestOutputKind.CUMULATIVE:
            raise ValueError(
                "output_kind is cumulative; a reply that may have calls of tools or reasoning is streamed as delta or "
                "final_only"
            )

    async def _echo(self, prompt: str | Sequence[int]) -> str:
        """Returns a prompt as text."""
        if isinstance(prompt, str):
            return prompt
        if (tokenizer := self._frontend.tokenizer) is None:
            raise ValueError("echo needs text, and this server has no tokenizer; leave it out")
        parts: list[str] = []
        steps = tokenizer.decode_steps(prompt, parts.append, self._frontend.ready.limits.vocab_size)
        await self._frontend.work(steps, _BYTES_PER_ID * len(prompt))
        # A character that the prompt leaves incomplete is in the output.
        return "".join(parts).rstrip("\ufffd")

    # ---- whole ---------------------------------------------------------------------------------------------------

    async def complete(self) -> None:
        """Answers with one object when every prompt has its answer."""
        collected = [await self._collected(index, stream) for index, stream in enumerate(self._streams)]
        answers = [answer for samples in collected for answer in samples]
        body = response_body(self._url, self._request_id, self._model, self._created, answers)
        await self._exchange.answer(200, msgspec.json.encode(body))

    async def _collected(self, index: int, stream: DeltaStream) -> list[Answer]:
        """Returns the answers to one prompt, a sample each, when all have ended."""
        echo, samples = self._echoes[index : index + 1], [_Collected() for _ in range(self._request.params.n)]
        prompt: PromptLogprobs | None = None
        async for delta in stream:
            samples[delta.index].add(self._shown(delta))
            prompt = delta.prompt_logprobs or prompt
        for sample in samples:
            check_delta(sample.last)
        return [self._whole(sample, echo, prompt) for sample in samples]

    def _whole(self, sample: _Collected, echo: Sequence[str], prompt: PromptLogprobs | None) -> Answer:
        """Returns the answer of one sample, behind the prompt where that is echoed."""
        request, logprobs = self._request, None
        text = "".join(sample.texts)
        if sample.logprobs:
            columns = LogprobColumns.joined(sample.logprobs)
            logprobs = self._shapes.of(columns, sample.token_ids, prompt=prompt if request.echo else None)
        answer = dataclasses.replace(
            self._answer(sample.last),
            text="".join([*echo, text]),
            token_ids=sample.token_ids if request.return_token_ids else None,
            logprobs=logprobs,
            prompt_logprobs=self._shapes.of_prompt(prompt) if prompt and request.prompt_logprobs else None,
        )
        if not self._plan.is_parsed:
            return answer
        message = ReplyMessage(self._plan)
        message.add(text)
        return message.finish(answer)

    def _shown(self, delta: Delta) -> Delta:
        """Returns what an answer shows of a delta: nothing of the output where only the prompt is asked for."""
        if not self._request.echo_only:
            return delta
        reason = FinishReason.LENGTH if delta.finish_reason is FinishReason.STOP else delta.finish_reason
        logprobs = None if delta.logprobs is None else delta.logprobs.part(0, 0)
        return dataclasses.replace(
            delta, text="", token_ids=(), output_tokens=0, finish_reason=reason, logprobs=logprobs
        )

    def _answer(self, last: Delta) -> Answer:
        """Returns the answer that ends with a delta, without its content."""
        assert last.finish_reason is not None  # a sample ends with one
        return Answer(
            "",
            last.finish_reason.value,
            last.prompt_tokens,
            last.output_tokens,
            last.cached_tokens,
            truncated_tokens=last.truncated_tokens,
            index=last.index,
        )

    # ---- streamed ------------------------------------------------------------------------------------------------

    async def stream(self) -> None:
        """Answers with events as tokens arrive; the response begins with the first of them."""
        request, exchange, samples = self._request, self._exchange, self._request.params.n
        head = StreamHead(self._url, self._request_id, self._model, self._created, request.include_usage)
        events = [
            [self._events(head, index * samples + sample) for sample in range(samples)]
            for index in range(len(self._streams))
        ]
        pumped = [await self._pump(0, events[0])] if len(events) == 1 else await self._pump_all(events)
        await exchange.end_events(head.end([answer for answers in pumped for answer in answers]))

    def _events(self, head: StreamHead, index: int) -> ChoiceEvents | ReplyEvents:
        request = self._request
        logprobs = None if request.params.logprobs is None else self._shapes
        if self._plan.is_parsed:
            return ReplyEvents(head, index, self._plan, token_ids=request.return_token_ids, logprobs=logprobs)
        return ChoiceEvents(
            head,
            index,
            shows_all=not self._has_text,
            token_ids=request.return_token_ids,
            logprobs=logprobs,
            cumulative=request.params.output_kind is RequestOutputKind.CUMULATIVE,
        )

    async def _pump(self, index: int, events: Sequence[ChoiceEvents | ReplyEvents]) -> list[Answer]:
        """Sends the events of one prompt's choices to their end. A choice that fails does not end the others; they are
        followed by its error."""
        send, failed, prompt = self._send, None, None
        begun: set[int] = set()
        lasts: list[Delta] = []
        updates = OutputUpdates(self._request.params.output_kind)
        async for whole in self._streams[index]:
            delta = self._shown(whole)
            prompt = delta.prompt_logprobs or prompt  # it comes before anything of another sample
            if delta.finish_reason is not None:
                lasts.append(delta)
                if fails_alone(delta, self._request.params.n):
                    failed = failed or delta
                    continue
                check_delta(delta)
            choice, update = events[delta.index], updates.of(delta)
            if self._echoes and isinstance(choice, ChoiceEvents) and delta.index not in begun:  # only of completions
                begun.add(delta.index)
                await send(choice.echo(self._echoes[index], prompt))
            if update is not None and (data := choice.of(update)):
                await send(data)
        if failed is not None:
            check_delta(failed)
        return [self._answer(last) for last in lasts]

    async def _send(self, data: bytes) -> None:
        """Sends events; those of several choices one after the other."""
        if len(self._streams) == 1:
            await self._exchange.send_event(data)
        else:
            async with self._sending:
                await self._exchange.send_event(data)

    async def _pump_all(self, events: Sequence[Sequence[ChoiceEvents | ReplyEvents]]) -> list[list[Answer]]:
        """Sends the events of several choices as they come. The first error ends all."""
        tasks = [asyncio.ensure_future(self._pump(index, one)) for index, one in enumerate(events)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
