"""The load generator: sends requests when they are due and notes when each message of their streams arrives.

It shares the cores with the server that it measures, so that while a run lasts it does nothing but take in bytes and
note the time; messages are built before the run and read after it.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import time
from collections.abc import Iterator, Sequence

import grpc

from benchmarks.load.datasets import LoadRequest
from benchmarks.load.http2 import Connection, Http2Error, Stream, connect, messages
from benchmarks.load.load_figures import Seen
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.clients.grpc_client import generate_request
from jaxserve.serving.grpc_port import convert
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb

_METHOD = "/{}/Generate".format(pb.DESCRIPTOR.services_by_name["JaxServe"].full_name)
_STATUS = {code.value[0]: code.name for code in grpc.StatusCode}


@dataclasses.dataclass(frozen=True)
class Slowness:
    """How a slow reader reads: what is there, then nothing for `pause` seconds, and so on.

    window: bytes that the server may send it meanwhile; five or so messages of one token fill 256.
    """

    pause: float = 2.0
    window: int = 256


@dataclasses.dataclass
class _Call:
    """One request under way. pause: of its reader, 0 for one that reads at once. turns: that follow it.
    said: token ids of its prompt, once they are known, where turns follow."""

    request: LoadRequest
    payload: bytes
    arrival: float
    pause: float
    sent: float = 0.0
    stream: Stream | None = None
    turns: list[_Call] = dataclasses.field(default_factory=list)
    said: list[int] = dataclasses.field(default_factory=list)


async def drive(
    address: str,
    requests: Sequence[LoadRequest],
    arrivals: Sequence[float],
    max_concurrency: int | None = None,
    slow: Sequence[bool] | None = None,
    slowness: Slowness | None = None,
) -> tuple[list[Seen], float]:
    """Sends every request at its arrival time; returns what was seen of each, in their order, and the CPU seconds that
    this process took meanwhile.

    arrivals: seconds after the start, one a request; not used of turns that follow others (`LoadRequest.after`), which
    are built when those have ended. max_concurrency: a request that is due while as many are open waits. slow: which
    requests have a slow reader; slowness: how it reads. Raises OSError where no server listens.
    """
    slowness = slowness or Slowness()
    marks = slow or [False] * len(requests)
    calls = [
        _Call(request, _payload(request, request.prompt), arrival, slowness.pause if mark else 0.0)
        for request, arrival, mark in zip(requests, arrivals, marks, strict=True)
    ]
    for call in calls:
        if call.request.after is not None:
            calls[call.request.after].turns.append(call)
    fast = await connect(address, _METHOD)
    slow_one = await connect(address, _METHOD, slowness.window)
    try:
        with _no_collections():
            before = time.process_time()
            await _send_all(calls, fast, slow_one, max_concurrency or max(1, len(calls)))
            cpu_seconds = time.process_time() - before
    finally:
        fast.close()
        slow_one.close()
    return [_seen(call) for call in calls], cpu_seconds


async def _send_all(calls: Sequence[_Call], fast: Connection, slow: Connection, most_open: int) -> None:
    gate = asyncio.Semaphore(most_open)

    async def run(call: _Call) -> None:
        async with gate:
            call.sent = time.perf_counter()
            call.stream = (slow if call.pause else fast).start(call.payload, call.pause)
            await call.stream.done
        if call.turns:
            await asyncio.gather(*(follow(turn, call) for turn in call.turns))

    async def follow(turn: _Call, before: _Call) -> None:
        said = [*(before.said or before.request.prompt), *_answer_ids(before)]
        turn.said = [*said, *turn.request.prompt]  # pyright: ignore[reportAttributeAccessIssue]
        turn.payload = _payload(turn.request, turn.said)
        turn.arrival = time.perf_counter() + turn.request.pause
        await asyncio.sleep(turn.request.pause)
        await run(turn)

    start = time.perf_counter()
    tasks = []
    roots = [call for call in calls if call.request.after is None]
    for call in sorted(roots, key=lambda call: call.arrival):
        call.arrival += start
        if (wait := call.arrival - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.ensure_future(run(call)))
    await asyncio.gather(*tasks)


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """Without pauses of the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _payload(request: LoadRequest, prompt: str | Sequence[int]) -> bytes:
    params = SamplingParams(temperature=0.0, max_tokens=request.max_tokens, ignore_eos=request.ignore_eos)
    return generate_request(prompt, params).SerializeToString()


def _answer_ids(call: _Call) -> list[int]:
    """The token ids that a stream brought, as far as it came."""
    assert call.stream is not None
    with contextlib.suppress(Http2Error):  # `_seen` reports it
        received = messages(call.stream.chunks)
        return [token for _, data in received for token in pb.GenerateResponse.FromString(data).token_ids]
    return []


def _seen(call: _Call) -> Seen:
    assert call.stream is not None
    tokens, text = [], []
    reason, input_tokens, error = "", 0, ""
    if call.stream.status:
        error = f"{_STATUS.get(call.stream.status, call.stream.status)}: {call.stream.message}"
    try:
        received = messages(call.stream.chunks)
    except Http2Error as broken:
        received, error = [], error or str(broken)
    for moment, data in received:
        message = pb.GenerateResponse.FromString(data)
        if message.token_ids:
            tokens.append((moment, len(message.token_ids)))
        text.append(message.text)
        if message.HasField("usage"):
            found = convert.reason_from_proto(message.finish_reason)
            reason, input_tokens = found.value if found else "", message.usage.prompt_tokens
            if message.usage.output_tokens != sum(count for _, count in tokens):
                error = f"{message.usage.output_tokens} tokens were counted and others came"
    if not reason and not error:
        error = "the stream ended without a finish reason"
    ended = call.stream.ended
    return Seen(call.arrival, call.sent, ended, tuple(tokens), input_tokens, "".join(text), reason, error)
