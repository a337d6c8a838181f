"""Provides client stubs: `Client` for synchronous code and `AsyncClient` for asyncio, with the same methods.

Every call raises `grpc.RpcError` when it fails; its `code()` is the status (the proto file lists what each means) and
its `details()` the server's one line.
"""

# ruff: noqa: ASYNC109  a gRPC timeout travels with the call and ends it on the server too; asyncio.timeout does not
from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxserve.pooling_params import PoolingParams
from jaxserve.serving.clients.client_credentials import Credentials
from jaxserve.serving.clients.client_results import (
    Chunk,
    Completion,
    Conversation,
    Params,
    Prompt,
    TokenLogprob,
    Usage,
    join,
)
from jaxserve.serving.clients.embed_requests import (
    Embeddings,
    Inputs,
    Scores,
    embed_request,
    embeddings_of,
    score_request,
    scores_of,
)
from jaxserve.serving.grpc_port import convert
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2_grpc as pb_grpc

DEFAULT_ADDRESS = "127.0.0.1:50051"
_POLL_SECONDS = 0.1

# The server bounds what it is sent; how much it answers is for the caller to choose. A proxy from the environment would
# silently stand between client and server.
_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.enable_http_proxy", 0))


def generate_request(
    prompt: Prompt,
    params: Params = None,
    *,
    request_id: str = "",
    tenant: str = "",
    priority: int = 0,
    deadline: float | None = None,
    cache_salt: str = "",
    prefix_caching: bool = True,
) -> pb.GenerateRequest:
    """Builds the message of a Generate call.

    Args:
        prompt: text, token ids, or a conversation.
        params: all sampling parameters; a mapping of some, or None, leaves the others to the server.
        deadline: Unix seconds.

    The other arguments are the fields of the proto.

    Raises ValueError for a value that the wire cannot carry.
    """
    request = pb.GenerateRequest(
        request_id=request_id,
        **_prompt(prompt),
        sampling_params=None if params is None else convert.params_to_proto(params),
        tenant=tenant,
        priority=priority,
        deadline=deadline,
        cache_salt=cache_salt,
    )
    if not prefix_caching:
        request.prefix_caching = False
    return request


def _prompt(prompt: Prompt) -> dict[str, Any]:
    """Returns the field of a message for a prompt."""
    match prompt:
        case str():
            return {"text": prompt}
        case Conversation():
            messages = [pb.ChatMessage(**message) for message in prompt.messages]
            return {"messages": pb.ChatMessages(messages=messages)}
        case _:
            return {"token_ids": pb.TokenIds(ids=prompt)}


class Client:
    """Makes blocking calls to one server; a context manager. May be used from several threads.

    Args:
        address: HOST:PORT.
        credentials: API key and TLS. Raises OSError where one of their files cannot be read.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, credentials: Credentials = Credentials()):
        self.address = address
        self._metadata = credentials.metadata()
        secure = credentials.channel_credentials()
        if secure is None:
            self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, secure, options=_OPTIONS)
        self._stub: Any = pb_grpc.JaxServeStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection; unfinished calls are canceled."""
        self._channel.close()

    def generate(
        self,
        prompt: Prompt,
        params: Params = None,
        *,
        timeout: float | None = None,
        **fields: Any,
    ) -> Generator[Chunk, None, None]:
        """Streams one request's chunks; closing the iterator aborts the request.

        timeout: seconds for the whole request, or None. fields: see `generate_request`.
        """
        call = self._stub.Generate(generate_request(prompt, params, **fields), timeout=timeout, metadata=self._metadata)
        try:
            for response in call:
                yield _chunk(response)
        finally:
            call.cancel()

    def generate_text(
        self,
        prompt: Prompt,
        params: Params = None,
        *,
        timeout: float | None = None,
        **fields: Any,
    ) -> Completion:
        """Returns the complete response; arguments as for `generate`."""
        return join(list(self.generate(prompt, params, timeout=timeout, **fields)), params)

    def embed(
        self,
        inputs: Inputs,
        params: PoolingParams | None = None,
        *,
        timeout: float | None = None,
        **fields: Any,
    ) -> Embeddings:
        """Returns the embeddings of texts or lists of token ids. Other arguments are as for `generate`."""
        request = embed_request(inputs, params, **fields)
        return embeddings_of(self._stub.Embed(request, timeout=timeout, metadata=self._metadata))

    def score(
        self,
        queries: Inputs,
        documents: Inputs,
        params: PoolingParams | None = None,
        *,
        timeout: float | None = None,
        **fields: Any,
    ) -> Scores:
        """Returns how similar queries and documents are. Other arguments are as for `embed`."""
        request = score_request(queries, documents, params, **fields)
        return scores_of(self._stub.Score(request, timeout=timeout, metadata=self._metadata))

    def warm_prefix(self, prompt: Prompt, *, timeout: float | None = None, **fields: Any) -> pb.WarmPrefixResponse:
        """Computes a prompt, so that requests that begin with it find its pages; generates nothing.

        timeout: seconds, or None. fields: of the proto.
        """
        request = pb.WarmPrefixRequest(**_prompt(prompt), **fields)
        return self._stub.WarmPrefix(request, timeout=timeout, metadata=self._metadata)

    def flush_cache(self, timeout: float | None = None) -> int:
        """Empties the prefix cache; returns the pages that became free. Only administrators may."""
        answer = self._stub.FlushCache(pb.FlushCacheRequest(), timeout=timeout, metadata=self._metadata)
        return answer.num_pages_freed

    def abort(self, request_id: str) -> bool:
        """Aborts a request; False when no unfinished one has this id."""
        try:
            self._stub.Abort(pb.AbortRequest(request_id=request_id), metadata=self._metadata)
        except grpc.RpcError as error:
            if _code(error) is grpc.StatusCode.NOT_FOUND:
                return False
            raise
        return True

    def model_info(self, timeout: float | None = None) -> pb.GetModelInfoResponse:
        """Returns the served model and its limits."""
        return self._stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=timeout, metadata=self._metadata)

    def server_info(self, timeout: float | None = None) -> pb.GetServerInfoResponse:
        """Returns the server's configuration and current state."""
        return self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=timeout, metadata=self._metadata)

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of a text, encoded as a prompt would be."""
        return list(self._stub.Tokenize(pb.TokenizeRequest(text=text), metadata=self._metadata).token_ids)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Returns the text of token ids, without special tokens."""
        return self._stub.Detokenize(pb.DetokenizeRequest(token_ids=token_ids), metadata=self._metadata).text

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Returns when the server serves. Raises TimeoutError after `timeout` seconds."""
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            try:
                answer = self._health.Check(health_pb2.HealthCheckRequest(), timeout=left, wait_for_ready=True)
            except grpc.RpcError as error:
                if not _may_become_ready(error):
                    raise
            else:
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            time.sleep(_POLL_SECONDS)
        raise TimeoutError(f"server at {self.address} was not ready within {timeout:g} s")


class AsyncClient:
    """Makes the same calls with asyncio; an asynchronous context manager, created and used within one event loop.

    Args:
        address: HOST:PORT.
        credentials: API key and TLS. Raises OSError where one of their files cannot be read.
    """

    def __init__(self, address: str = DEFAULT_ADDRESS, credentials: Credentials = Credentials()):
        self.address = address
        self._metadata = credentials.metadata()
        secure = credentials.channel_credentials()
        if secure is None:
            self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(address, secure, options=_OPTIONS)
        self._stub: Any = pb_grpc.JaxServeStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection; unfinished calls are canceled."""
        await self._channel.close()

    async def generate(
        self,
        prompt: Prompt,
        params: Params = None,
        *,
        timeout: float | None = None,
        **fields: Any,
    ) -> AsyncGenerator[Chunk, None]:
        """Streams one request's chunks; cancelling the task or closing the iterator (`aclose`) aborts the request.

        timeout: seconds for the whole request, or None. fields: see `generate_request`.
        """
        call = self._stub.Generate(generate_request(prompt, params, **fields), timeout=timeout, metadata=self._metadata)
        try:
            async for response in call:
                yield _chunk(response)
        finally:
            call.cancel()

    async def generate_text(
        self,
        prompt: Prompt,
        params: Params = None,
        *,
        timeout: float | None = None,
        **fields: Any,
    ) -> Completion:
        """Returns the complete response; arguments as for `generate`."""
        return join([chunk async for chunk in self.generate(prompt, params, timeout=timeout, **fields)], params)

    async def embed(
        self,
        inputs: Inputs,
        params: PoolingParams | None = None,
        *,
        timeout: float | None = None,
        **fields: Any,
    ) -> Embeddings:
        """Returns the embeddings of texts or lists of token ids. Other arguments are as for `generate`."""
        request = embed_request(inputs, params, **fields)
        return embeddings_of(await self._stub.Embed(request, timeout=timeout, metadata=self._metadata))

    async def score(
        self,
        queries: Inputs,
        documents: Inputs,
        params: PoolingParams | None = None,
        *,
        timeout: float | None = None,
        **fields: Any,
    ) -> Scores:
        """Returns how similar queries and documents are. Other arguments are as for `embed`."""
        request = score_request(queries, documents, params, **fields)
        return scores_of(await self._stub.Score(request, timeout=timeout, metadata=self._metadata))

    async def warm_prefix(
        self, prompt: Prompt, *, timeout: float | None = None, **fields: Any
    ) -> pb.WarmPrefixResponse:
        """Computes a prompt, so that requests that begin with it find its pages; generates nothing.

        timeout: seconds, or None. fields: of the proto.
        """
        request = pb.WarmPrefixRequest(**_prompt(prompt), **fields)
        return await self._stub.WarmPrefix(request, timeout=timeout, metadata=self._metadata)

    async def flush_cache(self, timeout: float | None = None) -> int:
        """Empties the prefix cache; returns the pages that became free. Only administrators may."""
        answer = await self._stub.FlushCache(pb.FlushCacheRequest(), timeout=timeout, metadata=self._metadata)
        return answer.num_pages_freed

    async def abort(self, request_id: str) -> bool:
        """Aborts a request; False when no unfinished one has this id."""
        try:
            await self._stub.Abort(pb.AbortRequest(request_id=request_id), metadata=self._metadata)
        except grpc.RpcError as error:
            if _code(error) is grpc.StatusCode.NOT_FOUND:
                return False
            raise
        return True

    async def model_info(self, timeout: float | None = None) -> pb.GetModelInfoResponse:
        """Returns the served model and its limits."""
        return await self._stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=timeout, metadata=self._metadata)

    async def server_info(self, timeout: float | None = None) -> pb.GetServerInfoResponse:
        """Returns the server's configuration and current state."""
        return await self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=timeout, metadata=self._metadata)

    async def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of a text, encoded as a prompt would be."""
        return list((await self._stub.Tokenize(pb.TokenizeRequest(text=text), metadata=self._metadata)).token_ids)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Returns the text of token ids, without special tokens."""
        return (await self._stub.Detokenize(pb.DetokenizeRequest(token_ids=token_ids), metadata=self._metadata)).text

    async def wait_ready(self, timeout: float = 60.0) -> None:
        """Returns when the server serves. Raises TimeoutError after `timeout` seconds."""
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            try:
                answer = await self._health.Check(health_pb2.HealthCheckRequest(), timeout=left, wait_for_ready=True)
            except grpc.RpcError as error:
                if not _may_become_ready(error):
                    raise
            else:
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            await asyncio.sleep(_POLL_SECONDS)
        raise TimeoutError(f"server at {self.address} was not ready within {timeout:g} s")


def _chunk(response: pb.GenerateResponse) -> Chunk:
    usage = None
    if response.HasField("usage"):
        counts = response.usage
        usage = Usage(counts.prompt_tokens, counts.output_tokens, counts.cached_tokens, counts.truncated_tokens)
    reason = convert.reason_from_proto(response.finish_reason)
    logprobs, prompt_logprobs = map(_logprobs, (response.logprobs, response.prompt_logprobs))
    return Chunk(
        response.request_id,
        tuple(response.token_ids),
        response.text,
        reason,
        usage,
        logprobs,
        prompt_logprobs,
        response.index,
    )


def _logprobs(messages: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(one.token_id, one.logprob, one.rank, tuple(zip(one.top_ids, one.top_logprobs, strict=True)))
        if one.HasField("logprob")
        else TokenLogprob(one.token_id)
        for one in messages
    )


def _code(error: Any) -> grpc.StatusCode:
    return error.code()


def _may_become_ready(error: grpc.RpcError) -> bool:
    return _code(error) in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
