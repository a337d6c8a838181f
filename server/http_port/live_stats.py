"""Samples the figures of the page at `/`, twice a second while somebody looks at it, and keeps those of two minutes."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence

import msgspec

import jaxserve
from jaxserve.engine.messages import EngineStats
from jaxserve.serving.served_model import ServedModel
from jaxserve.telemetry.histograms import HistogramCounts, no_counts
from jaxserve.telemetry.request_meter import REQUEST_HISTOGRAMS

INTERVAL_SECONDS = 0.5
MAX_SAMPLES = 240
"""Samples that are kept: of two minutes."""
MAX_WATCHERS = 16


class TooManyWatchersError(RuntimeError):
    """As many live streams as may be are open."""


class Quantiles(msgspec.Struct, frozen=True):
    """Summarizes latencies in milliseconds, to the precision of the histogram that counts them."""

    count: int
    p50: float
    p95: float
    p99: float


class Sample(msgspec.Struct, frozen=True):
    """Holds the figures of one interval; counts and pages are those at its end.

    Attributes:
        time: Unix seconds.
        state: starting, ready, draining or failed.
        running, waiting, swapped: requests.
        prefill, decode, padding: tokens a step, on average.
        prefill_rate, generation_rate: tokens a second.
        step_rate: steps a second.
        first_token, gap: how long clients waited; None where nobody did.
        prefix_queries, prefix_hits: tokens looked up in the prefix cache in the interval, and found there; None where
            they are not shown.
    """

    time: float
    state: str
    running: int = 0
    waiting: int = 0
    swapped: int = 0
    pages_used: int = 0
    pages_cached: int = 0
    pages_free: int = 0
    prefill: float = 0.0
    decode: float = 0.0
    padding: float = 0.0
    prefill_rate: float = 0.0
    generation_rate: float = 0.0
    step_rate: float = 0.0
    first_token: Quantiles | None = None
    gap: Quantiles | None = None
    prefix_queries: int | None = 0
    prefix_hits: int | None = 0

    def without_cache(self) -> Sample:
        """Returns the sample as those see it who are no administrators: what others have in the prefix cache is not for
        them to know, so that cached pages, which may be taken at any time, count as free."""
        return msgspec.structs.replace(
            self,
            pages_cached=0,
            pages_free=self.pages_free + self.pages_cached,
            prefix_queries=None,
            prefix_hits=None,
        )


class Server(msgspec.Struct, frozen=True):
    """Describes what is served, once the model is loaded."""

    model: str
    version: str
    platform: str
    max_model_len: int
    max_num_seqs: int
    max_num_waiting: int
    num_pages: int
    page_size: int
    can_chat: bool


@dataclasses.dataclass(frozen=True)
class Totals:
    """Holds what is counted at one time, in Unix seconds: by the engine, and of requests by name."""

    time: float
    stats: EngineStats
    requests: Mapping[str, HistogramCounts]


class LiveStats:
    """Samples one served model while somebody watches, and for two minutes after, so that a page that returns finds
    its history. Must be used on one event loop.

    Args:
        served: the model.
        interval: seconds between two samples.
    """

    def __init__(self, served: ServedModel, interval: float = INTERVAL_SECONDS):
        self._served = served
        self._interval = interval
        self._samples: collections.deque[Sample] = collections.deque(maxlen=MAX_SAMPLES)
        self._num_sampled = 0
        self._news = asyncio.Event()
        self._sampling: asyncio.Task[None] | None = None
        self._num_watchers = 0

    @property
    def num_watchers(self) -> int:
        return self._num_watchers

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Counts a watcher. Raises TooManyWatchersError."""
        if self._num_watchers >= MAX_WATCHERS:
            raise TooManyWatchersError(
                f"{self._num_watchers} live streams are open; at most {MAX_WATCHERS} may be: close another page"
            )
        self._num_watchers += 1
        if self._sampling is None or self._sampling.done():
            self._samples.clear()
            self._sampling = asyncio.ensure_future(self._sample_repeatedly())
        try:
            yield
        finally:
            self._num_watchers -= 1

    async def follow(self) -> AsyncIterator[Sequence[Sample]]:
        """Yields the samples so far, then new ones as they are taken; ends never."""
        seen = self._num_sampled - len(self._samples)
        while True:
            while seen == self._num_sampled:
                await self._news.wait()
            new = list(self._samples)[seen - self._num_sampled :]
            seen = self._num_sampled
            yield new

    def server(self) -> Server | None:
        """Describes what is served; None while the model is loading."""
        frontend = self._served.frontend
        if frontend is None:
            return None
        ready, tokenizer = frontend.ready, frontend.tokenizer
        return Server(
            model=self._served.name,
            version=jaxserve.__version__,
            platform=ready.info.platform,
            max_model_len=ready.limits.max_model_len,
            max_num_seqs=ready.max_num_seqs,
            max_num_waiting=ready.max_num_waiting,
            num_pages=ready.info.usable_pages,
            page_size=ready.info.page_size,
            can_chat=tokenizer is not None and tokenizer.has_chat_template,
        )

    async def _sample_repeatedly(self) -> None:
        before = self._totals()
        num_unwatched = 0
        while num_unwatched < MAX_SAMPLES:
            await asyncio.sleep(self._interval if self._samples else 0)
            now = self._totals()
            self._add(sample(self._served.state, before, now))
            before = now
            num_unwatched = 0 if self._num_watchers else num_unwatched + 1

    def _totals(self) -> Totals:
        frontend = self._served.frontend
        return Totals(
            time.time(), EngineStats() if frontend is None else frontend.stats, self._served.metrics.histograms()
        )

    def _add(self, new: Sample) -> None:
        self._samples.append(new)
        self._num_sampled += 1
        self._news.set()
        self._news = asyncio.Event()


def sample(state: str, before: Totals, now: Totals) -> Sample:
    """Returns the sample of the interval between two readings."""
    old, new = before.stats, now.stats
    num_steps = new.num_steps - old.num_steps
    seconds = max(now.time - before.time, 1e-3)
    padding = new.padding_tokens - old.padding_tokens
    prefill, decode = (
        _step_tokens(new, name) - _step_tokens(old, name) for name in ("prefill_tokens", "decode_tokens")
    )
    per_step = 1 / num_steps if num_steps else 0.0
    return Sample(
        time=now.time,
        state=state,
        running=new.num_running,
        waiting=new.num_waiting,
        swapped=new.num_swapped,
        pages_used=new.pages_used,
        pages_cached=new.pages_cached,
        pages_free=new.pages_free,
        prefill=prefill * per_step,
        decode=decode * per_step,
        padding=padding * per_step,
        prefill_rate=prefill / seconds,
        generation_rate=(new.generation_tokens - old.generation_tokens) / seconds,
        step_rate=num_steps / seconds,
        first_token=_latency("time_to_first_token_seconds", before, now),
        gap=_latency("inter_token_latency_seconds", before, now),
        prefix_queries=new.prefix_cache_queries - old.prefix_cache_queries,
        prefix_hits=new.prefix_cache_hits - old.prefix_cache_hits,
    )


def _step_tokens(stats: EngineStats, name: str) -> float:
    counts = stats.step_histograms.get(name)  # none before the engine's first message
    return 0.0 if counts is None else counts.total


def _latency(name: str, before: Totals, now: Totals) -> Quantiles | None:
    bounds = REQUEST_HISTOGRAMS[name]
    old = before.requests.get(name, no_counts(bounds)).counts
    return quantiles(bounds, [new - was for new, was in zip(now.requests[name].counts, old, strict=True)])


def quantiles(bounds: Sequence[float], counts: Sequence[int]) -> Quantiles | None:
    """Estimates quantiles in milliseconds as Prometheus does: linearly inside a bucket. None without any value.

    Args:
        bounds: upper bounds of the buckets in seconds.
        counts: of values in each, the one above the last bound included, whose values count as that bound.
    """
    total = sum(counts)
    if not total:
        return None
    lower, upper = (0.0, *bounds), (*bounds, bounds[-1])

    def quantile(share: float) -> float:
        rank, below = share * total, 0
        for low, high, count in zip(lower, upper, counts, strict=True):
            if count and below + count >= rank:
                return 1000 * (low + (high - low) * (rank - below) / count)
            below += count
        raise AssertionError("the last bucket has the last value")

    return Quantiles(total, quantile(0.50), quantile(0.95), quantile(0.99))
