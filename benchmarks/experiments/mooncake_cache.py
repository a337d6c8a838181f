"""What a prefix cache finds of a trace of block hashes, by size of its pool and by eviction policy:

    python -m benchmarks.experiments.mooncake_cache mooncake_conversation.jsonl

The bound is a cache without end, which finds every block that an earlier prompt had. Pools are replayed alone
(`simulator/cache_replay.py`), and under the scheduler in simulation: Llama-3.1-8B on an H200, with the trace's arrivals
stretched to what one device serves.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import report
from benchmarks.experiments.sides import SimulationSide
from jaxserve.config.settings import EVICTION_POLICIES
from jaxserve.kv_cache.eviction import make_eviction
from jaxserve.kv_cache.page_pool import PagePool
from jaxserve.scheduler.buckets import Buckets
from jaxserve.scheduler.prefix_costs import page_seconds
from jaxserve.simulator.cache_replay import CacheFigures, block_bound, infinite_cache, replay_cache
from jaxserve.simulator.setup import with_options
from jaxserve.simulator.simulation import simulate
from jaxserve.simulator.simulation_report import Slo
from jaxserve.simulator.simulation_report import report as figures_of
from jaxserve.simulator.trace_files import BLOCK, read_trace
from jaxserve.simulator.traces import Trace

NAME = "experiments/mooncake_cache_simulation"
MILLION = 1_000_000
REPLAYED = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Million tokens of the pools that are replayed alone, in pages of a block."""

SIMULATED = (4.0,)
"""Million tokens of the pools under the scheduler; an H200 has room for 0.92 beside the model."""

HOST_TIMES = 4
"""Host memory of the pools that have some, as a multiple of the device's."""

WITH_HOST = f"lru, host {HOST_TIMES} x"

RATE_FACTOR = 0.25
SLO = Slo(ttft=5.0)
LIMITS = {"max_model_len": 131072, "page_size": 64, "max_num_seqs": 64, "max_num_batched_tokens": 8192}


def bounds(trace: Trace) -> dict[str, Any]:
    """What a cache without end finds, by the trace's blocks and by pages."""
    blocks = block_bound(trace)
    return {
        "blocks": blocks.hit_blocks / blocks.blocks,
        "tokens_of_blocks": blocks.hit_tokens / blocks.tokens,
        "pages": {str(size): infinite_cache(trace, size).hit_rate for size in (16, 64, BLOCK)},
    }


def replayed(trace: Trace, side: SimulationSide, sizes: Sequence[float]) -> list[dict[str, Any]]:
    """A row for each pool, replayed alone, and one for a cache without end."""
    seconds = page_seconds(side.costs.seconds, BLOCK, Buckets.from_config(side.config, side.device.platform))
    rows = []
    for policy in EVICTION_POLICIES:
        for size in sizes:
            begin = time.perf_counter()
            pool = PagePool(int(size * MILLION) // BLOCK + 1, BLOCK, eviction=make_eviction(policy, seconds))
            rows.append(_replayed(policy, replay_cache(trace, pool, page_seconds=seconds)))
            print(f"{policy}, {size:g} M: {time.perf_counter() - begin:.1f} s", flush=True)
    for size in sizes:
        num_pages = int(size * MILLION) // BLOCK
        pool = PagePool(num_pages + 1, BLOCK, HOST_TIMES * num_pages, caches_on_host=True)
        rows.append(_replayed(WITH_HOST, replay_cache(trace, pool, page_seconds=seconds)))
        print(f"{WITH_HOST}, {size:g} M", flush=True)
    return [*rows, _replayed("without end", infinite_cache(trace, BLOCK, seconds))]


def _replayed(policy: str, found: CacheFigures) -> dict[str, Any]:
    return {"policy": policy, **dataclasses.asdict(found), "hit_rate": found.hit_rate, "saved": found.saved}


def simulated(trace: Trace, side: SimulationSide, sizes: Sequence[float]) -> list[dict[str, Any]]:
    """A row for each pool under the scheduler, and one without a prefix cache."""
    slower = trace.faster(RATE_FACTOR)
    page_size = side.config.cache.page_size
    policies = (*EVICTION_POLICIES, WITH_HOST)
    ways = [("none", sizes[0]), *((policy, size) for size in sizes for policy in policies)]
    rows = []
    for policy, size in ways:
        begin = time.perf_counter()
        options = {"enable_prefix_caching": False} if policy == "none" else {"eviction_policy": policy.split(",")[0]}
        config = with_options(side.config, options)
        num_pages = int(size * MILLION) // page_size
        host = HOST_TIMES * num_pages if policy == WITH_HOST else 0
        device = dataclasses.replace(side.device, num_pages=num_pages + 1, num_host_pages=host)
        found = figures_of(simulate(config, slower, side.costs, device), SLO)
        rows.append({
            "policy": policy,
            "pool_tokens": int(size * MILLION),
            "hit_rate": found.hit_rate,
            "ttft_mean": found.ttft and found.ttft.mean,
            "ttft_p99": found.ttft and found.ttft.p99,
            "goodput": found.goodput,
            "in_time": found.good_share,
            "device_utilization": found.device_utilization,
            "preemptions": sum(found.preemptions.values()),
        })  # fmt: skip
        print(f"{policy}, {size:g} M under the scheduler: {time.perf_counter() - begin:.0f} s", flush=True)
    return rows


def draw(results: dict[str, Any], title: str, path: pathlib.Path) -> None:
    """Hit rate by size of the pool beside the bound, and time to first token."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.6), layout="constrained")
    hits, saved, waits = figure.subplots(1, 3)
    names = (*EVICTION_POLICIES, WITH_HOST, "none")
    colors = dict(zip(names, ("#1b9e77", "#7570b3", "#d95f02", "#e7298a", "#666666"), strict=True))
    for axis, figure_name in ((hits, "hit_rate"), (saved, "saved")):
        for policy in dict.fromkeys(row["policy"] for row in results["replayed"]):
            rows = [row for row in results["replayed"] if row["policy"] == policy]
            shares = [100 * row[figure_name] for row in rows]
            if policy == "without end":
                axis.axhline(shares[0], color="#666666", linestyle="--", label=f"without end: {shares[0]:.1f} %")
                continue
            sizes = [row["pool_tokens"] / MILLION for row in rows]
            axis.plot(sizes, shares, "o-", markersize=4, color=colors[policy], label=policy)
    for policy in dict.fromkeys(row["policy"] for row in results["simulated"]):
        rows = [row for row in results["simulated"] if row["policy"] == policy]
        if policy == "none":
            waits.axhline(rows[0]["ttft_mean"], color=colors[policy], linestyle="--", label="no prefix cache")
            continue
        sizes = [row["pool_tokens"] / MILLION for row in rows]
        name = f"{policy}, under the scheduler"
        hits.plot(sizes, [100 * row["hit_rate"] for row in rows], "x", color=colors[policy], label=name)
        waits.plot(sizes, [row["ttft_mean"] for row in rows], "o-", color=colors[policy], label=policy)
    hits.set_ylabel("prompt tokens found in the cache, %")
    saved.set_ylabel("seconds of prompts saved, %")
    waits.set_ylabel("mean TTFT, s")
    for axis in (hits, saved, waits):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_ylim(bottom=0)
        axis.set_xlabel("million tokens in the pool")
        axis.grid(visible=True, alpha=0.3)
        axis.legend(fontsize=9)
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def tables(results: dict[str, Any]) -> str:
    """The bounds and both tables as text."""
    found = results["bounds"]
    pages = ", ".join(f"{100 * share:.2f} % in pages of {size}" for size, share in found["pages"].items())
    lines = [
        f"cache without end: {100 * found['blocks']:.2f} % of blocks, {100 * found['tokens_of_blocks']:.2f} % of their "
        f"tokens; {pages}",
        "",
        report.table(
            ("pool alone", "M tokens", "cached %", "seconds saved %"),
            [
                (
                    row["policy"], row["pool_tokens"] / MILLION if row["pool_tokens"] else "all", 100 * row["hit_rate"],
                    100 * row["saved"],
                )
                for row in results["replayed"]
            ],
        ),
        "",
        report.table(
            ("scheduler", "M tokens", "cached %", "TTFT s", "p99", "in time %", "busy %", "preempted"),
            [
                (
                    row["policy"], row["pool_tokens"] / MILLION, 100 * row["hit_rate"], row["ttft_mean"],
                    row["ttft_p99"], 100 * row["in_time"], 100 * row["device_utilization"], row["preemptions"],
                )
                for row in results["simulated"]
            ],
        ),
    ]  # fmt: skip
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs, prints and writes the results, their tables and the plot; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments.mooncake_cache", description=__doc__)
    parser.add_argument("trace", nargs="?", type=pathlib.Path, help="a .jsonl file with hash_ids")
    parser.add_argument("--limit", type=int, help="the first requests of the trace alone")
    parser.add_argument("--name", default=NAME, help="of the result files (%(default)s)")
    parser.add_argument("--redraw", action="store_true", help="only the plot, from the results there are")
    options = parser.parse_args(arguments)
    path = report.RESULTS / f"{options.name}.json"
    if not options.redraw:
        if options.trace is None:
            parser.error("the trace is missing; give a file, or --redraw")
        trace = read_trace(options.trace, options.limit)
        side = SimulationSide(LIMITS)
        settings = {
            "trace": trace.name, "requests": len(trace), "side": side.about, "limits": LIMITS,
            "rate_factor": RATE_FACTOR, "slo": str(SLO),
        }  # fmt: skip
        found = {
            "bounds": bounds(trace),
            "replayed": replayed(trace, side, REPLAYED),
            "simulated": simulated(trace, side, SIMULATED),
        }
        report.write(options.name, settings, found)
    document = json.loads(path.read_text(encoding="utf-8"))
    text = tables(document["results"])
    print(text)
    settings = document["settings"]
    title = f"Prefix cache on {settings['trace']}, {settings['requests']:,} requests; {settings['side']['model']}"
    path.with_suffix(".txt").write_text(f"{title}\n\n{text}\n", encoding="utf-8")
    draw(document["results"], title, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
