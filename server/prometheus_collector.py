"""Formats what is measured of the engine and its requests as Prometheus metrics.

The values come from the engine's latest counts and from the front end's, as of the scrape; nothing is counted here.
docs/metrics.md lists the names.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

import jaxserve
from jaxserve.engine.messages import EngineStats
from jaxserve.frontend.delta import REJECTION_REASONS
from jaxserve.kv_cache.cached_pages import EVICTION_CAUSES
from jaxserve.kv_cache.host_pool import HOST_EVICTION_CAUSES
from jaxserve.serving.problem import REJECTIONS
from jaxserve.serving.served_model import ServedModel
from jaxserve.telemetry.engine_meter import STEP_HISTOGRAMS
from jaxserve.telemetry.histograms import HistogramCounts, no_counts
from jaxserve.telemetry.request_meter import REQUEST_HISTOGRAMS

PREFIX = "jaxserve:"

BUSY_WINDOW_SECONDS = 10.0
"""Seconds that device_busy_ratio is of at least; it reaches back to the scrape before."""

_LABEL = "model_name"

_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("num_requests_running", "Requests that run.", lambda stats: stats.num_running),
    ("num_requests_waiting", "Requests that wait for their first step or, preempted, for their next.",
     lambda stats: stats.num_waiting),
    ("num_requests_swapped", "Requests whose pages are in host memory.", lambda stats: stats.num_swapped),
    ("kv_cache_usage_perc", "Pages that requests hold, as a share of all: 1 is 100 percent.",
     lambda stats: stats.pages_used / max(1, stats.pages_used + stats.pages_free + stats.pages_cached)),
    ("length_prediction_tau", "Kendall's tau of predicted against real output lengths; 0 while nothing is known.",
     lambda stats: stats.kendall_tau or 0.0),
)  # fmt: skip

_COUNTERS: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("num_steps", "Steps run.", lambda stats: stats.num_steps),
    ("computed_tokens", "Tokens computed in all steps, those computed again included.",
     lambda stats: stats.computed_tokens),
    ("bucket_padding_tokens", "Tokens computed only to fill a step's bucket.", lambda stats: stats.padding_tokens),
    ("compile_misses", "Steps that needed a program outside the compiled set; each is an error.",
     lambda stats: stats.compile_misses),
    ("prefix_cache_queries", "Tokens of new requests looked up in the prefix cache.",
     lambda stats: stats.prefix_cache_queries),
    ("prefix_cache_hits", "Tokens of new requests found in the prefix cache.", lambda stats: stats.prefix_cache_hits),
    ("prefix_cache_returned_tokens", "Tokens that preempted requests found in the prefix cache when they came back.",
     lambda stats: stats.prefix_cache_returned_tokens),
    ("host_cache_stored_pages", "Cached pages that moved from the device to host memory.",
     lambda stats: stats.host_cache_stored),
    ("host_cache_hits", "Requests that had pages brought back from host memory.",
     lambda stats: stats.host_cache_hits),
    ("host_cache_hit_tokens", "Their tokens in these pages.", lambda stats: stats.host_cache_hit_tokens),
    ("requests_dropped_late", "Requests dropped in the queue because they were late, or would be.",
     lambda stats: stats.num_dropped),
    ("device_busy_seconds", "Lower bound of the time in which the device had a step to compute.",
     lambda stats: stats.device_busy_seconds),
)  # fmt: skip

_STEP_HELP = {
    "step_time_seconds": "Time of a turn of the engine's loop, the wait for the step before included.",
    "step_host_overhead_seconds": "Host time of a step: schedule, dispatch, update.",
    "mask_seconds": "Time that a step waited for the masks of structured outputs, with the interpreter lock released.",
    "step_gap_seconds": "Upper bound of the time for which the device was idle before a step, while another was due.",
    "iteration_tokens": "Useful tokens of a step.",
}
_COMPOSITION_HELP = "Useful tokens of a step, by kind."

_REQUEST_HELP = {
    "time_to_first_token_seconds": "From arrival to the first token.",
    "inter_token_latency_seconds": "From each output token to the next.",
    "request_time_per_output_token_seconds": "Decode time of a request divided by the tokens after the first.",
    "e2e_request_latency_seconds": "From arrival to the end.",
    "request_queue_time_seconds": "From arrival to the first step that computes the request.",
    "request_prefill_time_seconds": "From the first step that computes the request to its first token.",
    "request_decode_time_seconds": "From the first token to the last.",
    "request_prompt_tokens": "Prompt tokens of a request.",
    "request_generation_tokens": "Output tokens of a request.",
}


class BusyWindow:
    """Computes which share of the last seconds the device was busy, from a total that is read now and then.

    Args:
        now: the current time, at which the total is 0.
        seconds: minimum length of the window.
    """

    def __init__(self, now: float, seconds: float = BUSY_WINDOW_SECONDS):
        self._seconds = seconds
        self._reads = deque([(now, 0.0)])  # the first is the last one from before the window

    def add(self, now: float, busy_seconds: float) -> None:
        """Takes the total as of now."""
        self._reads.append((now, busy_seconds))
        while len(self._reads) > 2 and self._reads[1][0] <= now - self._seconds:
            self._reads.popleft()

    def ratio(self) -> float:
        """Returns the share, from 0 to 1."""
        (begin, before), (end, after) = self._reads[0], self._reads[-1]
        return min(1.0, max(0.0, (after - before) / (end - begin))) if end > begin else 0.0


class EngineCollector(Collector):
    """Collects the metrics of what is served. Everything has the label model_name, and none names a user."""

    def __init__(self, served: ServedModel, clock: Callable[[], float] = time.monotonic):
        self._served = served
        self._clock = clock
        self._busy = BusyWindow(clock())

    def collect(self) -> Iterator[Metric]:
        """Yields all metrics; those of the engine are 0 before it is ready."""
        stats = EngineStats() if self._served.frontend is None else self._served.frontend.stats
        yield _info(self._served)
        for name, text, value in _GAUGES:
            yield self._gauge(name, text, value(stats))
        self._busy.add(self._clock(), stats.device_busy_seconds)
        yield self._gauge(
            "device_busy_ratio", "Share of the last seconds in which the device had a step.", self._busy.ratio()
        )
        yield self._gauge("engine_ready", "1 while requests are accepted, else 0.", self._served.is_ready)
        pages = (("free", stats.pages_free), ("used", stats.pages_used), ("cached", stats.pages_cached))
        yield self._labeled_gauge(
            "kv_cache_pages", "Pages by state.", "state", [*pages, ("swapped", stats.pages_swapped)]
        )
        yield self._group_pages(stats)
        for name, text, value in _COUNTERS:
            yield self._counter(name, text, [((), value(stats))], ())
        preemptions = (("recompute", stats.num_preemptions_recompute), ("swap", stats.num_preemptions_swap))
        yield self._counter(
            "num_preemptions", "Times that a request lost its pages to others.",
            [((kind,), count) for kind, count in preemptions], ("kind",),
        )  # fmt: skip
        hits, looked_up = stats.prefix_cache_request_hits, stats.prefix_cache_requests
        yield self._counter(
            "prefix_cache_requests", "Requests looked up in the prefix cache, by whether they found a page.",
            [(("hit",), hits), (("miss",), looked_up - hits)], ("result",),
        )  # fmt: skip
        waits = dict.fromkeys(("waited", "computed", "waited_in_vain"), 0) | stats.prefix_waits
        yield self._counter(
            "prefix_waits", "Requests whose prefix another was computing, by what they did.",
            [((choice,), count) for choice, count in waits.items()], ("choice",),
        )  # fmt: skip
        reads = stats.shared_reads
        yield self._counter("shared_read_steps", "Steps in which rows read shared pages together.",
                            [((), reads.get("steps", 0))], ())  # fmt: skip
        for unit, text in (("rows", "Rows that share pages with others"), ("tokens", "Positions in these pages")):
            yield self._counter(
                f"shared_read_{unit}", f"{text}, by whether these are read once.",
                [((choice,), reads.get(f"{unit}_{choice}", 0)) for choice in ("together", "apart")], ("choice",),
            )  # fmt: skip
        evictions = dict.fromkeys(EVICTION_CAUSES, 0) | stats.prefix_cache_evictions
        yield self._counter(
            "prefix_cache_evictions", "Pages that can no longer be found in the prefix cache, by cause.",
            [((cause,), count) for cause, count in evictions.items()], ("cause",),
        )  # fmt: skip
        yield from self._host_memory(stats)
        yield from self._requests()
        yield from self._steps(stats.step_histograms)

    def _group_pages(self, stats: EngineStats) -> Metric:
        """Returns pages by group of layers; free pages are any group's."""
        family = GaugeMetricFamily(
            PREFIX + "kv_cache_group_pages",
            "Pages by group of layers: in page tables (used), cached, and free for any group.",
            labels=[_LABEL, "group", "window", "state"],
        )
        alone = (0, stats.pages_used, stats.pages_cached)
        for group, (window, *counts) in enumerate(stats.group_pages or (alone,)):
            for state, count in zip(("used", "cached"), counts, strict=True):
                family.add_metric([self._served.name, str(group), str(window), state], count)
        family.add_metric([self._served.name, "any", "", "free"], stats.pages_free)
        return family

    def _host_memory(self, stats: EngineStats) -> Iterator[Metric]:
        pages = (("free", stats.host_pages_free), ("cached", stats.host_pages_cached), ("swapped", stats.pages_swapped))
        yield self._labeled_gauge(
            "host_memory_bytes", "Host memory for pages, by state.", "state",
            [(state, count * stats.page_bytes) for state, count in pages],
        )  # fmt: skip
        evictions = dict.fromkeys(HOST_EVICTION_CAUSES, 0) | stats.host_cache_evictions
        yield self._counter(
            "host_cache_evictions", "Cached pages that left host memory otherwise than to the device, by cause.",
            [((cause,), count) for cause, count in evictions.items()], ("cause",),
        )  # fmt: skip
        choices = dict.fromkeys(("fetched", "computed", "wrong"), 0) | stats.host_cache_choices
        yield self._counter(
            "host_cache_choices", "Requests that found pages in host memory, by what became of them.",
            [((choice,), count) for choice, count in choices.items()], ("choice",),
        )  # fmt: skip
        yield self._gauge("disk_cache_bytes", "Bytes of cached pages on disk.", stats.disk.get("num_bytes", 0))
        events = ("written", "read", "refused", "dropped")
        yield self._counter(
            "disk_cache_pages", "Pages that were written to disk, read from there, refused, or could not be written.",
            [((event,), stats.disk.get(event, 0)) for event in events], ("event",),
        )  # fmt: skip
        choices = dict.fromkeys(("fetched", "computed", "wrong"), 0) | stats.disk_choices
        yield self._counter(
            "disk_cache_choices", "Requests that found pages on disk, by what became of them.",
            [((choice,), count) for choice, count in choices.items()], ("choice",),
        )  # fmt: skip
        copies = {way: stats.page_copies.get(way, (0, 0.0)) for way in ("out", "in")}
        yield self._counter(
            "page_copies", "Pages copied to host memory (out) and from there (in).",
            [((way,), pages) for way, (pages, _) in copies.items()], ("way",),
        )  # fmt: skip
        yield self._counter(
            "page_copy_seconds", "Time that these copies took.",
            [((way,), seconds) for way, (_, seconds) in copies.items()], ("way",),
        )  # fmt: skip

    def _requests(self) -> Iterator[Metric]:
        metrics = self._served.metrics
        yield self._counter("prompt_tokens", "Prompt tokens computed.", [((), metrics.prompt_tokens)], ())
        yield self._counter("generation_tokens", "Output tokens generated.", [((), metrics.generation_tokens)], ())
        yield self._counter(
            "request_success", "Requests that ended, by finish reason.",
            [((reason,), count) for reason, count in metrics.finished.items()], ("finished_reason",),
        )  # fmt: skip
        reasons = dict.fromkeys((*REJECTION_REASONS, *(reason for _, reason in REJECTIONS)), 0) | metrics.rejected
        yield self._counter(
            "admission_rejections", "Requests that were refused, by reason.",
            [((reason,), count) for reason, count in reasons.items()], ("reason",),
        )  # fmt: skip
        histograms = metrics.histograms()
        for name, bounds in REQUEST_HISTOGRAMS.items():
            yield self._histogram(name, _REQUEST_HELP[name], [((), bounds, histograms[name])], ())

    def _steps(self, histograms: Mapping[str, HistogramCounts]) -> Iterator[Metric]:
        def counts(name: str) -> tuple[Sequence[float], HistogramCounts]:
            bounds = STEP_HISTOGRAMS[name]
            return bounds, histograms.get(name) or no_counts(bounds)

        for name, text in _STEP_HELP.items():
            yield self._histogram(name, text, [((), *counts(name))], ())
        kinds = [((kind,), *counts(f"{kind}_tokens")) for kind in ("prefill", "decode")]
        yield self._histogram("batch_composition", _COMPOSITION_HELP, kinds, ("kind",))

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=[_LABEL])
        family.add_metric([self._served.name], float(value))
        return family

    def _labeled_gauge(self, name: str, text: str, label: str, values: Sequence[tuple[str, float]]) -> Metric:
        family = GaugeMetricFamily(PREFIX + name, text, labels=[_LABEL, label])
        for kind, value in values:
            family.add_metric([self._served.name, kind], value)
        return family

    def _counter(
        self, name: str, text: str, values: Sequence[tuple[Sequence[str], float]], labels: Sequence[str]
    ) -> Metric:
        family = CounterMetricFamily(PREFIX + name, text, labels=[_LABEL, *labels])
        for kinds, value in values:
            family.add_metric([self._served.name, *kinds], value)
        return family

    def _histogram(
        self,
        name: str,
        text: str,
        values: Sequence[tuple[Sequence[str], Sequence[float], HistogramCounts]],
        labels: Sequence[str],
    ) -> Metric:
        family = HistogramMetricFamily(PREFIX + name, text, labels=[_LABEL, *labels])
        for kinds, bounds, counts in values:
            limits = [*(str(bound) for bound in bounds), "+Inf"]
            buckets = list(zip(limits, itertools.accumulate(counts.counts), strict=True))
            family.add_metric([self._served.name, *kinds], buckets, counts.total)
        return family


def _info(served: ServedModel) -> Metric:
    family = GaugeMetricFamily(
        f"{PREFIX}build_info", "1, with what is served as labels.", labels=[_LABEL, "version", "platform", "attention"]
    )
    info = None if served.frontend is None else served.frontend.ready.info
    family.add_metric(
        [
            served.name,
            jaxserve.__version__,
            "" if info is None else info.platform,
            "" if info is None else info.attention,
        ],
        1.0,
    )
    return family


def registry(served: ServedModel) -> CollectorRegistry:
    """Returns what /metrics shows: the served model's metrics and those of this process."""
    found = CollectorRegistry()
    found.register(EngineCollector(served))
    ProcessCollector(registry=found)
    PlatformCollector(registry=found)
    return found
