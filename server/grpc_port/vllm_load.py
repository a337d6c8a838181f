"""Measures the load that gateways balance by: what the engine says, and what only this service knows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxserve.engine.messages import EngineReady, EngineStats
from jaxserve.frontend.delta import Delta

_RATE_SECONDS = 1.0
"""Minimum time over which the rate of generated tokens is measured."""


class LoadRecord:
    """Follows the requests that gateways forward. last_receive: when the last one came, in seconds of `time.time`."""

    def __init__(self) -> None:
        self.last_receive = 0.0
        self.unstarted_tokens = 0  # prompt tokens of requests without output
        self.prompt_tokens = 0  # of requests with output
        self.cached_tokens = 0  # of those
        self._generated: tuple[float, int] | None = None
        self._rate = 0.0

    @contextlib.contextmanager
    def forwarded(self, size: int) -> Iterator[ForwardedRequest]:
        """Counts a request until it has output, or has ended. size: token ids of its prompt, or characters."""
        request = ForwardedRequest(self, size)
        try:
            yield request
        finally:
            request.ended()

    def measured(self, stats: EngineStats, ready: EngineReady, now: float) -> pb.SchedulerLoad:
        """Returns the load as of now, in seconds of a monotonic clock. Text prompts count by their characters until
        they have output.
        """
        num_waiting = stats.num_waiting + stats.num_swapped
        usable = max(ready.info.usable_pages, 1)
        return pb.SchedulerLoad(
            num_running_reqs=stats.num_running,
            num_waiting_reqs=num_waiting,
            num_total_reqs=stats.num_running + num_waiting,
            num_used_tokens=stats.pages_used * ready.info.page_size,
            max_total_num_tokens=usable * ready.info.page_size,
            token_usage=stats.pages_used / usable,
            gen_throughput=self._tokens_per_second(now, stats.generation_tokens),
            cache_hit_rate=self.cached_tokens / max(self.prompt_tokens, 1),
            utilization=stats.num_running / ready.max_num_seqs,
            max_running_requests=ready.max_num_seqs,
            num_waiting_uncached_tokens=self.unstarted_tokens,
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
    """Counts one request in `record`. size: of its prompt."""

    def __init__(self, record: LoadRecord, size: int):
        self._record = record
        self._unstarted = size
        record.unstarted_tokens += size

    def answered(self, delta: Delta) -> None:
        """Takes an update of the request; the first one says that the engine has begun."""
        if self._unstarted and delta.token_ids:
            self.ended()
            self._record.prompt_tokens += delta.prompt_tokens
            self._record.cached_tokens += delta.cached_tokens

    def ended(self) -> None:
        """Counts the request no more; idempotent."""
        self._record.unstarted_tokens -= self._unstarted
        self._unstarted = 0
