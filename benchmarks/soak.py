"""Mixed load with faults for as long as you like: `python -m benchmarks.soak --config tiny.gin --minutes 30`.

Measures the rate at which the server answers 64 requests at a time over gRPC and HTTP, then sends requests at 80 % of
it, at random times: plain ones, ones that are canceled, have a short deadline, are read slowly, or are malformed, while
failpoints of the engine and the front end fire. For each minute: requests, tokens, statuses, memory. In the end: pages
and requests that are still held, requests without exactly one answer, throughput of the last minute by the first.
Exit status 1 where anything is held, unanswered, or the server ended otherwise than by its signal.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import itertools
import json
import random
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import report
from benchmarks.load import datasets
from benchmarks.stress.mixed_requests import MixedClient, Outcome
from benchmarks.stress.stress_server import StressServer, stressed

FAILPOINTS = (
    "allocate=raise,after=500,every=4001",
    "pack=raise,after=300,every=997",
    "enqueue=raise,after=400,every=1499",
    "collect=raise,after=1000,apart=90",
    "detokenize=raise,after=1000,every=30011",
    "send=raise,after=1000,every=20011",
)
"""Page allocation, steps, reading of ids (at least 61 s apart: a second fault in programs within a minute ends the
engine, as it should), text and sending."""

_AT_ONCE = 64
_SHARE = 0.8
_GOOD = ("stop", "length")


class Minutes:
    """Collects outcomes by the minute in which they came."""

    def __init__(self) -> None:
        self._begin = time.monotonic()
        self.outcomes: list[Outcome] = []
        self._minutes: dict[int, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        self.memory: list[dict[str, Any]] = []

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begin

    def take(self, outcome: Outcome) -> None:
        """Counts what has been answered."""
        self.outcomes.append(outcome)
        counts = self._minutes[int(self.seconds // 60)]
        counts[f"{outcome.port} {outcome.kind}: {outcome.status}"] += 1
        counts["requests"] += 1
        counts["completed"] += outcome.status in _GOOD
        counts["tokens"] += outcome.tokens

    def table(self) -> list[dict[str, int]]:
        """Counts of each minute."""
        return [dict(sorted(self._minutes[minute].items())) for minute in sorted(self._minutes)]


async def saturation(client: MixedClient, requests: Sequence[datasets.LoadRequest], seconds: float) -> float:
    """Returns the requests a second that are answered when 64 are open all the time."""
    source, end, answered = itertools.cycle(requests), time.monotonic() + seconds, 0

    async def work() -> None:
        nonlocal answered
        while time.monotonic() < end:
            outcome = await client.send(next(source), "plain")
            answered += outcome.status in _GOOD

    begin = time.monotonic()
    await asyncio.gather(*(work() for _ in range(_AT_ONCE)))
    return answered / (time.monotonic() - begin)


async def load(
    client: MixedClient,
    requests: Sequence[datasets.LoadRequest],
    rate: float,
    minutes: float,
    server: StressServer,
    seed: int,
) -> Minutes:
    """Sends requests at the rate, at random times, until the minutes are over, and waits for all answers."""
    seen, draw, source = Minutes(), random.Random(seed), itertools.cycle(requests)
    open_ones: set[asyncio.Task[None]] = set()

    async def one(request: datasets.LoadRequest) -> None:
        seen.take(await client.send(request))

    due, memory_due = 0.0, 0.0
    while due < 60 * minutes and server.process.poll() is None:
        await asyncio.sleep(max(0.0, due - seen.seconds))
        task = asyncio.ensure_future(one(next(source)))
        open_ones.add(task)
        task.add_done_callback(open_ones.discard)
        due += draw.expovariate(rate)
        if seen.seconds >= memory_due:
            memory_due += 15.0
            seen.memory.append({"seconds": round(seen.seconds), "open": len(open_ones)} | server.memory())
    await asyncio.gather(*open_ones)
    seen.memory.append({"seconds": round(seen.seconds), "open": 0} | server.memory())
    return seen


def figures(seen: Minutes, minutes: float) -> dict[str, Any]:
    """What the run shows. The last minute is the last whole one."""
    table = seen.table()
    whole = table[: max(1, int(minutes))]
    ports = collections.Counter(outcome.port for outcome in seen.outcomes)
    unanswered = [outcome for outcome in seen.outcomes if not outcome.is_answered]
    statuses = collections.Counter(f"{outcome.kind}: {outcome.status}" for outcome in seen.outcomes)
    failed = {
        f"{outcome.status}: {outcome.details}"[:200]
        for outcome in seen.outcomes
        if outcome.kind in ("plain", "slow") and outcome.status not in _GOOD
    }
    return {
        "requests": len(seen.outcomes),
        "by_port": dict(ports),
        "statuses": dict(sorted(statuses.items())),
        "what_plain_requests_failed_with": sorted(failed)[:30],
        "unanswered": len(unanswered),
        "unanswered_examples": [vars(outcome) for outcome in unanswered[:10]],
        "tokens_per_second": [round(minute["tokens"] / 60, 1) for minute in whole],
        "last_to_first_minute": round(whole[-1]["tokens"] / max(1, whole[0]["tokens"]), 3),
        "minutes": table,
        "memory_mb": seen.memory,
    }


async def _drive(server: StressServer, options: argparse.Namespace) -> dict[str, Any]:
    requests = datasets.task_requests(2_000, options.seed)
    model = options.model
    async with MixedClient(server.grpc_address, server.http_address, model, options.seed) as client:
        for outcome in await asyncio.gather(*(client.send(one, "plain") for one in requests[:_AT_ONCE])):
            if outcome.status not in _GOOD:
                raise RuntimeError(f"a plain request failed before the load began: {outcome}")
        rate = options.rate or await saturation(client, requests, options.calibration_seconds)
        print(f"saturation {rate:.1f} requests/s, load {_SHARE * rate:.1f} requests/s", flush=True)
        seen = await load(client, requests, _SHARE * rate, options.minutes, server, options.seed)
    return {"saturation": round(rate, 2)} | figures(seen, options.minutes)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs the server and the load; returns the results."""
    overrides = [f"--gin.{binding}" for binding in options.gin]
    overrides.append(f"--gin.EngineConfig.failpoints={tuple(options.failpoint)!r}")
    with stressed(options.config, overrides) as server:
        results = asyncio.run(_drive(server, options))
        results["alive"] = server.process.poll() is None
        results["leaked"] = server.leaked() if results["alive"] else None
        results["injected"] = dict(
            collections.Counter(
                line.split("failpoint ")[1].split(":")[0]
                for line in server.lines
                if "InjectedFaultError: failpoint " in line
            )
        )
        results["exit_code"] = server.end()
        results["last_line"] = server.lines[-1] if server.lines else ""
    return results


def wrong(results: dict[str, Any]) -> list[str]:
    """Says what must not be, in lines."""
    found = []
    if not results["alive"] or results["exit_code"]:
        found.append(f"the server ended with exit code {results['exit_code']}: {results['last_line']}")
    if any((results["leaked"] or {}).values()):
        found.append(f"still held: {results['leaked']}")
    if results["unanswered"]:
        found.append(f"{results['unanswered']} requests without exactly one answer")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--config", default="tiny.gin")
    parser.add_argument("--model", default="tiny", help="the name under which the configuration serves it")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, help="requests a second at saturation; default: measured first")
    parser.add_argument("--calibration-seconds", type=float, default=30.0)
    parser.add_argument("--gin", action="append", default=[], metavar="BINDING=VALUE", help="of the server")
    parser.add_argument("--failpoint", action="append", help="replaces the failpoints; may be repeated")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.failpoint = options.failpoint or list(FAILPOINTS)
    results = run(options)
    print(json.dumps({name: part for name, part in results.items() if name not in ("minutes", "memory_mb")}, indent=1))
    print(report.write("soak", vars(options), results))
    problems = wrong(results)
    return report.fail("; ".join(problems)) if problems else 0


if __name__ == "__main__":
    sys.exit(main())
