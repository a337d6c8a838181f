"""The typed messages between front end and engine, and their msgpack encoding.

Every message is a frozen dataclass of plain values; on the wire it is [kind, fields...]. Both ends run the same
version, so fields are positional; an unknown kind or a wrong field count is a ValueError, never a guess.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import msgpack

from jaxserve.request import EngineRequest, FinishReason, ModelLimits
from jaxserve.telemetry.startup_spans import Phase


@dataclasses.dataclass(frozen=True)
class AddRequest:
    """Front end -> engine: run this request."""

    request: EngineRequest


@dataclasses.dataclass(frozen=True)
class AbortRequest:
    """Front end -> engine: stop computing and free pages; idempotent.

    The engine answers a request that it still knew with a final RequestOutput of reason ABORT.
    """

    request_id: str


@dataclasses.dataclass(frozen=True)
class Shutdown:
    """Front end -> engine: abort everything and end."""


@dataclasses.dataclass(frozen=True)
class AskProgress:
    """Front end -> engine: say how far the loop is. beat: rises with every question."""

    beat: int


@dataclasses.dataclass(frozen=True)
class EngineReady:
    """Engine -> front end, once: the engine accepts requests.

    attention: implementation in use. kv_cache: dtype of keys and values in pages, and where the scales of a quantised
    one are from. num_pages: usable pages (null page not counted). num_executables: programs of the closed set;
    num_missing_executables of them join while it serves. bundle: the directory that they were loaded from; None where
    they were compiled. num_cached_executables: those of them that were taken from the compilation cache.
    compile_seconds, start_seconds: wall time of compiling, or loading, and of start-up altogether. phases: name, begin
    and seconds of each part of the engine's start, where its process began at 0; some run side by side. memory: bytes
    of the device, by what they are planned for; the sum is all of them. num_host_pages: for swapped sequences.
    recompute_seconds_per_token, swap_seconds_per_page: what bringing a preempted sequence back was measured to cost; 0
    where nothing can be swapped.
    """

    vocab_size: int
    max_model_len: int
    max_prompt_len: int
    eos_token_ids: tuple[int, ...]
    page_size: int
    num_pages: int
    max_num_seqs: int
    max_num_waiting: int
    num_parameters: int
    architecture: str
    dtype: str
    platform: str
    attention: str
    num_executables: int
    compile_seconds: float
    start_seconds: float
    kv_cache: str
    bundle: str | None = None
    num_cached_executables: int = 0
    num_missing_executables: int = 0
    phases: tuple[Phase, ...] = ()
    memory: tuple[tuple[str, int], ...] = ()
    num_host_pages: int = 0
    recompute_seconds_per_token: float = 0.0
    swap_seconds_per_page: float = 0.0

    @property
    def limits(self) -> ModelLimits:
        return ModelLimits(
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            pool_tokens=self.page_size * self.num_pages,
            max_prompt_len=self.max_prompt_len,
            eos_token_ids=self.eos_token_ids,
        )


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """Engine -> front end: new tokens of one request, in order; the last one carries a finish reason.

    error: one line, set when finish_reason is ERROR. num_cached_tokens: prompt tokens taken from the prefix cache.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    error: str = ""
    num_cached_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Engine -> front end: one new token of each of these requests, which all go on: what most rows of a step bring.

    A request stands in it once.
    """

    request_ids: tuple[str, ...]
    token_ids: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Engine -> front end: counts as of now, several times a second and when it becomes idle, for GetServerInfo and the
    running log.

    num_executables: programs that are there. num_compilations: programs that the backend compiled in the engine's
    process, at start and ever after.
    num_steps, compile_misses, num_preemptions, prompt_tokens, generation_tokens, computed_tokens, padding_tokens,
    num_dropped (requests ended in the queue since they were late, or would be):
    totals since start; a prompt counts when its first output token is there.
    pages_free + pages_used + pages_cached are all usable pages. num_swapped, pages_swapped: requests whose pages are in
    host memory, and those pages. kendall_tau: how well predicted output lengths rank the last window of finished
    requests, as of at most a second ago; None while there is nothing to rank.
    """

    num_running: int = 0
    num_waiting: int = 0
    pages_free: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    num_steps: int = 0
    num_executables: int = 0
    num_compilations: int = 0
    compile_misses: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    computed_tokens: int = 0
    padding_tokens: int = 0
    num_swapped: int = 0
    pages_swapped: int = 0
    num_preemptions_recompute: int = 0
    num_preemptions_swap: int = 0
    num_dropped: int = 0
    kendall_tau: float | None = None


@dataclasses.dataclass(frozen=True)
class Progress:
    """Engine -> front end, in answer to AskProgress: how far the loop is, said by another thread than the loop's.

    beat: that of the question. turns: of the loop, begun so far. in_turn: one is under way. largest_step_seconds: what
    the largest step is predicted to take; 0 where nothing is known.
    """

    beat: int
    turns: int
    in_turn: bool
    largest_step_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class EngineFailed:
    """Engine -> front end: the engine ends; every unfinished request has failed with this one line."""

    error: str


ToEngine = AddRequest | AbortRequest | Shutdown | AskProgress
FromEngine = EngineReady | RequestOutput | TokenBatch | EngineStats | EngineFailed | Progress
Message = ToEngine | FromEngine

_KINDS: tuple[type, ...] = (
    AddRequest,
    AbortRequest,
    Shutdown,
    EngineReady,
    RequestOutput,
    TokenBatch,
    EngineStats,
    EngineFailed,
    AskProgress,
    Progress,
)
_CODES = {kind: code for code, kind in enumerate(_KINDS)}
_NAMES = {
    kind: tuple(field.name for field in dataclasses.fields(kind)) for kind in (*_KINDS, EngineRequest)
}  # looked up once: `dataclasses.fields` costs more than the rest of a message


def outputs(message: FromEngine) -> Sequence[RequestOutput]:
    """What a message says of requests, one by one; nothing for messages about the engine."""
    if isinstance(message, RequestOutput):
        return (message,)
    if isinstance(message, TokenBatch):
        return [
            RequestOutput(request_id, (token_id,))
            for request_id, token_id in zip(message.request_ids, message.token_ids, strict=True)
        ]
    return ()


def encode(message: Message) -> bytes:
    """msgpack bytes of one message."""
    return packb([_CODES[type(message)], *_fields(message)])


def decode(data: bytes) -> Message:
    """The message in `data`; raises ValueError when it is not one."""
    values = msgpack.unpackb(data, use_list=False)
    if not isinstance(values, tuple) or not values or not 0 <= values[0] < len(_KINDS):
        raise ValueError("engine message is malformed: unknown kind")
    kind = _KINDS[values[0]]
    fields = values[1:]
    if len(fields) != len(_NAMES[kind]):
        raise ValueError(f"engine message {kind.__name__} has {len(fields)} fields, not {len(_NAMES[kind])}")
    if kind is AddRequest:
        return AddRequest(EngineRequest(*fields[0]))
    if kind is RequestOutput:
        request_id, token_ids, reason, *rest = fields
        return RequestOutput(request_id, token_ids, None if reason is None else FinishReason(reason), *rest)
    return kind(*fields)


def packb(value: Any) -> bytes:
    """msgpack bytes of plain values."""
    packed = msgpack.packb(value)
    assert packed is not None  # the package's stubs allow None
    return packed


def _fields(message: Any) -> list[Any]:
    values = []
    for name in _NAMES[type(message)]:
        value = getattr(message, name)
        if isinstance(value, FinishReason):
            value = value.value
        elif isinstance(value, EngineRequest):
            value = _fields(value)
        values.append(value)
    return values
