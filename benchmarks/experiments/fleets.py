"""Fleets that follow the load, by forecast and by cost: `python -m benchmarks.experiments.fleets`. Simulation only.

Forty minutes of arrivals that rise and fall like a day's, with bursts, on replicas of Llama-3.1-8B on an H200. A fixed
fleet, one that follows a forecast of the arrivals, and one that weighs what replicas cost against what latency costs,
at several prices; and the three ways to route.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.experiments.sides import SimulationSide
from jaxserve.simulator.fleet import FleetConfig, FleetResult, simulate_fleet
from jaxserve.simulator.simulation import ClientRule
from jaxserve.simulator.traces import Trace, make_trace

NAME = "experiments/fleets_simulation"
SECONDS = 2400.0
REPLICA_RATE = 3.5
"""Requests a second that a replica serves at most, of these lengths."""

TARGET = 1.0
"""Seconds to the first token."""

_SCALED = {"replica_rate": REPLICA_RATE, "max_replicas": 8, "replicas": 2, "startup_seconds": 60.0}
FLEETS: dict[str, dict[str, Any]] = {
    **{f"fixed, {count}": {"replicas": count} for count in (2, 3, 4, 5)},
    **{
        f"forecast {name}, load {load:g}": {"scaling": "forecast", "forecast": name, "target_load": load} | _SCALED
        for name in ("ewma", "holt")
        for load in (0.5, 0.7, 0.9)
    },
    **{
        f"cost aware, price {price:g}": {"scaling": "cost_aware", "latency_price": price} | _SCALED
        for price in (0.01, 0.05, 0.2, 1.0)
    },
}
ROUTES: dict[str, dict[str, Any]] = {
    routing: {"replicas": 4, "routing": routing} for routing in ("round_robin", "least_loaded", "predicted_work")
}


def arrivals(seed: int = 0) -> Trace:
    """A Poisson process whose rate swings between 1 and 9 requests a second, with short bursts on top."""
    rng = np.random.default_rng(seed)
    moments = np.arange(0, SECONDS)
    rate = 5 - 4 * np.cos(2 * np.pi * moments / SECONDS)
    for start in rng.uniform(0, SECONDS - 60, 6):
        rate[int(start) : int(start) + 40] *= 1.6
    times = np.concatenate([moment + rng.uniform(0, 1, rng.poisson(each)) for moment, each in enumerate(rate)])
    count = len(times)
    prompts = np.clip(rng.lognormal(np.log(1500), 0.7, count), 8, 6000).astype(int)
    outputs = np.clip(rng.lognormal(np.log(400), 0.7, count), 2, 2000).astype(int)
    return make_trace("a day in forty minutes", np.sort(times), prompts, outputs)


def row(name: str, found: FleetResult) -> dict[str, Any]:
    """What a fleet cost and what it was like to be served by it."""
    result = found.result
    tokens = int(result.output_tokens.sum())
    return {
        "fleet": name,
        "replicas_mean": result.replica_seconds / result.seconds,
        "replica_seconds_per_million_tokens": 1e6 * result.replica_seconds / tokens,
        "ttft_mean": float(np.nanmean(result.ttft)),
        "ttft_p99": float(np.nanpercentile(result.ttft, 99)),
        "tpot_mean": float(np.nanmean(result.tpot)),
        "e2e_mean": float(np.nanmean(result.e2e)),
        "e2e_p99": float(np.nanpercentile(result.e2e, 99)),
        "in_time": float(np.mean(result.ttft <= TARGET)),
        "changes": [list(change) for change in found.changes],
    }


def draw(rows: list[dict[str, Any]], trace: Trace, path: pathlib.Path) -> None:
    """Cost against latency, and replicas over time beside the arrivals."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    cost, over_time = figure.subplots(1, 2)
    kinds = {
        "fixed": ("#666666", (2, 12)),
        "forecast ewma": ("#1b9e77", (-14, -9)),
        "forecast holt": ("#7570b3", (6, -14)),
        "cost aware": ("#d95f02", (20, 5)),
    }  # where the middle of each one's labels is, in points
    for kind, (color, offset) in kinds.items():
        mine = [each for each in rows if each["fleet"].startswith(kind)]
        cost.plot(
            [each["replica_seconds_per_million_tokens"] for each in mine],
            [each["ttft_p99"] for each in mine],
            "o-", color=color, label=kind,
        )  # fmt: skip
        for each in mine:
            cost.annotate(
                each["fleet"].split()[-1],
                (each["replica_seconds_per_million_tokens"], each["ttft_p99"]),
                offset,
                textcoords="offset points",
                fontsize=8,
                color=color,
                ha="center",
                va="center",
                bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
            )
    cost.set_yscale("log")
    cost.set_xlabel("replica-seconds per million output tokens")
    cost.set_ylabel("p99 TTFT, s")
    cost.set_title("cost against latency (labels: replicas, load aimed at, price)", fontsize=10)
    cost.margins(x=0.07, y=0.12)
    cost.grid(visible=True, alpha=0.3)
    cost.legend()
    counts, edges = np.histogram(trace.arrivals, bins=np.arange(0, SECONDS + 1, 30))
    needed = counts / 30 / REPLICA_RATE
    over_time.plot(edges[:-1] / 60, needed, color="#bbbbbb", label="arrivals, in replicas at their limit")
    for name, color in (("forecast holt, load 0.7", "#7570b3"), ("cost aware, price 0.05", "#d95f02")):
        changes = next(each for each in rows if each["fleet"] == name)["changes"]
        times, numbers = zip(*changes, (SECONDS, changes[-1][1]), strict=True)
        over_time.step(np.array(times) / 60, numbers, where="post", color=color, label=name)
    over_time.set_xlim(0, SECONDS / 60)
    over_time.set_ylim(bottom=0)
    over_time.set_xlabel("minutes")
    over_time.set_ylabel("replicas")
    over_time.grid(visible=True, alpha=0.3)
    over_time.legend(loc="upper left", fontsize=9)
    figure.suptitle("Fleets that follow the load, Llama-3.1-8B on H200s, simulated")
    figure.savefig(path, dpi=100)


def main() -> int:
    """Prints the tables, writes the results and the plot; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments.fleets", description=__doc__)
    parser.add_argument("--redraw", action="store_true", help="only the plot, from the results there are")
    if parser.parse_args().redraw:
        written = json.loads((report.RESULTS / f"{NAME}.json").read_text(encoding="utf-8"))
        draw(written["results"]["fleets"], arrivals(), report.RESULTS / f"{NAME}.png")
        return 0
    side = SimulationSide({"max_num_seqs": 16, "max_num_batched_tokens": 2048})
    trace = arrivals()
    rows = []
    for name, options in {**FLEETS, **ROUTES}.items():
        rows.append(row(name, simulate_fleet(side.setup, trace, FleetConfig(**options), client=ClientRule(2048))))
        print(f"{name}: {rows[-1]['replicas_mean']:.2f} replicas", flush=True)
    settings = {"side": side.about, "requests": len(trace), "replica_rate": REPLICA_RATE, "ttft_target": TARGET}
    path = report.write(NAME, settings, {"fleets": rows})
    head = ("fleet", "replicas", "replica-s / Mtok", "TTFT ms", "p99", "TPOT ms", "e2e s", "p99", "in time %")
    print(
        report.table(
            head,
            [
                (
                    each["fleet"], each["replicas_mean"], each["replica_seconds_per_million_tokens"],
                    1e3 * each["ttft_mean"], 1e3 * each["ttft_p99"], 1e3 * each["tpot_mean"], each["e2e_mean"],
                    each["e2e_p99"], 100 * each["in_time"],
                )
                for each in rows
            ],
        )
    )  # fmt: skip
    draw(rows, trace, report.RESULTS / f"{NAME}.png")
    print(f"written: {path} and .png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
