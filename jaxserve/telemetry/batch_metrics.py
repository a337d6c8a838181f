"""Computes metrics of a run from its recorded events: latencies of requests, and the utilization of steps."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxserve.request import COMPLETED
from jaxserve.telemetry.recorder import Event, RequestPreempted, StepRecorded, TokensProduced
from jaxserve.telemetry.timings import RequestTimings, request_timings


@dataclasses.dataclass(frozen=True)
class Spread:
    """Summarizes `count` values, in their unit, by mean and percentiles, which are interpolated between values."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Spread | None:
        """Returns the summary of the values; None if there are none."""
        if not len(values):
            return None
        p50, p90, p99 = np.percentile(values, (50, 90, 99))
        return cls(len(values), float(np.mean(values)), float(p50), float(p90), float(p99))


@dataclasses.dataclass(frozen=True)
class RequestMetrics:
    """Latencies in seconds (see `RequestTimings`), over the requests that have them; itl is over all tokens' gaps.

    Attributes:
        finished: requests that ended, by finish reason.
    """

    finished: Mapping[str, int]
    prompt_tokens: int
    output_tokens: int
    queue_time: Spread | None
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2e: Spread | None

    @classmethod
    def of(cls, timings: Sequence[RequestTimings]) -> RequestMetrics:
        def spread(name: str) -> Spread | None:
            return Spread.of([value for timing in timings if (value := getattr(timing, name)) is not None])

        return cls(
            finished=dict(sorted(Counter(timing.reason for timing in timings if timing.finished is not None).items())),
            prompt_tokens=sum(timing.prompt_tokens for timing in timings if timing.output_tokens),
            output_tokens=sum(timing.output_tokens for timing in timings),
            queue_time=spread("queue_time"),
            ttft=spread("ttft"),
            tpot=spread("tpot"),
            itl=Spread.of([gap for timing in timings for gap in timing.itls]),
            e2e=spread("e2e"),
        )


@dataclasses.dataclass(frozen=True)
class StepMetrics:
    """Describes the utilization of steps.

    Per step: sequences, tokens (useful ones), padding, prefill_share (of the useful tokens), waiting, running, swapped
    (requests), page_use (pages that sequences hold, of all), gap_seconds (upper bound of the device's idle time before
    the step). Over all steps: prefill_tokens, decode_tokens, utilisation (useful over computed tokens) and
    device_utilisation (time in which the device had a step to compute, over the time of the run). preemptions: by kind.
    """

    steps: int
    prefill_tokens: int
    decode_tokens: int
    utilization: float
    device_utilization: float
    preemptions: Mapping[str, int]
    sequences: Spread
    tokens: Spread
    padding: Spread
    prefill_share: Spread
    waiting: Spread
    running: Spread
    swapped: Spread
    page_use: Spread
    gap_seconds: Spread

    @classmethod
    def of(
        cls, steps: Sequence[StepRecorded], preemptions: Mapping[str, int], busy: float, seconds: float
    ) -> StepMetrics | None:
        """Summarizes the steps; None if there are none.

        busy: seconds in which the device had a step. seconds: of the run.
        """
        if not steps:
            return None

        def column(name: str) -> np.ndarray:
            return np.array([getattr(step, name) for step in steps], dtype=np.float64)

        def spread(values: np.ndarray) -> Spread:
            found = Spread.of(values)
            assert found is not None
            return found

        prefill, decode, padding, gaps = (
            column(name) for name in ("prefill_tokens", "decode_tokens", "padding", "idle_seconds")
        )
        useful, used = prefill + decode, column("pages_used")
        pages = used + column("pages_free") + column("pages_cached")
        return cls(
            steps=len(steps),
            prefill_tokens=int(prefill.sum()),
            decode_tokens=int(decode.sum()),
            utilization=_share(useful.sum(), useful.sum() + padding.sum()),
            device_utilization=_share(busy, seconds),
            preemptions=dict(preemptions),
            sequences=spread(column("rows")),
            tokens=spread(useful),
            padding=spread(padding),
            prefill_share=spread(prefill / np.maximum(useful, 1)),
            waiting=spread(column("waiting")),
            running=spread(column("running")),
            swapped=spread(column("swapped")),
            page_use=spread(used / np.maximum(pages, 1)),
            gap_seconds=spread(gaps),
        )


@dataclasses.dataclass(frozen=True)
class RunMetrics:
    """Holds the metrics of a run: seconds from the first event to the last, throughput over them, requests and steps.

    Attributes:
        requests_per_second: requests that ended with all of their tokens, by a stop id or their limit.
    """

    seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    requests: RequestMetrics
    steps: StepMetrics | None

    def to_dict(self) -> dict[str, Any]:
        """Returns plain values, for JSON."""
        return dataclasses.asdict(self)


def run_metrics(events: Iterable[Event]) -> RunMetrics:
    """Computes the metrics of a recording, whose events are in order of time.

    A full recorder has lost its oldest events: the metrics then cover the requests that arrived since, and the
    remaining steps.
    """
    events = tuple(events)
    steps = [event for event in events if isinstance(event, StepRecorded)]
    preemptions = Counter({"recompute": 0, "swap": 0})
    preemptions.update(event.kind for event in events if isinstance(event, RequestPreempted))
    requests = RequestMetrics.of(request_timings(events))
    times = [event.time for event in events]  # a step carries the time at which it began, and is recorded at its end
    seconds = max(times) - min(times) if times else 0.0
    return RunMetrics(
        seconds=seconds,
        requests_per_second=_share(sum(requests.finished.get(reason, 0) for reason in COMPLETED), seconds),
        output_tokens_per_second=_share(requests.output_tokens, seconds),
        total_tokens_per_second=_share(requests.prompt_tokens + requests.output_tokens, seconds),
        requests=requests,
        steps=StepMetrics.of(steps, preemptions, _busy_seconds(steps, events), seconds),
    )


def _busy_seconds(steps: Sequence[StepRecorded], events: Iterable[Event]) -> float:
    """Returns a lower bound of the seconds in which the device had a step to compute: from the first dispatch to the
    last tokens, less the gaps and the time in which no step was in flight.
    """
    if not steps:
        return 0.0
    first, last = steps[0], steps[-1]
    begin = first.time + first.schedule_seconds + first.dispatch_seconds
    end = max((event.time for event in events if isinstance(event, TokensProduced)), default=begin)
    end = max(end, last.time + last.seconds)
    return max(0.0, end - begin - sum(step.idle_seconds + step.unused_seconds for step in steps[1:]))


_LATENCIES = (
    ("queue time", "queue_time"),
    ("TTFT", "ttft"),
    ("TPOT", "tpot"),
    ("ITL", "itl"),
    ("end to end", "e2e"),
)
_FILLS = (
    ("sequences", "sequences", 1.0),
    ("tokens", "tokens", 1.0),
    ("padding tokens", "padding", 1.0),
    ("prefill share, %", "prefill_share", 100.0),
    ("waiting", "waiting", 1.0),
    ("running", "running", 1.0),
    ("swapped", "swapped", 1.0),
    ("page use, %", "page_use", 100.0),
    ("gap, ms", "gap_seconds", 1e3),
)


def table(metrics: RunMetrics) -> list[str]:
    """Formats the metrics as the lines of a table; events that never happened have no line."""
    requests, steps = metrics.requests, metrics.steps
    reasons = ", ".join(f"{count} {reason}" for reason, count in requests.finished.items()) or "none"
    lines = [
        f"{metrics.seconds:.2f} s: {metrics.requests_per_second:.2f} requests/s, "
        f"{metrics.output_tokens_per_second:.1f} output tokens/s, {metrics.total_tokens_per_second:.1f} tokens/s; "
        f"ended: {reasons}",
    ]
    rows = [(f"{name}, ms", getattr(requests, field), 1e3) for name, field in _LATENCIES]
    if steps is not None:
        kinds = ", ".join(f"{count} by {kind}" for kind, count in steps.preemptions.items())
        lines.append(
            f"{steps.steps} steps: batch utilization {100 * steps.utilization:.1f} %, device utilization "
            f"{100 * steps.device_utilization:.1f} %, preemptions: {kinds}"
        )
        rows += [(name, getattr(steps, field), unit) for name, field, unit in _FILLS]
    lines.append(f"{'':18}{'mean':>12}{'p50':>12}{'p90':>12}{'p99':>12}")
    for name, spread, unit in rows:
        if spread is not None:
            values = (spread.mean, spread.p50, spread.p90, spread.p99)
            lines.append(f"{name:18}" + "".join(f"{value * unit:12.2f}" for value in values))
    return lines


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else 0.0
