"""Provides `HttpClient`, which makes the calls of `grpc_client.Client` over HTTP, from blocking code.

Its calls raise `HttpCallError` for what the server refuses, and `HttpConnectionError` where it cannot be reached or
does not speak HTTP. From asyncio, or for all of OpenAI's API, use OpenAI's client.
"""

from __future__ import annotations

import array
import base64
import contextlib
import dataclasses
import http.client
import json
import sys
import time
import urllib.parse
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

from jaxserve.config.plain_params import written
from jaxserve.frontend.warm_prefix import WarmedPrefix
from jaxserve.pooling_params import PoolingParams
from jaxserve.request import FinishReason
from jaxserve.sampling_params import SamplingParams
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
from jaxserve.serving.clients.embed_requests import Embeddings, Inputs, Scores, listed, pooling_fields
from jaxserve.serving.problem import Code

DEFAULT_URL = "http://127.0.0.1:8000"
_CONNECT_SECONDS = 10.0
_POLL_SECONDS = 0.1
_ANSWER_SECONDS = 60.0
"""Seconds that the server may take for a call that generates nothing."""
_MAX_ERROR = 64 * 1024
_GRACE_SECONDS = 5.0
"""Seconds after a request's timeout, which ends it on the server, until the client gives up by itself."""

_CODES = {
    400: Code.INVALID_ARGUMENT,
    401: Code.UNAUTHENTICATED,
    403: Code.PERMISSION_DENIED,
    404: Code.NOT_FOUND,
    408: Code.DEADLINE_EXCEEDED,
    409: Code.ALREADY_EXISTS,
    413: Code.INVALID_ARGUMENT,
    422: Code.INVALID_ARGUMENT,
    429: Code.RESOURCE_EXHAUSTED,
    499: Code.DEADLINE_EXCEEDED,
    501: Code.UNIMPLEMENTED,
    502: Code.UNAVAILABLE,
    503: Code.UNAVAILABLE,
    504: Code.DEADLINE_EXCEEDED,
}


class HttpCallError(RuntimeError):
    """The server refuses a call, or ends it with an error; the text is the server's line.

    Attributes:
        code: what kind of problem it is.
        status: of the HTTP response; 200 where the error came in the middle of a stream.
        retry_seconds: when to try again, where the server says so.
    """

    def __init__(self, code: Code, status: int, details: str, retry_seconds: float | None = None):
        super().__init__(details)
        self.code = code
        self.status = status
        self.retry_seconds = retry_seconds


class HttpConnectionError(RuntimeError):
    """The server cannot be reached, does not speak HTTP, or has broken off the connection; `__cause__` is the error."""


@dataclasses.dataclass(frozen=True)
class HttpModelInfo:
    """Describes the served model."""

    name: str
    max_model_len: int


class HttpClient:
    """Makes blocking calls to one server; a context manager. May be used from several threads: each call has a
    connection of its own.

    Args:
        address: URL of the server, with a prefix where a proxy wants one.
        credentials: API key and TLS; an https URL has TLS anyway.

    Raises ValueError for a URL or files that cannot be used.
    """

    def __init__(self, address: str = DEFAULT_URL, credentials: Credentials = Credentials()):
        parts = urllib.parse.urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"address is {address!r}; it must be http://HOST:PORT or https://HOST:PORT")
        self.address = address
        self._host, self._port = parts.hostname, parts.port
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        tls = credentials.tls or parts.scheme == "https"
        self._context = dataclasses.replace(credentials, tls=tls).ssl_context()
        self._headers = dict(credentials.metadata())
        self._model: HttpModelInfo | None = None

    def __enter__(self) -> HttpClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Does nothing: connections end with their calls."""

    def generate(
        self,
        prompt: Prompt,
        params: Params = None,
        *,
        timeout: float | None = None,
        tenant: str = "",
        priority: int = 0,
        cache_salt: str = "",
        prefix_caching: bool = True,
    ) -> Generator[Chunk, None, None]:
        """Streams one request's chunks; closing the iterator aborts the request.

        timeout: seconds for the whole request, or None. tenant, priority (a higher number is more urgent), cache_salt,
        prefix_caching: as over gRPC.
        """
        path, body = generate_body(prompt, params)
        body["model"] = self.model_info().name
        body |= _cache_fields(cache_salt, prefix_caching)
        headers = _option_headers(tenant, priority, timeout)
        patience = None if timeout is None else timeout + _GRACE_SECONDS
        with self._call("POST", path, body, headers, patience) as response:
            yield from _chunks(_events(response))

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
        tenant: str = "",
        priority: int = 0,
        cache_salt: str = "",
        prefix_caching: bool = True,
    ) -> Embeddings:
        """Returns the embeddings of texts or lists of token ids. Other arguments are as for `generate`."""
        body = {"input": listed(inputs), "encoding_format": "base64", **pooling_fields(params)}
        body |= _cache_fields(cache_salt, prefix_caching)
        found = self._embed("/v1/embeddings", body, timeout, _option_headers(tenant, priority, timeout))
        vectors = [array.array("f", base64.b64decode(one["embedding"])) for one in found["data"]]
        if sys.byteorder == "big":
            for vector in vectors:
                vector.byteswap()
        return Embeddings([list(vector) for vector in vectors], found["usage"]["prompt_tokens"])

    def score(
        self,
        queries: Inputs,
        documents: Inputs,
        params: PoolingParams | None = None,
        *,
        timeout: float | None = None,
        tenant: str = "",
        priority: int = 0,
        cache_salt: str = "",
        prefix_caching: bool = True,
    ) -> Scores:
        """Returns how similar queries and documents are. Other arguments are as for `embed`."""
        body = {"queries": listed(queries), "documents": listed(documents), **pooling_fields(params)}
        body |= _cache_fields(cache_salt, prefix_caching)
        found = self._embed("/v1/score", body, timeout, _option_headers(tenant, priority, timeout))
        return Scores([one["score"] for one in found["data"]], found["usage"]["prompt_tokens"])

    def warm_prefix(
        self, prompt: Prompt, *, timeout: float | None = None, tenant: str = "", priority: int = 0, cache_salt: str = ""
    ) -> WarmedPrefix:
        """Computes a prompt, so that requests that begin with it find its pages; generates nothing. Arguments are as
        for `generate`."""
        _, body = generate_body(prompt, None)
        body = {name: body[name] for name in ("prompt", "messages") if name in body} | _cache_fields(cache_salt, True)
        found = self._embed("/v1/cache/warm_up", body, timeout, _option_headers(tenant, priority, timeout))
        return WarmedPrefix(found["id"], found["prompt_tokens"], found["cached_tokens"])

    def flush_cache(self) -> int:
        """Empties the prefix cache; returns the pages that became free. Only administrators may."""
        return self._answer("POST", "/reset_prefix_cache")["freed_pages"]

    def _embed(self, path: str, body: dict[str, Any], timeout: float | None, headers: dict[str, str]) -> Any:
        """Returns the JSON of a response that is computed."""
        body["model"] = self.model_info().name
        patience = None if timeout is None else timeout + _GRACE_SECONDS
        with self._call("POST", path, body, headers, patience) as response:
            return json.loads(response.read())

    def model_info(self, timeout: float | None = None) -> HttpModelInfo:
        """Returns the served model; asks for it once."""
        if self._model is None:
            models = self._answer("GET", "/v1/models", timeout=timeout)["data"]
            self._model = HttpModelInfo(models[0]["id"], int(models[0].get("max_model_len") or 0))
        return self._model

    def tokenize(self, text: str) -> list[int]:
        """Returns the token ids of a text, encoded as a prompt would be."""
        return self._answer("POST", "/tokenize", {"prompt": text})["tokens"]

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Returns the text of token ids."""
        return self._answer("POST", "/detokenize", {"tokens": list(token_ids)})["prompt"]

    def wait_ready(self, timeout: float = 60.0) -> None:
        """Returns when the server serves. Raises TimeoutError after `timeout` seconds."""
        end = time.monotonic() + timeout
        while (left := end - time.monotonic()) > 0:
            try:
                self._answer("GET", "/health", timeout=left)
            except HttpCallError as error:
                if error.code is not Code.UNAVAILABLE:
                    raise
            except HttpConnectionError as error:
                if not isinstance(error.__cause__, ConnectionError | TimeoutError):
                    raise
            else:
                return
            time.sleep(_POLL_SECONDS)
        raise TimeoutError(f"server at {self.address} was not ready within {timeout:g} s")

    def _answer(self, method: str, path: str, body: Any = None, timeout: float | None = None) -> Any:
        """Returns the JSON of a response. Raises HttpCallError."""
        with self._call(method, path, body, {}, timeout or _ANSWER_SECONDS) as response:
            content = response.read()
        try:
            return json.loads(content) if content else None
        except ValueError as error:
            raise HttpCallError(
                Code.INTERNAL, 200, f"{path} answers what is no JSON; is this a jaxserve server?"
            ) from error

    @contextlib.contextmanager
    def _call(
        self, method: str, path: str, body: Any, headers: dict[str, str], timeout: float | None
    ) -> Iterator[http.client.HTTPResponse]:
        """Yields the response to a request. Raises HttpCallError for one that is not 200, and HttpConnectionError."""
        content = None if body is None else json.dumps(body).encode()
        headers = self._headers | headers | ({} if content is None else {"content-type": "application/json"})
        try:
            with contextlib.closing(self._connection()) as connection:
                connection.connect()
                connection.sock.settimeout(timeout)
                connection.request(method, self._prefix + path, content, headers)
                # Closed with its connection, whatever is unread: the server then aborts the request.
                with connection.getresponse() as response:
                    if response.status != 200:
                        raise _error(response.status, response.read(_MAX_ERROR), response.headers.get("retry-after"))
                    yield response
        except (OSError, http.client.HTTPException) as error:
            raise HttpConnectionError(str(error) or type(error).__name__) from error

    def _connection(self) -> http.client.HTTPConnection:
        if self._context is None:
            return http.client.HTTPConnection(self._host, self._port, timeout=_CONNECT_SECONDS)
        return http.client.HTTPSConnection(self._host, self._port, timeout=_CONNECT_SECONDS, context=self._context)


def _cache_fields(cache_salt: str, prefix_caching: bool) -> dict[str, Any]:
    """Returns the fields of a body for what a request shares with others: those that are not the default."""
    return ({"cache_salt": cache_salt} if cache_salt else {}) | ({} if prefix_caching else {"prefix_caching": False})


def _option_headers(tenant: str, priority: int, timeout: float | None) -> dict[str, str]:
    """Returns the headers for a request's tenant, priority and timeout."""
    given = {
        "x-tenant": tenant,
        "x-priority": str(priority) if priority else "",
        "x-request-timeout": "" if timeout is None else f"{timeout:g}",
    }
    return {name: value for name, value in given.items() if value}


def generate_body(prompt: Prompt, params: Params) -> tuple[str, dict[str, Any]]:
    """Returns the path and the body of a request that streams.

    params: all sampling parameters; a mapping of some, or None, leaves the others to the server.
    """
    body: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    is_chat = isinstance(prompt, Conversation)
    if params is not None:
        body |= _fields(params, is_chat)
    if isinstance(prompt, Conversation):
        return "/v1/chat/completions", body | {"messages": [dict(message) for message in prompt.messages]}
    return "/v1/completions", body | {"prompt": prompt if isinstance(prompt, str) else list(prompt)}


def _fields(params: SamplingParams | Mapping[str, Any], is_chat: bool) -> dict[str, Any]:
    """Returns the fields of a body that say the sampling parameters."""
    fields = written(params)
    if "logprobs" in fields:
        fields["return_tokens_as_token_ids"] = True
        if is_chat:  # there it is a flag
            fields |= {"logprobs": True, "top_logprobs": fields["logprobs"]}
    return fields


def _events(response: http.client.HTTPResponse) -> Iterator[Any]:
    """Yields the objects of a stream of server-sent events. Raises HttpCallError where it breaks off."""
    while line := response.readline():
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise _error_of(event["error"], 200)
        yield event
    raise HttpCallError(Code.UNAVAILABLE, 200, "the server ended the stream before the answer was complete")


def _chunks(events: Iterator[Any]) -> Iterator[Chunk]:
    """Yields the chunks of a stream. What is last of a sample, its finish reason and the usage, comes in two events and
    makes one."""
    lasts: list[Chunk] = []
    request_id = ""
    for event in events:
        request_id = event.get("id", request_id)
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            text = delta.get("content") if "delta" in choice else choice.get("text")
            found, index = tuple(_logprobs(choice.get("logprobs") or {})), choice.get("index", 0)
            ids = tuple(choice.get("token_ids") or ())
            chunk = Chunk(request_id, ids, text or "", logprobs=found, index=index)
            if reason := choice.get("finish_reason"):
                lasts.append(dataclasses.replace(chunk, finish_reason=FinishReason(reason)))
            elif chunk.text or chunk.token_ids:
                yield chunk
        if lasts and (usage := event.get("usage")):
            details = usage.get("prompt_tokens_details") or {}
            counts = usage["prompt_tokens"], usage["completion_tokens"], details.get("cached_tokens") or 0
            truncated = details.get("truncated_tokens") or 0
            yield from [dataclasses.replace(last, usage=Usage(*counts, truncated)) for last in lasts]
            return


def _logprobs(found: dict[str, Any]) -> Iterator[TokenLogprob]:
    """Yields the log-probabilities of a choice's tokens, which are spelled by their ids."""
    for entry in found.get("content") or ():  # of a chat
        top = tuple((_id_of(one["token"]), one["logprob"]) for one in entry["top_logprobs"])
        yield TokenLogprob(_id_of(entry["token"]), entry["logprob"], top=top)
    for token, value, others in zip(
        *(found.get(name) or () for name in ("tokens", "token_logprobs", "top_logprobs")), strict=True
    ):
        top = sorted(((_id_of(other), other_value) for other, other_value in others.items()), key=lambda one: -one[1])
        yield TokenLogprob(_id_of(token), value, top=tuple(top))


def _id_of(token: str) -> int:
    return int(token.removeprefix("token_id:"))


def _error(status: int, content: bytes, retry_after: str | None) -> HttpCallError:
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    retry_seconds = float(retry_after) if retry_after and retry_after.isdigit() else None
    if isinstance(found, dict) and "error" in found:
        return _error_of(found["error"], status, retry_seconds)
    details = f"the server answers {status} {http.client.responses.get(status, '')}".strip()
    if isinstance(found, dict) and found.get("status"):
        details = f"the server is {found['status']}"
    return HttpCallError(_CODES.get(status, Code.INTERNAL), status, details, retry_seconds)


def _error_of(error: Any, status: int, retry_seconds: float | None = None) -> HttpCallError:
    """Returns an error in OpenAI's shape as HttpCallError. In a stream the kind of problem is in the error itself."""
    error = error if isinstance(error, dict) else {"message": str(error)}
    number = error.get("code") if status == 200 and isinstance(error.get("code"), int) else status
    return HttpCallError(
        _CODES.get(number, Code.INTERNAL), status, " ".join(str(error.get("message", "")).split()), retry_seconds
    )
