"""Implements the JaxServe service: each RPC in terms of the front end.

A request is read, submitted to the front end with the earlier of its two deadlines, and every delta is written as it
arrives; on any exit before the last delta (client disconnected, canceled, deadline exceeded) it is aborted at once.
"""

# ruff: noqa: N802  the names of RPCs are those of the proto
from __future__ import annotations

import asyncio
import functools
import logging
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import grpc

import jaxserve
from jaxserve.config.sampling_fields import check_count
from jaxserve.config.shown import shown
from jaxserve.engine.messages import EngineReady, EngineStats
from jaxserve.frontend.delta import Delta
from jaxserve.frontend.openai_chat import Chat
from jaxserve.frontend.output_kinds import OutputUpdates
from jaxserve.frontend.preparation_steps import Steps
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.pooling_params import pair_scores
from jaxserve.request import FinishReason, check_identity
from jaxserve.request_checks import ModelLimits
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.access.callers import require_admin
from jaxserve.serving.embedding_calls import Embedded, EmbeddingCall, embed_all
from jaxserve.serving.grpc_port import convert, embed_convert
from jaxserve.serving.grpc_port.call_interceptor import CallContext
from jaxserve.serving.grpc_port.message_parts import numbers_of, of_one_field, value_of
from jaxserve.serving.grpc_port.oversized import MAX_DETOKENIZED
from jaxserve.serving.grpc_port.status import Status, status, status_of
from jaxserve.serving.problem import NotFoundError, check_delta, fails_alone, unforeseen
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2_grpc as pb_grpc
from jaxserve.serving.served_model import ServedModel
from jaxserve.serving.warming import warm_up

_log = logging.getLogger("jaxserve.server")

Context = CallContext
Behavior = TypeVar("Behavior", bound=Callable[..., Any])

BYTES_PER_TOKEN = 48
"""Memory in bytes of an output token that waits to be read, its text and its id together."""

_MOST_BYTES_PER_ID = 11
"""Maximum bytes of a token id in a message: a tag, and ten bytes where it is negative."""

_BYTES_PER_ID = 16
"""Bytes that decoding takes per token id; the text counts as the largest text that can be encoded."""


def errors_as_status(behavior: Behavior) -> Behavior:
    """Ends the call with the status of any error that its behavior raises; an unforeseen one is INTERNAL."""

    @functools.wraps(behavior)
    async def behave(self: JaxServeService, request: Any, context: Context) -> Any:
        try:
            return await behavior(self, request, context)
        except grpc.aio.InternalError as error:  # gRPC's word for a client that was gone before it noticed
            raise asyncio.CancelledError("the client is gone") from error
        except Exception as error:
            answer = status_of(error)
            if answer is None:
                _log.exception("a call failed with an unforeseen error")
                answer = status(unforeseen(error))
        received = context.received if _is_refusal(answer) else None
        # gRPC keeps the error that `abort` raises, with all that it refers to, until the garbage collector finds the
        # circle. So it is raised where neither the first error nor the message, which may be large, is within reach.
        del request
        try:
            await context.abort(answer.code, answer.details, answer.metadata)
        except grpc.aio.InternalError as gone:
            raise asyncio.CancelledError("the client is gone") from gone
        finally:
            if received is not None:
                self._served.refusal_times.observe(time.perf_counter() - received)

    return behave  # pyright: ignore[reportReturnType]  as `behavior` is


class JaxServeService(pb_grpc.JaxServeServicer):
    """Implements the RPCs. served: the model; its state decides whether requests are taken."""

    def __init__(self, served: ServedModel):
        self._served = served

    def check_prompt_bytes(self, num_bytes: int, is_text: bool) -> None:
        """Refuses a prompt of `num_bytes` bytes, of text or of a TokenIds, that cannot fit, before it is read.

        Raises ValueError.
        """
        if (frontend := self._served.frontend) is None:
            return
        if is_text:
            frontend.check_text_bytes(num_bytes)
        else:
            frontend.check_ids_bytes(num_bytes, _MOST_BYTES_PER_ID)

    @errors_as_status
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        frontend = self._served.accepting()
        is_chat = request.WhichOneof("prompt") == "messages"
        with self._served.rejections():
            params = convert.params_from_proto(request.sampling_params, frontend.ready.sampling_defaults)
            messages = convert.messages_from_proto(request) if is_chat else ()
            prompt = "" if is_chat else convert.prompt_from_proto(request)
        if not is_chat:
            frontend.check_size(prompt, params)  # before anything whose cost grows with it
        metadata = context.invocation_metadata() or ()
        with self._served.rejections():
            convert.refuse_unknown_fields(request, request.sampling_params)
            convert.refuse_unknown_bytes(request.token_ids)
            headers = text_metadata(metadata)
            options = convert.options_from_proto(request, call_deadline(context), context.caller, headers)
        if is_chat:
            prompt = await frontend.render_chat(Chat(messages))
        stream = await frontend.submit(
            prompt,
            params,
            options,
            request_id=request.request_id or None,
            owner=context.caller.name,
            trace=self._served.trace(metadata, "text_completion"),
        )
        per_token = bytes_per_token(params, frontend.ready.limits)
        context.set_backlog(lambda: stream.num_unread * per_token)
        updates, prompt_logprobs = OutputUpdates(params.output_kind), None
        failed: Delta | None = None
        async with stream:  # left early, it aborts the request
            async for delta in stream:
                prompt_logprobs = delta.prompt_logprobs or prompt_logprobs
                update = updates.of(delta)
                if update is None:
                    continue
                if prompt_logprobs is not None:
                    for block in convert.prompt_logprobs_to_proto(prompt_logprobs):
                        await context.write(pb.GenerateResponse(request_id=delta.request_id, prompt_logprobs=block))
                    prompt_logprobs = None
                reason = delta.finish_reason
                if reason is FinishReason.DEADLINE or fails_alone(delta, params.n):
                    await context.write(_response(update))  # what there is until then is not lost
                    failed = failed or delta
                    continue
                if reason is not None:
                    check_delta(delta)
                await context.write(_response(update))
        if failed is not None:
            check_delta(failed)

    @errors_as_status
    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        convert.refuse_unknown_fields(request)
        if not self._served.started().abort(request.request_id, context.caller.name):
            raise NotFoundError(f"request_id {shown(request.request_id)} names no unfinished request")
        return pb.AbortResponse()

    @errors_as_status
    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        convert.refuse_unknown_fields(request)
        ready: EngineReady = self._served.started().ready
        info, limits = ready.info, ready.limits
        return pb.GetModelInfoResponse(
            name=self._served.name,
            architecture=info.architecture,
            num_parameters=info.num_parameters,
            dtype=info.dtype,
            vocab_size=limits.vocab_size,
            max_model_len=limits.max_model_len,
            max_prompt_len=min(limits.max_prompt_len, limits.max_model_len - 1),
            eos_token_ids=limits.eos_token_ids,
            has_tokenizer=self._served.has_tokenizer,
        )

    @errors_as_status
    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:
        convert.refuse_unknown_fields(request)
        ready: EngineReady = self._served.started().ready
        info = ready.info
        times, admission = self._served.refusal_times, self._served.started().admission
        return pb.GetServerInfoResponse(
            version=jaxserve.__version__,
            platform=info.platform,
            attention=info.attention,
            page_size=info.page_size,
            num_pages=info.usable_pages,
            max_num_seqs=ready.max_num_seqs,
            max_num_waiting=ready.max_num_waiting,
            num_executables=info.num_executables,
            compile_seconds=info.compile_seconds,
            start_seconds=ready.start_seconds,
            uptime_seconds=self._served.uptime_seconds,
            draining=self._served.draining,
            # How much others do is for the administrator to see.
            stats=_stats(self._served.started().stats) if context.caller.is_admin else None,
            admission=None
            if admission is None or not context.caller.is_admin
            else pb.AdmissionStats(
                num_waiting=admission.num_waiting,
                waiting_tokens=admission.waiting_tokens,
                max_waiting_tokens=admission.max_waiting_tokens,
                rejections=admission.rejections,
                refusal_seconds_p50=times.quantile(0.5),
                refusal_seconds_p99=times.quantile(0.99),
                finished_per_second=admission.finished_per_second or 0.0,
            ),
        )

    @errors_as_status
    async def Tokenize(self, request: pb.TokenizeRequest, context: Context) -> bytes:
        convert.refuse_unknown_fields(request)
        steps = _tokenize_steps(self._served.tokenizer(), request)
        return await self._served.started().work(steps, context.message_bytes)

    @errors_as_status
    async def Detokenize(self, request: pb.DetokenizeRequest, context: Context) -> bytes:
        check_count("token_ids", len(request.token_ids), MAX_DETOKENIZED, "ids")
        convert.refuse_unknown_fields(request)
        vocab_size = self._served.started().ready.limits.vocab_size
        steps = _detokenize_steps(self._served.tokenizer(), request, vocab_size)
        return await self._served.started().work(steps, _BYTES_PER_ID * len(request.token_ids))

    @errors_as_status
    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        with self._served.rejections():
            inputs = embed_convert.inputs_from_proto("inputs", request.inputs)
        request_id, found = await self._embed(request, inputs, context)
        answer = pb.EmbedResponse(request_id=request_id, usage=_prompt_usage(found))
        for one in found:
            answer.embeddings.append(embed_convert.embedding_to_proto(one.embedding))
            await asyncio.sleep(0)  # others have their turn
        return answer

    @errors_as_status
    async def Score(self, request: pb.ScoreRequest, context: Context) -> pb.ScoreResponse:
        with self._served.rejections():
            inputs, num_queries = embed_convert.pairs_from_proto(request)
        request_id, found = await self._embed(request, inputs, context)
        scores = pair_scores([one.embedding for one in found], num_queries)
        return pb.ScoreResponse(request_id=request_id, scores=scores, usage=_prompt_usage(found))

    @errors_as_status
    async def WarmPrefix(self, request: pb.WarmPrefixRequest, context: Context) -> pb.WarmPrefixResponse:
        frontend = self._served.accepting()
        is_chat = request.WhichOneof("prompt") == "messages"
        metadata = context.invocation_metadata() or ()
        with self._served.rejections():
            convert.refuse_unknown_fields(request)
            convert.refuse_unknown_bytes(request.token_ids)
            messages = convert.messages_from_proto(request) if is_chat else ()
            prompt = "" if is_chat else convert.prompt_from_proto(request)
            headers = text_metadata(metadata)
            options = convert.options_from_proto(request, call_deadline(context), context.caller, headers)
            check_identity("request_id", request.request_id)
        if is_chat:
            prompt = await frontend.render_chat(Chat(messages))
        request_id, trace = request.request_id or uuid.uuid4().hex, self._served.trace(metadata, "embeddings")
        warmed = await warm_up(frontend, [prompt], options, request_id, context.caller.name, trace)
        return pb.WarmPrefixResponse(
            request_id=request_id,
            prompt_tokens=warmed.num_prompt_tokens,
            cached_tokens=warmed.num_cached_tokens,
            computed_tokens=warmed.num_computed_tokens,
        )

    @errors_as_status
    async def FlushCache(self, request: pb.FlushCacheRequest, context: Context) -> pb.FlushCacheResponse:
        require_admin(context.caller, "FlushCache")
        convert.refuse_unknown_fields(request)
        return pb.FlushCacheResponse(num_pages_freed=await self._served.started().flush_prefix_cache())

    async def _embed(
        self, request: pb.EmbedRequest | pb.ScoreRequest, inputs: Sequence[embed_convert.Input], context: Context
    ) -> tuple[str, list[Embedded]]:
        """Embeds the inputs of a request; returns its id and the embeddings."""
        frontend = self._served.accepting()
        metadata = context.invocation_metadata() or ()
        with self._served.rejections():
            convert.refuse_unknown_fields(request)
            params = embed_convert.pooling_from_proto(request.pooling_params)
            headers = text_metadata(metadata)
            options = convert.options_from_proto(request, call_deadline(context), context.caller, headers)
            check_identity("request_id", request.request_id)
        request_id, trace = request.request_id or uuid.uuid4().hex, self._served.trace(metadata, "embeddings")
        call = EmbeddingCall(inputs, params, options, request_id, context.caller.name, trace)
        return request_id, await embed_all(frontend, call)


def _prompt_usage(found: Sequence[Embedded]) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=sum(one.prompt_tokens for one in found),
        truncated_tokens=sum(one.truncated_tokens for one in found),
        cached_tokens=sum(one.cached_tokens for one in found),
    )


def _tokenize_steps(tokenizer: Tokenizer, request: pb.TokenizeRequest) -> Steps[bytes]:
    """Serializes the TokenizeResponse in steps. The text is taken from the message when its first step runs."""
    yield 0
    parts: list[bytes] = []

    def take(token_ids: list[int], _: int) -> None:
        parts.append(value_of(pb.TokenizeResponse(token_ids=token_ids).SerializeToString()))

    yield from tokenizer.encode_steps(request.text, take)
    return of_one_field(pb.TokenizeResponse.TOKEN_IDS_FIELD_NUMBER, parts)


def _detokenize_steps(tokenizer: Tokenizer, request: pb.DetokenizeRequest, vocab_size: int) -> Steps[bytes]:
    """Serializes the DetokenizeResponse in steps."""
    yield 0
    token_ids = numbers_of(value_of(request.SerializeToString()))
    parts: list[bytes] = []
    yield from tokenizer.decode_steps(token_ids, lambda text: parts.append(text.encode()), vocab_size)
    return of_one_field(pb.DetokenizeResponse.TEXT_FIELD_NUMBER, parts)


def _stats(stats: EngineStats) -> pb.EngineStats:
    return pb.EngineStats(**{field.name: getattr(stats, field.name) for field in pb.EngineStats.DESCRIPTOR.fields})


def _is_refusal(answer: Status) -> bool:
    """Whether the client is told to come back later."""
    return answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED and bool(answer.metadata)


def bytes_per_token(params: SamplingParams, limits: ModelLimits) -> int:
    """Returns the memory in bytes of an output token of a request that waits to be read."""
    width = limits.resolved_logprobs(params.logprobs)
    return BYTES_PER_TOKEN + (0 if width is None else 8 * (1 + width))


def text_metadata(metadata: Iterable[tuple[str, str | bytes]]) -> dict[str, str]:
    """Returns a call's metadata by name; of a name that occurs twice the last value."""
    return {name: value for name, value in metadata if isinstance(value, str)}


def call_deadline(context: Context) -> float | None:
    """Returns the gRPC deadline that the client set for the call, in Unix seconds."""
    remaining = context.time_remaining()
    return None if remaining is None else time.time() + remaining


def _response(delta: Delta) -> pb.GenerateResponse:
    response = pb.GenerateResponse(
        request_id=delta.request_id,
        token_ids=delta.token_ids,
        text=delta.text,
        index=delta.index,
        logprobs=() if delta.logprobs is None else convert.logprobs_to_proto(delta.logprobs, delta.token_ids),
    )
    if delta.finish_reason is not None:
        response.finish_reason = convert.reason_to_proto(delta.finish_reason)
        response.usage.prompt_tokens = delta.prompt_tokens
        response.usage.output_tokens = delta.output_tokens
        response.usage.cached_tokens = delta.cached_tokens
        response.usage.truncated_tokens = delta.truncated_tokens
    return response
