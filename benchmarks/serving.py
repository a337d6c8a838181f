"""Open-loop load over gRPC: `python -m benchmarks.serving --model 153m --sweep --offline`.

Starts a server, or takes the --address of one that runs. Requests arrive at --request-rate whether or not those before
are answered. --sweep and --rates measure several rates up to saturation; --offline runs the same requests through the
offline engine too, in turn, and prints the share of its throughput that is left at saturation; --slow-readers runs the
load with and without readers that stop, in turn, and prints what the others notice. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import math
import pathlib
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import report
from benchmarks.load import datasets, runs
from benchmarks.load.datasets import LoadRequest
from benchmarks.load.load_client import Slowness
from benchmarks.load.load_figures import parse_goodput
from benchmarks.load.load_plots import latency_against_throughput
from benchmarks.load.runs import Target
from benchmarks.load.server_process import started_server
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.sides.side_process import start_jaxserve
from benchmarks.spread import spread_text
from benchmarks.work import SHAPES
from jaxserve.serving.clients.grpc_client import AsyncClient
from jaxserve.simulator.conversations import CONVERSATIONS, conversation_trace, parse_conversation
from jaxserve.simulator.trace_files import trace_rows

RANDOM_MODEL_LEN = 1024
"""Context of a model with random weights: it bounds the page pool, which holds max_num_seqs requests of it."""

_COUNTS = ("num_compilations", "compile_misses", "num_steps", "generation_tokens", "num_preemptions")
_IDLE_SECONDS = 1.0
_DATASETS = ("random", "trace", "prefix_repetition", "task", *CONVERSATIONS)


@dataclasses.dataclass(frozen=True)
class Served:
    """What the requests must fit, as the server says."""

    vocab_size: int
    max_model_len: int


def server_settings(options: argparse.Namespace, folder: pathlib.Path) -> tuple[str, list[str]]:
    """Configuration and overrides of server and offline engine alike; writes the checkpoint of a random model."""
    overrides = [f"--gin.{binding}" for binding in options.gin]
    if options.model is None:
        return options.config, overrides
    path = folder / f"llama-{options.model}"
    write_checkpoint(path, SHAPES[options.model])
    bindings = {
        "EngineConfig.model": repr(str(path)),
        "EngineConfig.dtype": "'bfloat16'",
        "EngineConfig.skip_tokenizer_init": "True",
        "EngineConfig.max_model_len": RANDOM_MODEL_LEN,
        "CacheConfig.num_pages": 64 * RANDOM_MODEL_LEN // 16 + 1,
        "ServerConfig.served_model_name": repr(options.model),
    }
    return options.config, [f"--gin.{name}={value}" for name, value in bindings.items()] + overrides


def make_requests(options: argparse.Namespace, served: Served, repeat: int) -> list[LoadRequest]:
    """The requests of the command line; those of another `repeat` differ in their ids, where these are random."""
    seed = options.seed
    match options.dataset:
        case "task":
            return datasets.task_requests(options.num_prompts, seed)
        case "prefix_repetition":
            return datasets.prefix_requests(
                options.num_prompts,
                options.num_prefixes,
                options.prefix_len,
                options.suffix_len,
                options.output_len,
                served.vocab_size,
                seed + repeat,
            )
        case "trace":
            requests, skipped = datasets.trace_requests(
                trace_rows(options.trace), options.num_prompts, served.max_model_len, served.vocab_size, seed + repeat
            )
            if not requests:
                raise ValueError(f"no request of trace {options.trace.name} fits max_model_len {served.max_model_len}")
            if skipped and not repeat:
                print(f"trace: {skipped} requests are longer than max_model_len {served.max_model_len}; left out")
            return requests
        case "agent" | "chat":
            config = dataclasses.replace(
                parse_conversation(options.dataset, options.conversation), max_length=served.max_model_len
            )
            trace = conversation_trace(config).part(0, options.num_prompts)
            requests, _ = datasets.conversation_requests(trace, served.max_model_len, served.vocab_size, seed + repeat)
            return requests
        case _:
            return datasets.random_requests(
                options.num_prompts, options.inputs, options.outputs, served.vocab_size, seed, repeat
            )


def measure(options: argparse.Namespace, target: Target, offline: Any) -> dict[str, Any]:
    """All runs that the command line asks for, after one that warms."""
    served = asyncio.run(_ask(target.address, options.patience))
    requests = make_requests(options, served, 0)
    warm = make_requests(options, served, options.repeats + 1)  # other ids: nothing of a round is cached before it
    runs.load(target, warm[: options.warmup_prompts], math.inf)
    before = asyncio.run(_counts(target.address))
    results: dict[str, Any] = {}
    if options.sweep or options.rates:
        print("sweep", flush=True)
        results["sweep"] = runs.sweep(target, requests, options.rates, options.most_seconds)
    if offline is not None:
        print("offline and serving in turn", flush=True)
        again = lambda repeat: make_requests(options, served, repeat)  # noqa: E731
        results["beside_offline"] = runs.beside_offline(target, offline, again, options.repeats)
    if options.slow_readers:
        print(f"slow readers: {options.slow_readers:.0%} of the streams", flush=True)
        slowness = Slowness(options.slow_pause)
        results["slow_readers"] = runs.slow_readers(
            target, requests, options.request_rate, options.slow_readers, slowness, options.repeats
        )
    if not results:
        rounds = [requests, *(make_requests(options, served, repeat) for repeat in range(1, options.repeats))]
        found = [runs.load(target, each, options.request_rate) for each in rounds]
        print(*map(runs.line, found), sep="\n", flush=True)
        results["runs"] = found
    after = asyncio.run(_counts(target.address))
    results["server"] = {name: after[name] - before[name] for name in after}
    return results


def say(results: dict[str, Any]) -> None:
    """Prints the ratios and the counts."""
    if "beside_offline" in results:
        print("serving at saturation / offline, output tok/s: " + spread_text(results["beside_offline"]["ratio"]))
    if slow := results.get("slow_readers"):
        pooled, growth = slow["others_pooled"], slow["growth_of_p99_itl"]
        print("growth of the others' p99 time between tokens: " + (spread_text(growth) if growth else "none was seen"))
        if growth:
            fast, beside = pooled["all_fast"]["p99_itl_ms"], pooled["with_slow"]["p99_itl_ms"]
            print(
                f"  over all rounds together {slow['growth_of_pooled_p99_itl']:.3f}: {fast:.2f} ms with fast readers "
                f"alone, {beside:.2f} ms beside slow ones"
            )
    server = results["server"]
    print(
        f"since the warm-up the server compiled {server['num_compilations']} programs "
        f"({server['compile_misses']} misses) in {server['num_steps']:,} steps, "
        f"{server['generation_tokens']:,} tokens generated, {server['num_preemptions']} preemptions"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_argument_group("server")
    where.add_argument("--address", help="HOST:PORT of a running server; without it one is started")
    where.add_argument("--config", default="tiny.gin", help="of the server that is started")
    where.add_argument("--gin", action="append", default=[], metavar="BINDING=VALUE", help="for it; may repeat")
    where.add_argument("--model", choices=list(SHAPES), help="serve a shape with random weights in bfloat16")
    where.add_argument("--patience", type=float, default=600.0, help="seconds to wait for it")
    where.add_argument("--warmup-prompts", type=int, default=64, help="requests before anything is measured")
    work = parser.add_argument_group("requests")
    work.add_argument("--dataset", choices=_DATASETS, default="random")
    work.add_argument("--num-prompts", type=int, default=64)
    work.add_argument("--inputs", type=bounds, default=(32, 512), metavar="LEAST,MOST", help="random: prompt tokens")
    work.add_argument("--outputs", type=bounds, default=(16, 256), metavar="LEAST,MOST", help="random: new tokens")
    work.add_argument("--trace", type=pathlib.Path, help="trace: a .csv (Azure) or .jsonl (Mooncake)")
    work.add_argument("--conversation", default="", metavar="NAME=VALUE,...", help="agent, chat: see docs/simulator.md")
    work.add_argument("--trace-scale", type=float, default=1.0, help="trace: arrivals so many times as fast")
    work.add_argument("--num-prefixes", type=int, default=4, help="prefix_repetition")
    work.add_argument("--prefix-len", type=int, default=256, help="prefix_repetition: tokens")
    work.add_argument("--suffix-len", type=int, default=64, help="prefix_repetition: tokens")
    work.add_argument("--output-len", type=int, default=64, help="prefix_repetition: tokens")
    work.add_argument("--seed", type=int, default=2)
    pace = parser.add_argument_group("arrivals")
    pace.add_argument("--request-rate", type=float, help="a second; default: all at once, or as in the trace")
    pace.add_argument("--burstiness", type=float, default=1.0, help="shape of the gamma distribution; 1: Poisson")
    pace.add_argument("--max-concurrency", type=int, help="requests open at once, at most")
    pace.add_argument("--rates", type=_floats, metavar="R1,R2,...", help="a run at each rate, and one all at once")
    pace.add_argument("--sweep", action="store_true", help="rates chosen from the throughput at saturation")
    pace.add_argument("--most-seconds", type=float, default=60.0, help="a low rate sends no more than arrives in it")
    more = parser.add_argument_group("what else")
    more.add_argument("--offline", action="store_true", help="the offline engine beside the server, in turn")
    more.add_argument("--slow-readers", type=float, default=0.0, metavar="SHARE", help="of the streams")
    more.add_argument("--slow-pause", type=float, default=2.0, help="seconds for which a slow reader stops")
    more.add_argument("--repeats", type=int, default=3, help="rounds of --offline and --slow-readers; runs otherwise")
    more.add_argument("--goodput", nargs="+", default=[], metavar="METRIC:MS", help="e.g. ttft:500 tpot:50")
    more.add_argument("--details", action="store_true", help="lists per request in the result file")
    more.add_argument("--name", help="name of the result file; default: serving_MODEL_jax<version>")
    options = parser.parse_args(arguments)
    _check(parser, options)
    return options


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    if (options.dataset == "trace") != (options.trace is not None):
        parser.error("--dataset trace and --trace PATH go together")
    if options.address and (options.offline or options.model):
        parser.error("--offline and --model start their own server; leave --address out")
    if not 0 <= options.slow_readers < 1:
        parser.error(f"--slow-readers is {options.slow_readers}; it must be at least 0 and below 1")
    sessions = options.dataset in CONVERSATIONS
    if sessions and (options.offline or options.sweep or options.rates or options.request_rate is not None):
        parser.error("sessions begin as --conversation says; leave out --offline, --sweep, --rates and --request-rate")
    if options.request_rate is None and options.dataset != "trace" and not sessions:
        options.request_rate = math.inf
    try:
        options.limits = parse_goodput(options.goodput)
    except ValueError as error:
        parser.error(str(error))


def bounds(text: str) -> tuple[int, int]:
    """LEAST,MOST as two whole numbers."""
    least, most = (int(part) for part in text.split(","))
    if not 1 <= least <= most:
        raise argparse.ArgumentTypeError(f"{text} is no range; give LEAST,MOST with 1 <= LEAST <= MOST")
    return least, most


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the figures, writes the result and a sweep's plot.

    Returns the exit status, 1 where a request failed or the server compiled something after its warm-up.
    """
    options = parse(arguments)
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        offline, address, pid = None, options.address, 0
        if address is None:
            config, overrides = server_settings(options, folder)
            if options.offline:
                settings = {"config": config, "overrides": overrides}
                offline = stack.enter_context(start_jaxserve(settings, "offline"))
            address, pid = stack.enter_context(started_server(config, overrides))
        target = Target(
            address,
            pid,
            options.burstiness,
            options.max_concurrency,
            options.limits,
            options.trace_scale,
            options.seed,
            options.details,
        )
        results = measure(options, target, offline)
    hidden = ("name", "address", "limits", "trace")
    settings = {name: value for name, value in vars(options).items() if name not in hidden}
    settings |= {"config": pathlib.PurePath(options.config).name, "trace": options.trace and options.trace.name}
    settings |= {"request_rate": "inf" if options.request_rate == math.inf else options.request_rate}
    name = options.name or f"serving_{options.model or settings['config']}_jax{report.versions()['jax']}"
    path = report.write(name, settings, results)
    print(report.describe())
    say(results)
    if "sweep" in results:
        plot(results, f"{options.model or settings['config']}, {options.dataset} requests", name)
    print(f"written: {path}")
    if failed := _failed(results):
        return report.fail(f"{failed} requests failed")
    if compiled := results["server"]["num_compilations"]:
        return report.fail(f"the server compiled {compiled} programs after its warm-up; it should compile none")
    return 0


def plot(results: dict[str, Any], title: str, name: str) -> None:
    """Writes results/`name`.png."""
    offline = None
    if "beside_offline" in results:
        rates = sorted(one["offline_output_throughput"] for one in results["beside_offline"]["rounds"])
        offline = rates[len(rates) // 2]
    try:
        latency_against_throughput(results["sweep"], title, report.RESULTS / f"{name}.png", offline)
    except ImportError as error:
        print(f"no plot: {error}")


def _failed(results: Any) -> int:
    """All that failed, anywhere in the results."""
    if isinstance(results, dict):
        return sum(value if key == "failed" else _failed(value) for key, value in results.items())
    return sum(map(_failed, results)) if isinstance(results, list) else 0


async def _ask(address: str, patience: float) -> Served:
    async with AsyncClient(address) as client:
        await client.wait_ready(patience)
        info = await client.model_info()
        return Served(info.vocab_size, info.max_model_len)


async def _counts(address: str) -> dict[str, int]:
    """The server's totals, once it is idle; of one that others use too, after a moment."""
    async with AsyncClient(address) as client:
        end = time.monotonic() + _IDLE_SECONDS
        while True:
            stats = (await client.server_info()).stats
            if not stats.num_running + stats.num_waiting or time.monotonic() > end:
                return {name: getattr(stats, name) for name in _COUNTS}
            await asyncio.sleep(0.05)


def _floats(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    raise SystemExit(main())
