"""One request of a mixed load: over gRPC or HTTP, read to its end, canceled, late, read slowly, or malformed.

Each has an outcome, and a number of final answers, which must be one unless the client went away.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import grpc

from benchmarks.load.datasets import LoadRequest
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.clients.grpc_client import generate_request
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2_grpc as pb_grpc

PATIENCE = 180.0
"""Seconds after which a request has no answer."""

KINDS = {"plain": 0.7, "cancel": 0.1, "deadline": 0.06, "slow": 0.04, "malformed": 0.1}
"""Share of each kind of request."""


@dataclasses.dataclass
class Outcome:
    """What one request got.

    Attributes:
        status: a finish reason, the name of a gRPC status, "HTTP 400", "canceled", or "none".
        answers: final answers; for a canceled one any number up to one is right.
        tokens: of output.
    """

    port: str
    kind: str
    status: str = "none"
    answers: int = 0
    tokens: int = 0
    details: str = ""

    @property
    def is_answered(self) -> bool:
        """Whether the number of answers is right."""
        return self.answers == 1 or (self.status == "canceled" and self.answers == 0)


class MixedClient:
    """Sends requests to both ports of a server. Use it within one event loop, as an asynchronous context manager."""

    def __init__(self, grpc_address: str, http_address: str, model: str, seed: int):
        self._channel = grpc.aio.insecure_channel(grpc_address)
        self._stub: Any = pb_grpc.JaxServeStub(self._channel)
        self._http = http_address
        self._model = model
        self._random = random.Random(seed)

    async def __aenter__(self) -> MixedClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def send(self, request: LoadRequest, kind: str | None = None) -> Outcome:
        """Sends one request of a kind, or of any, to either port; returns its outcome."""
        draw = self._random
        kind = kind or draw.choices(list(KINDS), list(KINDS.values()))[0]
        port = draw.choice(("grpc", "http"))
        outcome = Outcome(port, kind)
        call = self._grpc(request, outcome) if port == "grpc" else self._over_http(request, outcome)
        leaves_after = draw.uniform(0.0, 0.5) if kind == "cancel" else PATIENCE
        try:
            async with asyncio.timeout(leaves_after):
                await call
        except TimeoutError:
            if kind == "cancel":
                outcome.status = "canceled"
        except OSError as error:
            outcome.status, outcome.details = "connection lost", str(error)
        return outcome

    # ---- gRPC ----------------------------------------------------------------------------------------------------

    async def _grpc(self, request: LoadRequest, outcome: Outcome) -> None:
        message = generate_request(request.prompt, _params(request))
        if outcome.kind == "malformed":
            self._break(message.sampling_params)
        timeout = self._random.uniform(0.005, 0.5) if outcome.kind == "deadline" else None
        call = self._stub.Generate(message, timeout=timeout)
        try:
            async for response in call:
                outcome.tokens += len(response.token_ids)
                reason = response.finish_reason
                if reason not in (pb.FINISH_REASON_UNSPECIFIED, pb.FINISH_REASON_DEADLINE):  # its status follows
                    outcome.answers += 1
                    outcome.status = pb.FinishReason.Name(reason).removeprefix("FINISH_REASON_").lower()
                if outcome.kind == "slow":
                    await asyncio.sleep(self._random.uniform(0.0, 0.5))
        except grpc.aio.AioRpcError as error:
            if outcome.answers and _is_of_the_client(error):
                return  # its deadline passed between the last message and the end of the call
            outcome.answers += 1
            outcome.status, outcome.details = error.code().name, error.details() or ""
        finally:
            call.cancel()

    def _break(self, params: Any) -> None:
        match self._random.randrange(4):
            case 0:
                params.max_tokens = self._random.choice((0, -1, 2**31, 10**6))
            case 1:
                params.temperature = self._random.choice((float("nan"), -1.0, 1e9))
            case 2:
                params.stop.append("")
            case _:
                params.stop_token_ids.append(2**30)

    # ---- HTTP ----------------------------------------------------------------------------------------------------

    async def _over_http(self, request: LoadRequest, outcome: Outcome) -> None:
        body: dict[str, Any] = {
            "model": self._model,
            "prompt": request.prompt,
            "max_tokens": request.max_tokens,
            "temperature": 0,
            "ignore_eos": request.ignore_eos,
            "stream": self._random.random() < 0.7,
        }
        headers = ""
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        if outcome.kind == "deadline":
            headers = f"x-request-timeout: {self._random.uniform(0.005, 0.5):.4f}\r\n"
        data = json.dumps(body | (self._broken_field() if outcome.kind == "malformed" else {})).encode()
        if outcome.kind == "malformed" and self._random.random() < 0.3:
            data = data[: self._random.randrange(len(data))]
        async with self._connection() as (reader, writer):
            head = f"POST /v1/completions HTTP/1.1\r\nhost: {self._http}\r\nconnection: close\r\n{headers}"
            writer.write(f"{head}content-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data)
            status = int((await reader.readline()).split()[1])
            while (await reader.readline()).strip():
                pass
            parts = []
            while chunk := await reader.read(65_536):
                parts.append(chunk)
                if outcome.kind == "slow":
                    await asyncio.sleep(self._random.uniform(0.0, 0.5))
        _take_answer(outcome, status, b"".join(parts).decode(), body["stream"])

    def _broken_field(self) -> dict[str, Any]:
        fields = (
            {"max_tokens": -1},
            {"temperature": 1e9},
            {"stop": [""]},
            {"n": 10**9},
            {"no_such_field": 1},
            {"prompt": ""},
        )
        return self._random.choice(fields)

    @contextlib.asynccontextmanager
    async def _connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        host, _, port = self._http.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            yield reader, writer
        finally:
            writer.close()


def _take_answer(outcome: Outcome, status: int, text: str, stream: bool) -> None:
    """Reads an answer over HTTP, with or without its chunks' lengths."""
    if status != 200:
        outcome.answers += 1
        outcome.status, outcome.details = f"HTTP {status}", text[:300]
        return
    if not stream:
        with contextlib.suppress(ValueError, LookupError):  # cut off: no answer
            answer = json.loads(text[text.index("{") : text.rindex("}") + 1])
            outcome.answers += 1
            outcome.status = answer["choices"][0]["finish_reason"]
            outcome.tokens = answer["usage"]["completion_tokens"]
        return
    for line in text.split("\n"):
        if not line.startswith("data: {"):
            continue
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            outcome.answers += 1
            outcome.status, outcome.details = f"error {event['error']['code']}", event["error"]["message"]
        elif event.get("usage"):
            outcome.tokens = event["usage"]["completion_tokens"]
        for choice in event.get("choices", ()):
            if choice["finish_reason"] is not None:
                outcome.answers += 1
                outcome.status = choice["finish_reason"]
    if outcome.status in ("stop", "length") and "data: [DONE]" not in text:
        outcome.answers, outcome.details = 0, "the stream ended without [DONE]"


def _params(request: LoadRequest) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=request.max_tokens, ignore_eos=request.ignore_eos)


def _is_of_the_client(error: grpc.aio.AioRpcError) -> bool:
    """Tells whether the client's gRPC has ended the call at its deadline; the server says it in words of its own."""
    return error.code() is grpc.StatusCode.DEADLINE_EXCEEDED and "Deadline Exceeded" in (error.details() or "")
