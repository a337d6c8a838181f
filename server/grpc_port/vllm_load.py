"""Measures the load that gateways balance by: what the engine says, and what only this service knows."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

from smg_grpc_proto.generated import common_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxserve.engine.messages import EngineReady, EngineStats
from jaxserve.frontend.delta import Delta
from jaxserve.serving.access.callers import Caller

_RATE_SECONDS = 1.0
"""Minimum time over which the rate of generated tokens is measured."""


@dataclasses.dataclass
class CallerCounts:
    """Counts the requests of one caller, or of all.

    unstarted_tokens: prompt tokens of requests without output. prompt_tokens: of requests with output. cached_tokens:
    those of the latter that were found in the prefix cache.
    """

    unstarted_tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0

    @property
    def hit_rate(self) -> float:
        """Returns which share of the prompt tokens was found in the prefix cache."""
        return self.cached_tokens / max(self.prompt_tokens, 1)


class LoadRecord:
    """Follows the requests that gateways forward. last_receive: when the last one came, in seconds of `time.time`."""

    def __init__(self) -> None:
        self.last_receive = 0.0
        self._counts: dict[str, CallerCounts] = {}  # by the caller's name
        self._generated: tuple[float, int] | None = None
        self._rate = 0.0

    @contextlib.contextmanager
    def forwarded(self, size: int, caller: str = "") -> Iterator[ForwardedRequest]:
        """Counts a request until it has output, or has ended. size: token ids of its prompt, or characters. caller: its
        name."""
        request = ForwardedRequest(self._counts.setdefault(caller, CallerCounts()), size)
        try:
            yield request
        finally:
            request.ended()

    def counts(self, caller: Caller) -> CallerCounts:
        """Returns what a caller may know of: its own requests, or an administrator those of all.

        What others find in the prefix cache is not for it to see.
        """
        if not caller.is_admin:
            return self._counts.get(caller.name, CallerCounts())
        rows = [dataclasses.astuple(counts) for counts in self._counts.values()]
        return CallerCounts(*map(sum, zip(*rows, strict=True)))

    def measured(self, stats: EngineStats, ready: EngineReady, now: float, caller: Caller) -> pb.SchedulerLoad:
        """Returns the load as of now, in seconds of a monotonic clock, for a caller. Text prompts count by their
        characters until they have output.
        """
        counts, num_waiting = self.counts(caller), stats.num_waiting + stats.num_swapped
        usable = max(ready.info.usable_pages, 1)
        return pb.SchedulerLoad(
            num_running_reqs=stats.num_running,
            num_waiting_reqs=num_waiting,
            num_total_reqs=stats.num_running + num_waiting,
            num_used_tokens=stats.pages_used * ready.info.page_size,
            max_total_num_tokens=usable * ready.info.page_size,
            token_usage=stats.pages_used / usable,
            gen_throughput=self._tokens_per_second(now, stats.generation_tokens),
            cache_hit_rate=counts.hit_rate,
            utilization=stats.num_running / ready.max_num_seqs,
            max_running_requests=ready.max_num_seqs,
            num_waiting_uncached_tokens=counts.unstarted_tokens,
        )

    def engine_load(self, stats: EngineStats, ready: EngineReady, now: float, caller: Caller) -> common_pb2.EngineLoad:
        """Returns the same as a record that goes with KV events."""
        load = self.measured(stats, ready, now, caller)
        return common_pb2.EngineLoad(
            running_requests=load.num_running_reqs,
            waiting_requests=load.num_waiting_reqs,
            waiting_uncached_tokens=load.num_waiting_uncached_tokens,
            token_usage=load.token_usage,
            active_token_usage=load.token_usage,
            gen_throughput=load.gen_throughput,
            max_running_requests=load.max_running_requests,
            cache_hit_rate=load.cache_hit_rate,
            num_used_tokens=load.num_used_tokens,
            max_total_num_tokens=load.max_total_num_tokens,
        )

    def _tokens_per_second(self, now: float, generated: int) -> float:
        """Returns the rate since the question before, or the one measured then where that was just now."""
        if self._generated is None:
            self._generated = now, generated
        then, before = self._generated
        if now - then >= _RATE_SECONDS:
            self._rate = (generated - before) / (now - then)
            self._generated = now, generated
        return self._rate


class ForwardedRequest:
    """Counts one request in `counts`. size: of its prompt."""

    def __init__(self, counts: CallerCounts, size: int):
        self._counts = counts
        self._unstarted = size
        counts.unstarted_tokens += size

    def answered(self, delta: Delta) -> None:
        """Takes an update of the request; the first one says that the engine has begun."""
        if self._unstarted and delta.token_ids:
            self.ended()
            self._counts.prompt_tokens += delta.prompt_tokens
            self._counts.cached_tokens += delta.cached_tokens

    def ended(self) -> None:
        """Counts the request no more; idempotent."""
        self._counts.unstarted_tokens -= self._unstarted
        self._unstarted = 0
