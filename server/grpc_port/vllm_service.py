"""Implements vllm.grpc.engine.VllmEngine, which gateways such as smg speak, in terms of the front end.

The gateway encodes, decodes and parses: requests bring token ids, answers are token ids. What decides when the output
ends, stop strings included, is the engine's. The messages are those of the package smg-grpc-proto, an optional one.
"""

# ruff: noqa: N802  the names of RPCs are those of the proto
from __future__ import annotations

import asyncio
import datetime
import functools
import hashlib
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2_grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

import jaxserve
from jaxserve.config.sampling_fields import check_count
from jaxserve.config.shown import shown
from jaxserve.frontend.delta import Delta, PromptLogprobs
from jaxserve.frontend.delta_stream import DeltaStream
from jaxserve.logprob_columns import LogprobColumns
from jaxserve.pooling_params import PoolingParams
from jaxserve.request import RequestOptions
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.access.callers import Caller, require_admin
from jaxserve.serving.access.request_headers import request_options
from jaxserve.serving.embedding_calls import EmbeddingCall, embed_all
from jaxserve.serving.grpc_port import vllm_convert as convert
from jaxserve.serving.grpc_port.convert import refuse_unknown_bytes, refuse_unknown_fields
from jaxserve.serving.grpc_port.kv_events import EventStream, stream_events
from jaxserve.serving.grpc_port.oversized import CheckPromptBytes
from jaxserve.serving.grpc_port.service import Context, bytes_per_token, call_deadline, errors_as_status, text_metadata
from jaxserve.serving.grpc_port.tokenizer_bundle import tokenizer_zip
from jaxserve.serving.grpc_port.vllm_load import ForwardedRequest, LoadRecord
from jaxserve.serving.problem import ForbiddenError, NotFoundError, UnimplementedError, check_delta, fails_alone
from jaxserve.serving.served_model import ServedModel

_SERVICE = pb.DESCRIPTOR.services_by_name["VllmEngine"]
SERVICE_NAME: str = _SERVICE.full_name

MAX_ABORTS = 1024
"""Maximum number of request ids of one Abort call."""

_CHUNK_BYTES = 64 * 1024


class VllmEngineService(vllm_engine_pb2_grpc.VllmEngineServicer):
    """Implements the RPCs. served: the model; its state decides whether requests are taken."""

    name = SERVICE_NAME

    def __init__(self, served: ServedModel):
        self._served = served
        self._bundle: asyncio.Future[bytes] | None = None
        self._load = LoadRecord()

    def add_to(self, server: Any) -> None:
        """Registers the service with a gRPC server."""
        vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(self, server)

    @staticmethod
    def oversized_checks(check_prompt_bytes: CheckPromptBytes) -> Mapping[str, Callable[[bytes], None]]:
        """Returns the check of a large unparsed request for each method, as `OversizedInterceptor` takes them."""
        checks: dict[str, Callable[[bytes], None]] = {
            f"/{SERVICE_NAME}/{method.name}": convert.check_small for method in _SERVICE.methods
        }
        for name, check in (("Generate", convert.check_generate), ("Embed", convert.check_embed)):
            checks[f"/{SERVICE_NAME}/{name}"] = functools.partial(check, check_prompt_bytes=check_prompt_bytes)
        return checks

    # ---- requests ----

    @errors_as_status
    async def Generate(self, request: pb.GenerateRequest, context: Context) -> None:
        caller = context.caller
        frontend = self._served.accepting()
        self._load.last_receive = time.time()
        metadata = context.invocation_metadata() or ()
        with self._served.rejections():
            convert.check_request(request)
            params = convert.params_from_proto(request.sampling_params, frontend.ready.sampling_defaults)
            prompt = convert.prompt_from_proto(request)
            frontend.check_size(prompt, params)  # before anything whose cost grows with it
            refuse_unknown_fields(request, request.sampling_params)
            refuse_unknown_bytes(request.tokenized)
            asked = RequestOptions(deadline=call_deadline(context))
            options = request_options(caller, text_metadata(metadata), asked)
        streams = request.stream
        stream = await frontend.submit(
            prompt,
            params,
            options,
            request_id=request.request_id or None,
            owner=caller.name,
            trace=self._served.trace(metadata, "text_completion"),
        )
        per_token = bytes_per_token(params, frontend.ready.limits)
        context.set_backlog(lambda: stream.num_unread * per_token)
        with self._load.forwarded(len(prompt), caller.name) as forwarded:
            async with stream:  # left early, it aborts the request
                await _answer(stream, params, streams, context, forwarded)

    @errors_as_status
    async def Embed(self, request: pb.EmbedRequest, context: Context) -> pb.EmbedResponse:
        caller = context.caller
        frontend = self._served.accepting()
        self._load.last_receive = time.time()
        metadata = context.invocation_metadata() or ()
        with self._served.rejections():
            prompt = convert.ids_of_embed(request)
            frontend.check_size(prompt, PoolingParams())
            refuse_unknown_fields(request)
            refuse_unknown_bytes(request.tokenized)
            asked = RequestOptions(deadline=call_deadline(context))
            options = request_options(caller, text_metadata(metadata), asked)
        trace = self._served.trace(metadata, "embeddings")
        request_id = request.request_id or uuid.uuid4().hex
        (found,) = await embed_all(
            frontend, EmbeddingCall([prompt], PoolingParams(), options, request_id, caller.name, trace)
        )
        embedding = np.frombuffer(found.embedding, "<f4").tolist()
        return pb.EmbedResponse(embedding=embedding, prompt_tokens=found.prompt_tokens, embedding_dim=len(embedding))

    @errors_as_status
    async def Abort(self, request: pb.AbortRequest, context: Context) -> pb.AbortResponse:
        refuse_unknown_fields(request)
        check_count("request_ids", len(request.request_ids), MAX_ABORTS, "ids")
        frontend = self._served.started()
        unknown = [
            request_id for request_id in request.request_ids if not frontend.abort(request_id, context.caller.name)
        ]
        if unknown:  # the others are aborted
            raise NotFoundError(f"request_ids {shown(unknown)} name no unfinished requests")
        return pb.AbortResponse()

    # ---- what the gateway asks about the worker ----

    @errors_as_status
    async def HealthCheck(self, request: pb.HealthCheckRequest, context: Context) -> pb.HealthCheckResponse:
        # Until the model is loaded it is an error: a gateway takes any answer for a worker that it can ask for its
        # model, and asks once.
        frontend = self._served.started()
        if self._served.is_ready:
            message = "ready"
        elif self._served.draining:
            message = "the server is shutting down"
        else:
            message = f"the engine has ended: {shown(frontend.failure)}"
        return pb.HealthCheckResponse(healthy=self._served.is_ready, message=message)

    @errors_as_status
    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: Context) -> pb.GetModelInfoResponse:
        refuse_unknown_fields(request)
        ready = self._served.started().ready
        limits = ready.limits
        answer = pb.GetModelInfoResponse(
            model_path=self._served.name,  # where it lies on this machine is nobody's business
            served_model_name=self._served.name,
            is_generation=True,
            max_context_length=limits.max_model_len,
            max_req_input_len=min(limits.max_prompt_len, limits.max_model_len - 1),
            vocab_size=limits.vocab_size,
            architectures=[ready.info.architecture],
            eos_token_ids=limits.eos_token_ids,
        )
        if self._served.has_tokenizer:
            tokenizer = self._served.tokenizer()
            answer.tokenizer_path = self._served.name
            answer.bos_token_id = tokenizer.bos_token_id or 0
            answer.pad_token_id = tokenizer.pad_token_id or 0
        return answer

    @errors_as_status
    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: Context) -> pb.GetServerInfoResponse:
        refuse_unknown_fields(request)
        frontend = self._served.started()
        ready = frontend.ready
        return pb.GetServerInfoResponse(
            server_type="jaxserve",
            active_requests=frontend.num_open,
            is_paused=self._served.draining,
            last_receive_timestamp=self._load.last_receive,
            uptime_seconds=self._served.uptime_seconds,
            data_parallel_size=1,
            kv_cache_dtype=ready.info.kv_cache,
            model_dtype=ready.info.dtype,
            block_size=ready.info.page_size,
            attention_backend=ready.info.attention,
            max_num_seqs=ready.max_num_seqs,
        )

    @errors_as_status
    async def GetLoads(self, request: pb.GetLoadsRequest, context: Context) -> pb.GetLoadsResponse:
        refuse_unknown_fields(request)
        if request.dp_rank:
            raise ValueError(f"dp_rank is {request.dp_rank}; this worker has rank 0 alone: leave it out")
        frontend = self._served.started()
        return pb.GetLoadsResponse(
            timestamp=datetime.datetime.now(datetime.UTC).isoformat(),
            version=jaxserve.__version__,
            dp_rank_count=1,
            loads=[self._load.measured(frontend.stats, frontend.ready, time.monotonic(), context.caller)],
        )

    @errors_as_status
    async def GetTokenizer(self, request: common_pb2.GetTokenizerRequest, context: Context) -> None:
        refuse_unknown_fields(request)
        tokenizer = self._served.tokenizer()
        if self._bundle is None or (self._bundle.done() and self._bundle.exception() is not None):
            self._bundle = asyncio.ensure_future(asyncio.to_thread(tokenizer_zip, tokenizer))
        data = await asyncio.shield(self._bundle)  # others may wait for it
        for start in range(0, len(data), _CHUNK_BYTES):
            part = data[start : start + _CHUNK_BYTES]
            is_last = start + len(part) == len(data)
            digest = hashlib.sha256(data).hexdigest() if is_last else ""
            await context.write(common_pb2.GetTokenizerChunk(data=part, sha256=digest))

    # ---- the prefix cache ----

    @errors_as_status
    async def FlushCache(
        self, request: common_pb2.FlushCacheRequest, context: Context
    ) -> common_pb2.FlushCacheResponse:
        require_admin(context.caller, "FlushCache")
        refuse_unknown_fields(request)
        if not request.timeout_s >= 0:
            raise ValueError(f"timeout_s is {request.timeout_s}; it must be at least 0")
        # Nothing is waited for, whatever timeout_s allows: running requests keep their pages.
        num_pages = await self._served.started().flush_prefix_cache()
        return common_pb2.FlushCacheResponse(success=True, message=f"{num_pages} pages freed")

    @errors_as_status
    async def SubscribeKvEvents(self, request: common_pb2.SubscribeKvEventsRequest, context: Context) -> None:
        caller = context.caller
        self._check_follows(caller)
        refuse_unknown_fields(request)
        options = request_options(caller, text_metadata(context.invocation_metadata() or ()))
        frontend = self._served.started()
        stream = EventStream(options.tenant, frontend.ready.info.page_size, request.start_sequence_number)

        def load() -> common_pb2.EngineLoad:
            return self._load.engine_load(frontend.stats, frontend.ready, time.monotonic(), caller)

        with frontend.follow_cache(None if caller.is_admin else options.tenant) as follower:
            await stream_events(follower, stream, load, context)

    def _check_follows(self, caller: Caller) -> None:
        """Checks that a caller may subscribe to KV events. Raises UnimplementedError or ForbiddenError."""
        if not self._served.kv_events:
            raise UnimplementedError(
                "SubscribeKvEvents: KV events, which have the token ids of prompts and answers, are off; set "
                "AccessConfig.kv_events, or poll GetLoads"
            )
        if not caller.follows_cache:
            raise ForbiddenError(
                "SubscribeKvEvents: this key may not subscribe to KV events, which have the token ids of prompts and "
                "answers; use one that was made with --kv-events"
            )

    # ---- what this server does not do ----

    @errors_as_status
    async def StartProfile(
        self, request: common_pb2.StartProfileRequest, context: Context
    ) -> common_pb2.ProfileResponse:
        raise UnimplementedError("StartProfile: this server takes no profiles through this service yet")

    @errors_as_status
    async def StopProfile(self, request: common_pb2.StopProfileRequest, context: Context) -> common_pb2.ProfileResponse:
        raise UnimplementedError("StopProfile: this server takes no profiles through this service yet")


async def _answer(
    stream: DeltaStream, params: SamplingParams, streams: bool, context: Context, forwarded: ForwardedRequest
) -> None:
    """Writes the answer to a request. streams: new ids are sent as they come, too."""
    output_ids: list[list[int]] = [[] for _ in range(params.n)]
    logprobs: list[list[LogprobColumns]] = [[] for _ in range(params.n)]
    prompt: PromptLogprobs | None = None
    failed: Delta | None = None
    async for delta in stream:
        forwarded.answered(delta)
        is_last, ids = delta.finish_reason is not None, output_ids[delta.index]
        if fails_alone(delta, params.n):
            failed = failed or delta
        elif is_last:
            check_delta(delta)
        ids += delta.token_ids
        prompt = delta.prompt_logprobs or prompt
        if delta.logprobs is not None:
            logprobs[delta.index].append(delta.logprobs)
        if streams and delta.token_ids:
            await context.write(convert.chunk(delta))
        if is_last:
            answer = convert.complete(delta, ids, params)
            if found := logprobs[delta.index]:
                columns = convert.output_logprobs(LogprobColumns.joined(found), ids)
                answer.complete.output_logprobs.CopyFrom(columns)
            if prompt is not None:
                answer.complete.input_logprobs.CopyFrom(convert.input_logprobs(prompt))
            await context.write(answer)
    if failed is not None:
        check_delta(failed)
