"""Defines the typed messages between front end and engine, and their msgpack encoding.

Each message is one frozen struct; on the wire it is [its name, its fields in order]. Both ends run the same version, so
fields are positional. An unknown name, a field too many, or one of another type is a ValueError, never a guess.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from jaxserve.kv_cache.event_log import CacheEvent
from jaxserve.logprob_columns import LogprobColumns
from jaxserve.request import EngineRequest, FinishReason
from jaxserve.request_checks import ModelLimits
from jaxserve.runner.protocol import RunnerInfo
from jaxserve.telemetry.histograms import HistogramCounts


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True, forbid_unknown_fields=True):
    """Sets the encoding that all messages share."""


class Logprobs(_Message, frozen=True):
    """Part of other messages: log-probabilities of consecutive tokens. width, data: as `LogprobColumns.from_bytes`
    takes them."""

    width: int
    data: bytes

    @classmethod
    def of(cls, columns: LogprobColumns | None) -> Logprobs | None:
        """Returns the message that `columns` reads back; None for None."""
        return None if columns is None else cls(columns.width, columns.to_bytes())

    def columns(self) -> LogprobColumns:
        """Returns the log-probabilities."""
        return LogprobColumns.from_bytes(self.width, self.data)


class AddRequest(_Message, frozen=True):
    """Front end -> engine: run this request.

    sample_ids: names of further samples of its prompt, in order: the first of them is drawn with the next seed, and so
    on. Each is a request of its own in every other message.
    """

    request: EngineRequest
    sample_ids: tuple[str, ...] = ()


class AbortRequest(_Message, frozen=True):
    """Front end -> engine: stop computing and free pages; idempotent.

    The engine answers a request that it still knew with a final EngineOutput of reason ABORT.
    """

    request_id: str


class Shutdown(_Message, frozen=True):
    """Front end -> engine: abort everything and end."""


class AskProgress(_Message, frozen=True):
    """Front end -> engine: say how far the loop is. beat: rises with every question."""

    beat: int


class CaptureTimeline(_Message, frozen=True):
    """Front end -> engine: send the events of steps and requests from now on, or no longer.

    Both are answered with TimelineEvents, the second time with the last ones.
    """

    on: bool


class CaptureProfile(_Message, frozen=True):
    """Front end -> engine: record a profile of the process for `seconds` into a directory, which exists.

    Answered with ProfileCaptured, by a thread other than the loop's.
    """

    directory: str
    seconds: float


class FlushPrefixCache(_Message, frozen=True):
    """Front end -> engine: forget all computed pages; running requests go on. Answered with PrefixCacheFlushed.

    number: of the question, which the answer repeats.
    """

    number: int


class FollowCacheEvents(_Message, frozen=True):
    """Front end -> engine: send CacheEvents from now on, with this number, or no longer where it is 0."""

    number: int


class EngineReady(_Message, frozen=True):
    """Engine -> front end, once: the engine accepts requests.

    limits: what requests are checked against. start_seconds: wall time of start-up altogether. sampling_defaults: the
    checkpoint's own, of parameters that a request does not set. due_after_arrival: the policy sets a request's first
    token against the time of its arrival, so that one that continues another must not have the other's.
    prefix_caching: requests share pages.
    """

    info: RunnerInfo
    limits: ModelLimits
    max_num_seqs: int
    max_num_waiting: int
    start_seconds: float
    sampling_defaults: dict[str, int | float] = {}
    due_after_arrival: bool = False
    prefix_caching: bool = True


class EngineOutput(_Message, frozen=True):
    """Engine -> front end: new tokens of one request, in order; the last one carries a finish reason.

    error: one line, set when finish_reason is ERROR or DEADLINE. num_cached_tokens: prompt tokens taken from the prefix
    cache.
    time: seconds of the engine's clock at which the host had the tokens. queue_seconds, prefill_seconds: with the first
    token: from arrival to the first step that computes the request, and from there to the token. logprobs: of the
    tokens, where the request wants them. prompt_logprobs: of the prompt's tokens from `prompt_logprobs_start` on, with
    the first token. pooled: of a request with `EngineRequest.pooling`, with the finish reason: its pooled hidden state,
    float64 numbers of this machine.
    """

    request_id: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    error: str = ""
    num_cached_tokens: int = 0
    time: float = 0.0
    queue_seconds: float | None = None
    prefill_seconds: float | None = None
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None
    pooled: bytes = b""


class TokenBatch(_Message, frozen=True):
    """Engine -> front end: one new token for each of these requests, none of which ends; most rows of a step yield one.
    A request occurs in it once. time: as in EngineOutput. logprobs: of each token, where these requests want them, with
    as many of the likeliest ids as one of them wants.
    """

    request_ids: tuple[str, ...]
    token_ids: tuple[int, ...]
    time: float = 0.0
    logprobs: Logprobs | None = None


class EngineStats(_Message, frozen=True):
    """Engine -> front end: counts as of now, several times a second and when it becomes idle, for GetServerInfo and the
    running log.

    num_executables: programs that are available. num_compilations: programs that the backend compiled in the engine's
    process, at start and ever after.
    num_steps, compile_misses, num_preemptions, prompt_tokens, generation_tokens, computed_tokens, padding_tokens,
    num_dropped (requests ended in the queue because they were late, or would be):
    totals since start; a prompt counts once, when its first output token is there.
    pages_free + pages_used + pages_cached are all usable pages. group_pages: for each of several groups of layers its
    window (0 for none), the pages in the tables of running requests (one that requests share counts for each of them),
    and the cached pages; empty where there is one group. num_swapped, pages_swapped: requests whose pages are in
    host memory, and those pages. kendall_tau: how well predicted output lengths rank the last window of finished
    requests, as of at most a second ago; None while there is nothing to rank.
    num_gap_exceeded_*: total of gaps between two tokens of a request that exceeded max_decode_gap, by cause
    (`scheduler.gap_monitor.CAUSES`).
    prefix_cache_queries, prefix_cache_hits: tokens of requests looked up in the prefix cache when these were first
    admitted, and found there, since start; prefix_cache_requests, prefix_cache_request_hits: these requests, and those
    that found a page. prefix_cache_returned_tokens: found by preempted requests that came back. prefix_cache_evictions:
    pages that can no longer be found, by cause (`page_pool.EVICTION_CAUSES`). prefix_waits: requests whose prefix
    another was computing, by what they did (`scheduler.prefix_waits.WaitCounts`).
    page_bytes: of a page of all layers of a group. host_pages_free, host_pages_cached: pages of host memory, beside
    pages_swapped. host_cache_stored: pages that moved there from the device. host_cache_hits, host_cache_hit_tokens:
    requests that had pages brought back from there, and their tokens. host_cache_evictions: pages that left host memory
    otherwise, by cause (`host_pool.HOST_EVICTION_CAUSES`). host_cache_choices: of requests that found pages there
    (`scheduler.host_fetches.FetchCounts`). page_copies: by way ("out", "in"), pages copied to and from host memory, and
    seconds that this took. disk: of the directory of the cache (`runner.protocol.DiskCounts`), empty where there is
    none; disk_choices: as host_cache_choices. shared_reads: choices to read the pages that rows share once
    (`Runner.shared_reads`).
    device_busy_seconds: lower bound of the time in which the device has had a step to compute. step_histograms: of all
    steps, by the names of STEP_HISTOGRAMS.
    """

    num_running: int = 0
    num_waiting: int = 0
    pages_free: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    group_pages: tuple[tuple[int, int, int], ...] = ()
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
    num_gap_exceeded_decodes: int = 0
    num_gap_exceeded_preemption: int = 0
    num_gap_exceeded_swap: int = 0
    num_gap_exceeded_minimum_chunk: int = 0
    num_gap_exceeded_missing_program: int = 0
    num_gap_exceeded_stall: int = 0
    num_gap_exceeded_estimate: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    prefix_cache_requests: int = 0
    prefix_cache_request_hits: int = 0
    prefix_cache_returned_tokens: int = 0
    prefix_cache_evictions: dict[str, int] = {}
    prefix_waits: dict[str, int] = {}
    page_bytes: int = 0
    host_pages_free: int = 0
    host_pages_cached: int = 0
    host_cache_stored: int = 0
    host_cache_hits: int = 0
    host_cache_hit_tokens: int = 0
    host_cache_evictions: dict[str, int] = {}
    host_cache_choices: dict[str, int] = {}
    shared_reads: dict[str, int] = {}
    page_copies: dict[str, tuple[int, float]] = {}
    disk: dict[str, int] = {}
    disk_choices: dict[str, int] = {}
    device_busy_seconds: float = 0.0
    step_histograms: dict[str, HistogramCounts] = {}


class Progress(_Message, frozen=True):
    """Engine -> front end, in answer to AskProgress: how far the loop is, reported by a thread other than the loop's.

    beat: that of the question. turns: of the loop, begun so far. in_turn: one is under way. largest_step_seconds: what
    the largest step is predicted to take; 0 where nothing is known.
    """

    beat: int
    turns: int
    in_turn: bool
    largest_step_seconds: float = 0.0


class TimelineEvents(_Message, frozen=True):
    """Engine -> front end: events since the last message of the kind, as rows of `recorder.event_row`.

    last: no more follow. dropped: events that there was no room for.
    """

    rows: tuple[tuple[Any, ...], ...]
    last: bool
    dropped: int = 0


class ProfileCaptured(_Message, frozen=True):
    """Engine -> front end: the profile is in its directory. error: one line on why it is not, else empty."""

    directory: str
    error: str = ""


class PrefixCacheFlushed(_Message, frozen=True):
    """Engine -> front end, in answer to FlushPrefixCache. num_pages: that became free."""

    number: int
    num_pages: int


class CacheEvents(_Message, frozen=True):
    """Engine -> front end: what has happened to pages of the prefix cache, in order. number: of FollowCacheEvents."""

    number: int
    events: tuple[CacheEvent, ...]


class EngineFailed(_Message, frozen=True):
    """Engine -> front end: the engine ends; every unfinished request has failed with this one line."""

    error: str


ToEngine = (
    AddRequest
    | AbortRequest
    | Shutdown
    | AskProgress
    | CaptureTimeline
    | CaptureProfile
    | FlushPrefixCache
    | FollowCacheEvents
)
FromEngine = (
    EngineReady
    | EngineOutput
    | TokenBatch
    | EngineStats
    | EngineFailed
    | Progress
    | TimelineEvents
    | ProfileCaptured
    | PrefixCacheFlushed
    | CacheEvents
)
Message = ToEngine | FromEngine


def _plain(value: Any) -> Any:
    """Converts subclasses of numbers and texts, as numpy has some, to the plain type; rejects other types."""
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    raise TypeError(f"a message cannot hold a {type(value).__name__}")


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_plain)
_DECODER: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def outputs(message: FromEngine) -> Sequence[EngineOutput]:
    """Returns a message's outputs, one for each request; empty for messages about the engine."""
    if isinstance(message, EngineOutput):
        return (message,)
    if isinstance(message, TokenBatch):
        columns = None if message.logprobs is None else message.logprobs.columns()
        return [
            EngineOutput(
                request_id,
                (token_id,),
                time=message.time,
                logprobs=None if columns is None else Logprobs.of(columns.part(place, place + 1)),
            )
            for place, (request_id, token_id) in enumerate(zip(message.request_ids, message.token_ids, strict=True))
        ]
    return ()


def encode(message: Message) -> bytes:
    """Returns the msgpack bytes of one message."""
    return _ENCODER.encode(message)


def decode(data: bytes) -> Message:
    """Decodes a message; raises ValueError when `data` is not one."""
    try:
        return _DECODER.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ValueError(f"engine message is malformed: {error}") from error
