"""What is served and what is refused at several times the capacity: `python -m benchmarks.overload --config tiny.gin`.

A server with a short queue and three tenants of the weights 1, 2 and 4 is driven in rounds: by closed loops that keep
its rows and half of its queue filled, which is its capacity, then by requests that arrive at random at `--factors`
times that rate, alike for all tenants. A refused client comes back when it was told to, until it has had an answer or
the run is over; `--rude` further clients of the tenant of least weight come back at once, for ever. For each load:
requests completed in a second (and those within `--within` seconds of the attempt that was accepted: the goodput), each
tenant's share of the tokens served against its weight, how long refusals took as the server measures it and as a client
sees it, and the share of the machine's CPU time that this process, the generator, took.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.load import http2
from benchmarks.load.arrivals import gamma_arrivals
from benchmarks.load.server_process import started_server
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.clients.grpc_client import Client, generate_request
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb

WEIGHTS = {"bronze": 1.0, "silver": 2.0, "gold": 4.0}
_METHOD = "/{}/Generate".format(pb.DESCRIPTOR.services_by_name["JaxServe"].full_name)
_RESOURCE_EXHAUSTED = 8
_WARM_UP = 10.0
"""Seconds at the begin of each run that do not count: the queue fills."""


@dataclasses.dataclass
class Seen:
    """What came of all attempts of a run. refusals: seconds each took; served: (when, tenant, tokens, seconds)."""

    refusals: list[float] = dataclasses.field(default_factory=list)
    served: list[tuple[float, str, int, float]] = dataclasses.field(default_factory=list)
    errors: list[str] = dataclasses.field(default_factory=list)
    pushbacks: list[float] = dataclasses.field(default_factory=list)
    attempts: int = 0


class Generator:
    """Sends requests of random lengths over one connection. end: when the run is over, on the clock of `loop.time`."""

    def __init__(self, connection: http2.Connection, options: argparse.Namespace, end: float):
        self._connection = connection
        self._random = random.Random(options.seed)
        self._options = options
        self.end = end
        self.seen = Seen()

    def request(self, tenant: str) -> tuple[bytes, int]:
        """Returns a request message, and the tokens that it takes."""
        options = self._options
        prompt = [self._random.randrange(3, 250) for _ in range(self._length(options.prompt_tokens))]
        output = self._length(options.output_tokens)
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        return generate_request(prompt, params, tenant=tenant).SerializeToString(), len(prompt) + output

    def _length(self, mean: int) -> int:
        return self._random.randint(mean // 2, mean + mean // 2)

    async def attempt(self, payload: bytes, tenant: str, tokens: int) -> float | None:
        """Sends a request once; returns None when it was served, else the seconds after which to try again."""
        sent = time.perf_counter()
        self.seen.attempts += 1
        stream = self._connection.start(payload)
        await stream.done
        seconds = stream.ended - sent
        if stream.status == 0:
            self.seen.served.append((asyncio.get_running_loop().time(), tenant, tokens, seconds))
            return None
        if stream.status == _RESOURCE_EXHAUSTED:
            self.seen.refusals.append(seconds)
            pushback = int(stream.trailers.get(b"grpc-retry-pushback-ms", b"1000")) / 1000
            self.seen.pushbacks.append(pushback)
            return pushback
        self.seen.errors.append(f"{stream.status}: {stream.message}")
        return 1.0

    async def polite(self, tenant: str) -> None:
        """Sends one request, and again when the server says so."""
        payload, tokens = self.request(tenant)
        loop = asyncio.get_running_loop()
        while (pause := await self.attempt(payload, tenant, tokens)) is not None:
            pause *= self._random.uniform(1.0, 1.2)  # as gRPC's own clients do
            if loop.time() + pause > self.end:
                return
            await asyncio.sleep(pause)

    async def rude(self, tenant: str) -> None:
        """Sends one request after another, and whatever is refused again at once."""
        while asyncio.get_running_loop().time() < self.end:
            payload, tokens = self.request(tenant)
            while await self.attempt(payload, tenant, tokens) is not None:
                if asyncio.get_running_loop().time() > self.end:
                    return

    async def closed_loop(self, tenant: str) -> None:
        """Sends one request after another."""
        await self.rude(tenant)

    async def open_loop(self, rate: float, seconds: float, tenants: Sequence[str]) -> None:
        """Starts polite clients at random times, `rate` a second, of each tenant as many."""
        arrivals = gamma_arrivals(rate, 1.0, round(rate * seconds), self._options.seed)
        begin = asyncio.get_running_loop().time()
        tasks = []
        for number, arrival in enumerate(arrivals):
            if (wait := begin + arrival - asyncio.get_running_loop().time()) > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.ensure_future(self.polite(tenants[number % len(tenants)])))
        await asyncio.gather(*tasks)


async def drive(
    address: str, options: argparse.Namespace, rate: float | None, rude: int
) -> tuple[Seen, float, float, float]:
    """Runs one load; returns what was seen, when it began to count and when it ended, and this process's CPU share.

    rate: requests a second; None is closed loops, one for each place.
    """
    connection = await http2.connect(address, _METHOD)
    loop = asyncio.get_running_loop()
    begin = loop.time()
    end = begin + _WARM_UP + options.seconds
    generator = Generator(connection, options, end)
    cpu = time.process_time()
    tasks = [asyncio.ensure_future(generator.rude(next(iter(WEIGHTS)))) for _ in range(rude)]
    if rate is None:
        places = options.max_num_seqs + options.max_num_waiting // 2
        tasks += [asyncio.ensure_future(generator.closed_loop(tenant)) for tenant in _round_robin(places)]
    else:
        tasks.append(asyncio.ensure_future(generator.open_loop(rate, end - begin, list(WEIGHTS))))
    await asyncio.sleep(end - begin)
    share = (time.process_time() - cpu) / (loop.time() - begin) / len(os.sched_getaffinity(0))
    await asyncio.wait(tasks, timeout=60)
    connection.close()
    return generator.seen, begin + _WARM_UP, end, share


def _round_robin(count: int) -> Iterator[str]:
    names = list(WEIGHTS)
    return (names[number % len(names)] for number in range(count))


def figures(seen: Seen, begin: float, end: float, within: float) -> dict[str, Any]:
    """Returns what the clients saw between two times."""
    served = [one for one in seen.served if begin <= one[0] < end]
    tokens = {name: sum(count for _, tenant, count, _ in served if tenant == name) for name in WEIGHTS}
    total, weights = sum(tokens.values()), sum(WEIGHTS.values())
    shares = {name: count / max(total, 1) for name, count in tokens.items()}
    return {
        "completed_per_second": len(served) / (end - begin),
        "goodput_per_second": sum(seconds <= within for *_, seconds in served) / (end - begin),
        "tokens_per_second": total / (end - begin),
        "latency_p50_seconds": _quantile([seconds for *_, seconds in served], 0.5),
        "latency_p99_seconds": _quantile([seconds for *_, seconds in served], 0.99),
        "attempts": seen.attempts,
        "refused": len(seen.refusals),
        "errors": seen.errors[:5],
        "refusal_client_p50_ms": 1000 * _quantile(seen.refusals, 0.5),
        "refusal_client_p99_ms": 1000 * _quantile(seen.refusals, 0.99),
        "pushback_p50_seconds": _quantile(seen.pushbacks, 0.5),
        "share_of_tokens": shares,
        "share_over_weight": {name: shares[name] * weights / weight for name, weight in WEIGHTS.items()},
    }


def _quantile(values: Sequence[float], share: float) -> float:
    return float(np.quantile(values, share)) if values else 0.0


@contextlib.contextmanager
def server(options: argparse.Namespace) -> Iterator[str]:
    """Runs the server; yields its address when it is ready."""
    tenants = ", ".join(f"'{name}': {{'weight': {weight}}}" for name, weight in WEIGHTS.items())
    overrides = [
        f"--gin.SchedulerConfig.policy='{options.policy}'",
        f"--gin.SchedulerConfig.max_num_seqs={options.max_num_seqs}",
        f"--gin.SchedulerConfig.max_num_waiting={options.max_num_waiting}",
        f"--gin.QueueConfig.tenants={{{tenants}}}",
        *(f"--gin.{binding}" for binding in options.gin),
    ]
    with started_server(options.config, overrides) as (address, _):
        with Client(address) as client:
            client.wait_ready(600)
        yield address


def run(address: str, options: argparse.Namespace, rate: float | None, rude: int) -> dict[str, Any]:
    """Runs one load. Refusals as the server measures them are those since its start."""
    seen, begin, end, share = asyncio.run(drive(address, options, rate, rude))
    with Client(address) as client:
        admission = client.server_info().admission
    return figures(seen, begin, end, options.within) | {
        "offered_per_second": rate,
        "rude_clients": rude,
        "refusal_server_p50_ms": 1000 * admission.refusal_seconds_p50,
        "refusal_server_p99_ms": 1000 * admission.refusal_seconds_p99,
        "rejections": dict(admission.rejections),
        "generator_cpu_share": share,
        "load_average": os.getloadavg()[0],
    }


def line(found: dict[str, Any]) -> list[Any]:
    """Returns the row of one load."""
    offered = found["offered_per_second"]
    return [
        "closed" if offered is None else f"{offered:.0f}",
        found["rude_clients"],
        f"{found['completed_per_second']:.1f}",
        f"{found['goodput_per_second']:.1f}",
        f"{found['tokens_per_second']:.0f}",
        f"{found['latency_p99_seconds']:.2f}",
        found["refused"],
        f"{found['refusal_server_p50_ms']:.1f} / {found['refusal_server_p99_ms']:.1f}",
        f"{found['refusal_client_p99_ms']:.1f}",
        " ".join(f"{value:.2f}" for value in found["share_over_weight"].values()),
        f"{found['generator_cpu_share']:.0%}",
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs every load, prints the table and writes the JSON file."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overload", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--config", default="tiny.gin")
    parser.add_argument("--policy", default="fair")
    parser.add_argument("--factors", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--rude", type=int, default=4, help="clients that retry at once, at factors above 1")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each load, beyond the warm-up")
    parser.add_argument("--rounds", type=int, default=2, help="of closed loops and all factors, on one server")
    parser.add_argument("--within", type=float, default=15.0, help="seconds in which a request counts as goodput")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="mean; from half to one and a half of it")
    parser.add_argument("--output-tokens", type=int, default=64, help="mean; from half to one and a half of it")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-num-waiting", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gin", action="append", default=[], metavar="BINDING=VALUE")
    parser.add_argument("--name", default="overload", help="of the JSON file; empty writes none")
    options = parser.parse_args(arguments)
    loads = []
    with server(options) as address:
        for number in range(options.rounds):  # in turn, since the machine's other work changes
            capacity = run(address, options, None, 0) | {"round": number, "factor": None}
            loads.append(capacity)
            for factor in options.factors:
                rate = factor * capacity["completed_per_second"]
                rude = options.rude if factor > 1 else 0
                loads.append(run(address, options, rate, rude) | {"round": number, "factor": factor})
    for number in range(options.rounds):
        mine = [found for found in loads if found["round"] == number]
        peak = max(found["goodput_per_second"] for found in mine)
        for found in mine:
            found["goodput_over_peak"] = found["goodput_per_second"] / peak if peak else 0.0
    header = ["offered/s", "rude", "completed/s", "goodput/s", "tokens/s", "p99 s", "refused"]
    header += ["refusal ms, server p50 / p99", "client p99 ms", "share / weight", "generator CPU"]
    print(report.describe())
    print(report.table(header, [line(found) for found in loads]))
    print("goodput over its peak in the round: " + ", ".join(f"{found['goodput_over_peak']:.2f}" for found in loads))
    if options.name:
        print(report.write(options.name, vars(options) | {"weights": WEIGHTS}, loads))
    return 0


if __name__ == "__main__":
    sys.exit(main())
