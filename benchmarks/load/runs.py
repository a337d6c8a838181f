"""Runs of a serving benchmark: one load, a sweep of rates, serving beside the offline engine, slow readers."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.cpu_time import cpu_seconds, process_tree
from benchmarks.load.arrivals import gamma_arrivals, scaled
from benchmarks.load.datasets import LoadRequest, as_work
from benchmarks.load.load_client import Slowness, drive
from benchmarks.load.load_figures import Seen, figures, statistics_ms
from benchmarks.sides.side_process import Side
from benchmarks.spread import spread

SWEEP = (0.1, 0.25, 0.5, 0.75, 0.9, 1.1)
"""Request rates of a sweep, as shares of the rate at saturation."""
LEAST_REQUESTS = 20
"""A rate is measured with at least so many requests, where there are as many."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A server under load. pid: of its process, 0 where it runs elsewhere. The rest: as the command line has it."""

    address: str
    pid: int
    burstiness: float
    max_concurrency: int | None
    goodput: Mapping[str, float]
    trace_scale: float
    seed: int
    details: bool


def load(target: Target, requests: Sequence[LoadRequest], rate: float | None) -> dict[str, Any]:
    """The figures of one run at a request rate; None takes the arrivals of the requests' trace."""
    seen, cpu = _drive(target, requests, rate)
    found: dict[str, Any] = {"request_rate": "trace" if rate is None else rate if math.isfinite(rate) else "inf"}
    found |= figures(seen, target.goodput, target.details)
    asked = [(request, one) for request, one in zip(requests, seen, strict=True) if request.answer is not None]
    if asked:
        right = sum(one.text == request.answer and one.finish_reason == "stop" for request, one in asked)
        found["exact_match"] = right / len(asked)
    return found | {"cpu_seconds": cpu}


def sweep(
    target: Target, requests: Sequence[LoadRequest], rates: Sequence[float] | None, most_seconds: float
) -> list[dict[str, Any]]:
    """Runs at each rate, lowest first and all at once last; without `rates`, at shares of the rate at saturation.

    most_seconds: a low rate takes no more of the requests than arrive in that time.
    """
    saturated = load(target, requests, math.inf)
    wanted = sorted(rates or (share * saturated["request_throughput"] for share in SWEEP))
    found = []
    for rate in wanted:
        if math.isfinite(rate):
            count = max(LEAST_REQUESTS, round(rate * most_seconds))
            found.append(load(target, requests[:count], rate))
            print(line(found[-1]), flush=True)
    print(line(saturated), flush=True)
    return [*found, saturated]


def beside_offline(
    target: Target, offline: Side, make_requests: Callable[[int], Sequence[LoadRequest]], repeats: int
) -> dict[str, Any]:
    """The same requests through the offline engine and through the server, all there at once, in turn.

    Returns both sides' output tokens a second and their ratios within each round.
    """
    offline.run(as_work(make_requests(0)))
    rounds = []
    for repeat in range(1, repeats + 1):
        requests = make_requests(repeat)
        run = offline.run(as_work(requests))
        offline.settle()
        serving = load(target, requests, math.inf)
        rate = run.output_tokens / run.seconds
        rounds.append({"offline_output_throughput": rate, "offline_cpu_seconds": run.cpu_seconds, "serving": serving})
        share = serving["output_throughput"] / rate
        print(f"  round {repeat}: offline {rate:,.1f} tok/s, serving {share:.3f} of it", flush=True)
    shares = [one["serving"]["output_throughput"] / one["offline_output_throughput"] for one in rounds]
    return {"rounds": rounds, "ratio": spread(shares)}


def slow_readers(
    target: Target, requests: Sequence[LoadRequest], rate: float | None, share: float, slowness: Slowness, repeats: int
) -> dict[str, Any]:
    """The same load with and without slow readers, in turn; the figures are those of the other readers in both.

    share: of the requests that have a slow reader, spread evenly; `slow` are the figures of these, without slow readers
    too. growth: by how much the 99th percentile of the others' time between tokens is longer with slow readers, within
    each round, and over the times of all rounds; None where no stream had two messages.
    """
    marks = slow_marks(len(requests), share)
    rounds = []
    gaps: dict[str, list[float]] = {"all_fast": [], "with_slow": []}
    for repeat in range(repeats):
        found = {}
        for name in list(gaps) if repeat % 2 == 0 else list(gaps)[::-1]:  # so that a drift favors neither
            seen, _ = _drive(target, requests, rate, marks if name == "with_slow" else None, slowness)
            others = [one for one, mark in zip(seen, marks, strict=True) if not mark]
            gaps[name] += [gap for one in others if not one.error for gap in one.itls]
            slow = [one for one, mark in zip(seen, marks, strict=True) if mark]
            found[name] = {"others": figures(others, target.goodput), "slow": figures(slow, target.goodput)}
        rounds.append(found)
    pairs = [[one[name]["others"]["p99_itl_ms"] for name in gaps] for one in rounds]
    growth = [after / before - 1 for before, after in pairs if before and after]
    pooled = {name: statistics_ms("itl", values) for name, values in gaps.items()}
    before, after = (pooled[name]["p99_itl_ms"] for name in gaps)
    return {
        "rounds": rounds,
        "growth_of_p99_itl": spread(growth) if growth else None,
        "growth_of_pooled_p99_itl": after / before - 1 if before and after else None,
        "others_pooled": pooled,
    }


def slow_marks(count: int, share: float) -> list[bool]:
    """Which of `count` requests have a slow reader: a share of them, spread evenly."""
    return [math.floor((number + 1) * share) > math.floor(number * share) for number in range(count)]


def line(found: Mapping[str, Any]) -> str:
    """One run in a line."""
    rate = found["request_rate"]
    parts = [f"rate {rate if isinstance(rate, str) else round(rate, 3)}"]
    parts.append(f"{found['completed']} completed, {found['failed']} failed in {found['duration']:.1f} s")
    parts.append(f"{found['output_throughput']:,.1f} output tok/s")
    for name in ("mean_ttft", "p99_ttft", "mean_tpot", "p99_itl"):
        value = found[f"{name}_ms"]
        parts.append(f"{name} {value:,.1f} ms" if value is not None else f"{name} none")
    if found["request_goodput"] is not None:
        parts.append(f"goodput {found['request_goodput']:.3f}/s")
    if "exact_match" in found:
        parts.append(f"{100 * found['exact_match']:.1f} % right")
    parts.append(", ".join(f"{name} {seconds:.2f}" for name, seconds in found["cpu_seconds"].items()) + " CPU s")
    return "  " + ", ".join(parts)


def _drive(
    target: Target,
    requests: Sequence[LoadRequest],
    rate: float | None,
    slow: Sequence[bool] | None = None,
    slowness: Slowness | None = None,
) -> tuple[list[Seen], dict[str, float]]:
    """What was seen of each request, and the CPU seconds of the client and of the server's processes meanwhile."""
    if rate is None:
        arrivals = scaled([request.arrival or 0.0 for request in requests], target.trace_scale)
    else:
        arrivals = gamma_arrivals(rate, target.burstiness, len(requests), target.seed)
    tree = process_tree(target.pid) if target.pid else []
    before = [cpu_seconds(pid) for pid in tree]
    seen, client = asyncio.run(drive(target.address, requests, arrivals, target.max_concurrency, slow, slowness))
    used = [cpu_seconds(pid) - past for pid, past in zip(tree, before, strict=True)]
    cpu = {"client": client}
    if used:
        cpu |= {"front_end": used[0], "engine": sum(used[1:])}
    return seen, cpu
