"""Samples the figures of the page at `/`, twice a second while somebody looks at it, and keeps those of two minutes."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence

import msgspec

import jaxserve
from jaxserve.engine.messages import EngineStats
from jaxserve.frontend.latencies import Latencies
from jaxserve.serving.served_model import ServedModel

INTERVAL_SECONDS = 0.5
MAX_SAMPLES = 240
"""Samples that are kept: of two minutes."""
MAX_WATCHERS = 16


class TooManyWatchersError(RuntimeError):
    """As many live streams as may be are open."""


class Quantiles(msgspec.Struct, frozen=True):
    """Summarizes latencies in milliseconds."""

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
        frontend, latencies = None, Latencies()
        before, since = EngineStats(), time.monotonic()
        num_unwatched = 0
        try:
            while num_unwatched < MAX_SAMPLES:
                if frontend is None and (frontend := self._served.frontend) is not None:
                    frontend.measure(latencies)
                    before = frontend.stats
                now, time_now = EngineStats() if frontend is None else frontend.stats, time.monotonic()
                self._add(sample(self._state(), before, now, time_now - since, latencies.take()))
                before, since = now, time_now
                num_unwatched = 0 if self._num_watchers else num_unwatched + 1
                await asyncio.sleep(self._interval)
        finally:
            if frontend is not None:
                frontend.measure(None)

    def _add(self, new: Sample) -> None:
        self._samples.append(new)
        self._num_sampled += 1
        self._news.set()
        self._news = asyncio.Event()

    def _state(self) -> str:
        frontend = self._served.frontend
        if frontend is None:
            return "starting"
        if frontend.failure:
            return "failed"
        return "draining" if self._served.draining else "ready"


def sample(state: str, before: EngineStats, now: EngineStats, seconds: float, latencies: Latencies) -> Sample:
    """Returns the sample of an interval.

    Args:
        before: totals at its begin.
        now: totals at its end.
        seconds: its length, above 0.
    """
    num_steps = now.num_steps - before.num_steps
    prefill = now.prefill_tokens - before.prefill_tokens
    per_step = 1 / num_steps if num_steps else 0.0
    seconds = max(seconds, 1e-3)
    return Sample(
        time=time.time(),
        state=state,
        running=now.num_running,
        waiting=now.num_waiting,
        swapped=now.num_swapped,
        pages_used=now.pages_used,
        pages_cached=now.pages_cached,
        pages_free=now.pages_free,
        prefill=prefill * per_step,
        decode=(now.computed_tokens - before.computed_tokens - prefill) * per_step,
        padding=(now.padding_tokens - before.padding_tokens) * per_step,
        prefill_rate=prefill / seconds,
        generation_rate=(now.generation_tokens - before.generation_tokens) / seconds,
        step_rate=num_steps / seconds,
        first_token=quantiles(latencies.first_tokens),
        gap=quantiles(latencies.gaps),
    )


def quantiles(seconds: Sequence[float]) -> Quantiles | None:
    """Summarizes latencies in seconds, by the nearest rank; None without any."""
    if not seconds:
        return None
    ordered = sorted(seconds)

    def rank(share: float) -> float:
        return 1000 * ordered[max(math.ceil(share * len(ordered)) - 1, 0)]

    return Quantiles(len(ordered), rank(0.50), rank(0.95), rank(0.99))
