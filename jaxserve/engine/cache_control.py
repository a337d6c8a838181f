"""Carries out what the front end asks of an engine's prefix cache, and reports what the cache does."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxserve.engine.messages import CacheEvents, FlushPrefixCache, FollowCacheEvents, FromEngine, PrefixCacheFlushed
from jaxserve.kv_cache.event_log import CacheEventLog
from jaxserve.runner.protocol import Runner
from jaxserve.scheduler import Scheduler


class CacheControl:
    """Flushes a scheduler's prefix cache, and follows its events while somebody listens."""

    def __init__(self, scheduler: Scheduler, runner: Runner):
        self._scheduler = scheduler
        self._runner = runner
        self._prefix_cache = scheduler.prefix_cache
        self._number = 0
        if runner.disk is not None:
            scheduler.pool.host.on_disk = set(runner.disk.keys)
        self._event_log: CacheEventLog | None = None

    def handle(self, message: FlushPrefixCache | FollowCacheEvents) -> list[FromEngine]:
        """Does what a message asks for; returns the answer."""
        if isinstance(message, FlushPrefixCache):
            num_pages = self._scheduler.flush_prefix_cache()
            if self._runner.disk is not None:
                self._runner.disk.forget()
            return [*self.events(), PrefixCacheFlushed(message.number, num_pages)]
        self._number = message.number
        self._event_log = CacheEventLog(grouped=self._scheduler.page_groups.count > 1) if message.number else None
        self._prefix_cache.record(self._event_log)
        return []

    def take_from_disk(self, now: float) -> None:
        """Takes over what has been read from disk, and learns what is not there any more. now: as of `schedule`."""
        disk, on_disk = self._runner.disk, self._scheduler.pool.host.on_disk
        if disk is None or on_disk is None:
            return
        waits = self._scheduler.disk_waits
        waits.page_seconds = disk.page_seconds
        for event in disk.events():
            if event.number is None:
                on_disk.discard(event.key)
                continue
            page = waits.loaded(event.number, now, found=event.found)
            if event.found:
                disk.accept(event.number, page)

    def events(self) -> list[FromEngine]:
        """Returns the message of the events since the last call, where there are some."""
        if self._event_log is None:
            return []
        events = self._event_log.take()
        return [CacheEvents(self._number, events)] if events else []

    def stats(self) -> dict[str, Any]:
        """Returns the fields of EngineStats that are about the prefix cache and host memory."""
        counts, host = self._prefix_cache.counts, self._scheduler.pool.host
        copies = self._runner.page_copies()
        return {
            "prefix_cache_queries": counts.query_tokens,
            "prefix_cache_hits": counts.hit_tokens,
            "prefix_cache_requests": counts.queries,
            "prefix_cache_request_hits": counts.hits,
            "prefix_cache_returned_tokens": counts.returned_tokens,
            "prefix_cache_evictions": dict(self._scheduler.pool.evictions),
            "prefix_waits": dataclasses.asdict(self._scheduler.wait_counts),
            "page_bytes": self._runner.info.page_bytes,
            "host_pages_free": host.num_free,
            "host_pages_cached": host.num_cached,
            "host_cache_stored": host.num_stored,
            "host_cache_hits": counts.host_hits,
            "host_cache_hit_tokens": counts.host_hit_tokens,
            "host_cache_evictions": dict(host.evictions),
            "host_cache_choices": dataclasses.asdict(self._prefix_cache.fetches.counts),
            "disk": dataclasses.asdict(self._runner.disk.counts()) if self._runner.disk is not None else {},
            "disk_choices": dataclasses.asdict(self._scheduler.disk_waits.counts),
            "shared_reads": self._runner.shared_reads(),
            "page_copies": {way: (count.pages, count.seconds) for way, count in copies.items()},
        }
