"""Measures requests as a front end sees them: latencies, tokens, finish reasons and refusals.

What is measured from arrival is of the front end's clock, so that tokenizing and the way to the engine count: time to
first token and end to end. Times between tokens and of phases are of the engine's clock, which its messages carry.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

from jaxserve.request import FinishReason
from jaxserve.telemetry.histograms import Histogram, HistogramCounts, decades, powers_of_two
from jaxserve.telemetry.request_trace import RequestTrace

_log = logging.getLogger(__name__)

_LATENCIES = decades(-3, 3)
_TOKENS = powers_of_two(17)

REQUEST_HISTOGRAMS: Mapping[str, tuple[float, ...]] = {
    "time_to_first_token_seconds": _LATENCIES,
    "inter_token_latency_seconds": decades(-4, 2),
    "request_time_per_output_token_seconds": decades(-4, 2),
    "e2e_request_latency_seconds": _LATENCIES,
    "request_queue_time_seconds": decades(-4, 3),
    "request_prefill_time_seconds": decades(-4, 3),
    "request_decode_time_seconds": _LATENCIES,
    "request_prompt_tokens": _TOKENS,
    "request_generation_tokens": _TOKENS,
}
"""Histograms of requests: the bounds of their buckets, in seconds or tokens."""


@dataclasses.dataclass(frozen=True)
class RequestRecord:
    """Describes a request that has ended, or was refused. Seconds are None for what it never reached.

    Attributes:
        finish_reason: a value of `FinishReason`; "" for one that was refused.
        error_type: name of the error that refused it, or "error" for one that failed; "" otherwise.
        ended: when, in seconds of `time.time`.
        e2e_seconds: from arrival to the end.
        ttft_seconds: from arrival to the first token.
    """

    request_id: str
    finish_reason: str
    error_type: str
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    max_tokens: int
    ended: float
    e2e_seconds: float
    ttft_seconds: float | None = None
    queue_seconds: float | None = None
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    trace: RequestTrace | None = None


class RequestLife:
    """Ignores what happens to one unfinished request; `RequestMeter.begin` returns one that counts it."""

    __slots__ = ()

    def tokens(self, count: int, now: float, sample: int = 0) -> None:
        """Records that the engine had `count` more tokens of a sample at `now`, of its clock. Those of one call are 0
        apart."""

    def phases(self, queue_seconds: float, prefill_seconds: float) -> None:
        """Records how long the request waited for its first step, and computed until its first token; only the first
        call counts."""

    def charged(self, output_tokens: int, sample: int = 0) -> None:
        """Records how many tokens of a sample the request has been charged for so far."""

    def finish(self, reason: FinishReason, output_tokens: int, cached_tokens: int) -> None:
        """Records the end of the request. output_tokens: of all samples."""


UNCOUNTED = RequestLife()
"""The life of a request that nobody counts."""


class RequestMeter:
    """Counts the requests of one front end.

    Attributes:
        clock: seconds that differences are taken of.
        prompt_tokens: of requests that have their first token.
        generation_tokens: output tokens that clients are charged for.
        finished: requests by finish reason.
        rejected: requests by the reason for which they were refused.
        on_finished: called with each request that has ended or was refused; an error of it is logged.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, wall_clock: Callable[[], float] = time.time):
        self.clock = clock
        self._wall_clock = wall_clock
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: Counter[str] = Counter({reason.value: 0 for reason in FinishReason})
        self.rejected: Counter[str] = Counter()
        self.on_finished: Callable[[RequestRecord], object] | None = None
        self._histograms = {name: Histogram(bounds) for name, bounds in REQUEST_HISTOGRAMS.items()}
        self.observe_gap = self._histograms["inter_token_latency_seconds"].observe

    def histograms(self) -> dict[str, HistogramCounts]:
        """Returns what is counted so far, by the names of REQUEST_HISTOGRAMS."""
        return {name: histogram.read() for name, histogram in self._histograms.items()}

    def observe(self, name: str, value: float) -> None:
        """Counts a value in one of REQUEST_HISTOGRAMS."""
        self._histograms[name].observe(value)

    def begin(
        self,
        request_id: str,
        prompt_tokens: int,
        max_tokens: int,
        arrived: float | None,
        trace: RequestTrace | None,
        samples: int = 1,
    ) -> RequestLife:
        """Returns the life of a new request. arrived: of `clock`; None is now. samples: that it has."""
        arrived = self.clock() if arrived is None else arrived
        return _CountedLife(self, request_id, prompt_tokens, max_tokens, arrived, trace, samples)

    @contextlib.contextmanager
    def rejections(
        self,
        reason_of: Callable[[Exception], str],
        request_id: str | None = None,
        trace: RequestTrace | None = None,
    ) -> Iterator[float]:
        """Yields the time of arrival; records an error that is raised inside as a request that was refused.

        reason_of: says why, in one of a few words.
        """
        arrived = self.clock()
        try:
            yield arrived
        except Exception as error:
            self.rejected[reason_of(error)] += 1
            kind, e2e = type(error).__name__, self.clock() - arrived
            self.ended(RequestRecord(request_id or "", "", kind, 0, 0, 0, 0, self.now(), e2e, trace=trace))
            raise

    def now(self) -> float:
        """Returns the time, in seconds of `time.time`."""
        return self._wall_clock()

    def ended(self, request: RequestRecord) -> None:
        """Hands a request that has ended to `on_finished`."""
        if self.on_finished is None:
            return
        try:
            self.on_finished(request)
        except Exception:  # who looks on must not stop the streams
            _log.exception("request %r cannot be traced", request.request_id)


class _CountedLife(RequestLife):
    """Counts one unfinished request. arrived: of the front end's clock; token times are of the engine's."""

    __slots__ = (
        "_arrived", "_charged", "_first_token", "_last_tokens", "_max_tokens", "_metrics", "_prefill_seconds",
        "_prompt_tokens", "_queue_seconds", "_request_id", "_trace", "_ttft_seconds",
    )  # fmt: skip

    def __init__(
        self,
        metrics: RequestMeter,
        request_id: str,
        prompt_tokens: int,
        max_tokens: int,
        arrived: float,
        trace: RequestTrace | None,
        samples: int,
    ):
        self._metrics = metrics
        self._request_id, self._prompt_tokens, self._max_tokens = request_id, prompt_tokens, max_tokens
        self._arrived, self._trace = arrived, trace
        self._ttft_seconds: float | None = None
        self._queue_seconds: float | None = None
        self._prefill_seconds: float | None = None
        self._first_token = 0.0
        self._last_tokens: list[float | None] = [None] * samples
        self._charged = [0] * samples

    def tokens(self, count: int, now: float, sample: int = 0) -> None:
        if not count:
            return
        metrics, last = self._metrics, self._last_tokens[sample]
        if last is not None:
            metrics.observe_gap(now - last)
        elif self._ttft_seconds is None:
            self._ttft_seconds = metrics.clock() - self._arrived
            self._first_token = now
            metrics.prompt_tokens += self._prompt_tokens
            metrics.observe("time_to_first_token_seconds", self._ttft_seconds)
        self._last_tokens[sample] = now
        if count > 1:
            metrics.observe_gap(0.0, count - 1)

    def phases(self, queue_seconds: float, prefill_seconds: float) -> None:
        if self._queue_seconds is not None:
            return
        self._queue_seconds, self._prefill_seconds = queue_seconds, prefill_seconds
        self._metrics.observe("request_queue_time_seconds", queue_seconds)
        self._metrics.observe("request_prefill_time_seconds", prefill_seconds)

    def charged(self, output_tokens: int, sample: int = 0) -> None:
        self._metrics.generation_tokens += output_tokens - self._charged[sample]
        self._charged[sample] = output_tokens

    def finish(self, reason: FinishReason, output_tokens: int, cached_tokens: int) -> None:
        metrics, decode = self._metrics, None
        metrics.generation_tokens += output_tokens - sum(self._charged)
        e2e = metrics.clock() - self._arrived
        metrics.finished[reason.value] += 1
        metrics.observe("e2e_request_latency_seconds", e2e)
        metrics.observe("request_prompt_tokens", self._prompt_tokens)
        metrics.observe("request_generation_tokens", output_tokens)
        if self._ttft_seconds is not None:
            decode = max(last for last in self._last_tokens if last is not None) - self._first_token
            metrics.observe("request_decode_time_seconds", decode)
            gaps = output_tokens / len(self._charged) - 1  # of a sample
            if gaps > 0:
                metrics.observe("request_time_per_output_token_seconds", decode / gaps)
        metrics.ended(
            RequestRecord(
                request_id=self._request_id,
                finish_reason=reason.value,
                error_type="error" if reason is FinishReason.ERROR else "",
                prompt_tokens=self._prompt_tokens,
                output_tokens=output_tokens,
                cached_tokens=cached_tokens,
                max_tokens=self._max_tokens,
                ended=metrics.now(),
                e2e_seconds=e2e,
                ttft_seconds=self._ttft_seconds,
                queue_seconds=self._queue_seconds,
                prefill_seconds=self._prefill_seconds,
                decode_seconds=decode,
                trace=self._trace,
            )
        )
