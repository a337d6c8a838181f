"""The figures of one run, from the events that engine and simulator record alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxserve.request import COMPLETED
from jaxserve.telemetry.batch_metrics import Spread
from jaxserve.telemetry.recorder import Event, RequestPreempted, StepRecorded
from jaxserve.telemetry.timings import RequestTimings, request_timings

_LATENCIES = ("queue_time", "ttft", "tpot", "e2e")


@dataclasses.dataclass(frozen=True)
class Run:
    """events: in order of time; arrivals carry the time at which the client sent. tau: of the predictor.
    preemptions: by kind. cached_tokens: of all prompts, those that were found in the prefix cache."""

    events: Sequence[Event]
    tau: float | None
    preemptions: Mapping[str, int]
    cached_tokens: int = 0


def summary(run: Run, ttft_target: float | None = None) -> dict[str, Any]:
    """One flat row: seconds, tokens a second, shares; None for what did not happen. The latencies of
    each tenant with a name are there as TENANT.FIGURE too.

    ttft_target: within which a first token is in time. service: from the first step that computes a request to its end.
    """
    timings = request_timings(run.events)
    ends = [each.finished for each in timings if each.finished is not None]
    begin = min(each.arrived for each in timings)
    seconds = max(ends) - begin
    completed = sum(each.reason in COMPLETED for each in timings)
    output = sum(each.output_tokens for each in timings)
    steps = [event for event in run.events if isinstance(event, StepRecorded)]
    computed = sum(step.token_bucket for step in steps)
    useful = sum(step.prefill_tokens + step.decode_tokens for step in steps)
    tenants = sorted({each.tenant for each in timings})
    in_time = ttft_target and sum((each.ttft or math.inf) <= ttft_target for each in timings)
    row: dict[str, Any] = {
        "requests": len(timings),
        "completed": completed,
        "seconds": seconds,
        "requests_per_second": completed / seconds,
        "output_tokens_per_second": output / seconds,
        **latencies(timings),
        "steps": len(steps),
        "utilisation": useful / computed if computed else None,
        "sequences": sum(step.rows for step in steps) / max(len(steps), 1),
        "page_use": float(np.mean([_page_use(step) for step in steps])) if steps else None,
        "preemptions": sum(isinstance(event, RequestPreempted) for event in run.events),
        "preempted_by_swap": run.preemptions.get("swap", 0),
        "cached_tokens": run.cached_tokens,
        "hit_rate": run.cached_tokens / max(sum(each.prompt_tokens for each in timings), 1),
        "kendall_tau": run.tau,
        "in_time": in_time and in_time / len(timings),
        "goodput": in_time and in_time / seconds,
        "jain": jain_index(list(service(timings).values())) if len(tenants) > 1 else None,
    }
    for name in filter(None, tenants):
        mine = [each for each in timings if each.tenant == name]
        row |= {f"{name}.{key}": value for key, value in latencies(mine).items()}
        row[f"{name}.requests"] = len(mine)
    return row


def latencies(timings: Sequence[RequestTimings]) -> dict[str, float | None]:
    """Mean, p50 and p99 of each latency, in seconds, over the requests that have it; of gaps between tokens the longest
    too."""
    values: dict[str, list[float]] = {
        name.removesuffix("_time"): [value for each in timings if (value := getattr(each, name)) is not None]
        for name in _LATENCIES
    }
    values["service"] = [
        each.finished - each.scheduled for each in timings if each.finished is not None and each.scheduled is not None
    ]
    values["itl"] = [gap for each in timings for gap in each.itls]
    row: dict[str, float | None] = {}
    for name, found in values.items():
        spread = Spread.of(found)
        for figure in ("mean", "p50", "p99"):
            row[f"{name}_{figure}"] = None if spread is None else getattr(spread, figure)
    row["itl_max"] = max(values["itl"], default=None)
    return row


def service(
    timings: Sequence[RequestTimings], prompt_weight: float = 1.0, output_weight: float = 2.0
) -> dict[str, float]:
    """What each tenant got, in weighted tokens, while all of them had requests unfinished.

    A prompt counts when its first token is there. The time: from when the last tenant's first request has come until
    the first tenant's last has ended.
    """
    tenants: dict[str, list[RequestTimings]] = {}
    for each in timings:
        tenants.setdefault(each.tenant, []).append(each)
    begin = max(min(each.arrived for each in mine) for mine in tenants.values())
    end = min(max(each.finished or each.arrived for each in mine) for mine in tenants.values())
    found = {}
    for name, mine in tenants.items():
        tokens = sum(output_weight for each in mine for time in each.token_times if begin <= time <= end)
        prompts = sum(each.prompt_tokens for each in mine if begin <= (each.first_token or -1.0) <= end)
        found[name] = tokens + prompt_weight * prompts
    return found


def jain_index(values: Sequence[float]) -> float | None:
    """1 where all are equal, 1 / n where one has everything (Jain, Chiu and Hawe, 1984)."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else None


def _page_use(step: StepRecorded) -> float:
    return step.pages_used / max(step.pages_used + step.pages_free + step.pages_cached, 1)
