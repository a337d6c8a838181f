"""Carries out what the front end asks of the engine's prefix cache, and reports what it does."""

from __future__ import annotations

import dataclasses

from jaxserve.engine.messages import CacheEvents, FlushPrefixCache, FollowCacheEvents, FromEngine, PrefixCacheFlushed
from jaxserve.kv_cache.event_log import CacheEventLog
from jaxserve.scheduler import Scheduler


class CacheControl:
    """Flushes a scheduler's prefix cache, and follows its events while somebody listens."""

    def __init__(self, scheduler: Scheduler):
        self._scheduler = scheduler
        self._prefix_cache = scheduler.prefix_cache
        self._number = 0
        self._event_log: CacheEventLog | None = None

    def handle(self, message: FlushPrefixCache | FollowCacheEvents) -> list[FromEngine]:
        """Does what a message asks for; returns the answer."""
        if isinstance(message, FlushPrefixCache):
            num_pages = self._scheduler.flush_prefix_cache()
            return [*self.events(), PrefixCacheFlushed(message.number, num_pages)]
        self._number = message.number
        self._event_log = CacheEventLog() if message.number else None
        self._prefix_cache.record(self._event_log)
        return []

    def events(self) -> list[FromEngine]:
        """Returns the message of the events since the last call, where there are some."""
        if self._event_log is None:
            return []
        events = self._event_log.take()
        return [CacheEvents(self._number, events)] if events else []

    def stats(self) -> dict[str, int | dict[str, int]]:
        """Returns the fields of EngineStats that are about the prefix cache."""
        counts = self._prefix_cache.counts
        return {
            "prefix_cache_queries": counts.query_tokens,
            "prefix_cache_hits": counts.hit_tokens,
            "prefix_cache_requests": counts.queries,
            "prefix_cache_request_hits": counts.hits,
            "prefix_cache_returned_tokens": counts.returned_tokens,
            "prefix_cache_evictions": dict(self._scheduler.pool.evictions),
            "prefix_waits": dataclasses.asdict(self._scheduler.wait_counts),
        }
