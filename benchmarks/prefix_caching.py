"""What a shared prefix saves, and what looking for one costs: `python -m benchmarks.prefix_caching`.

    ttft        time to first token of a prompt whose first 1,500 tokens are cached, on the device or in host memory,
                beside one whose are not
    throughput  64 requests that share 1,500 tokens, all at once: with and without the cache, and by every peer under
                --peer-python (vLLM with its own prefix caching), in turn within each round. A round has a new prefix
    costs       the host's time of a step in which nothing is found, with the cache over without; and look-up, insertion
                and eviction by the number of cached pages (benchmarks/prefix_costs.py)

The model is the 153 million parameter Llama with random weights, in bfloat16. Ratios are taken within each round.
"""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import statistics
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.prefix_costs import CASES, all_calls, step_overhead
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.sides.contest import Contestant, find_peers, ratio, take_turns
from benchmarks.sides.side_process import PEERS, SideError, start_jaxserve, start_peer
from benchmarks.spread import spread, spread_text
from benchmarks.work import FIRST_ORDINARY_ID, SHAPES, Work
from jaxserve.config.settings import EngineConfig
from jaxserve.engine.inline import InlineEngine
from jaxserve.engine.messages import AddRequest, outputs
from jaxserve.request import EngineRequest

PAGE_SIZE = 16
MODEL_LEN = 2048
SHAPE = "153m"
HOST_GIB = 2.0
PARTS = ("ttft", "throughput", "costs")
CACHED_PAGES = (10, 1_000, 100_000)


def shared_work(options: argparse.Namespace, repeat: int) -> Work:
    """Requests that share a prefix and have random ids of their own behind it. Each `repeat` has other ids."""
    rng = np.random.default_rng([options.seed, repeat])
    prefix, *own = (
        rng.integers(FIRST_ORDINARY_ID, SHAPES[SHAPE]["vocab_size"], size).tolist()
        for size in (options.prefix, *[options.own] * options.requests)
    )
    return Work([prefix + one for one in own], [options.output] * options.requests)


def engine_options(model: pathlib.Path, rows: int, *, caching: bool) -> dict[str, Any]:
    """Options of `LLM`, with pages for all rows even where they share none."""
    return {
        "model": str(model),
        "dtype": "bfloat16",
        "max_model_len": MODEL_LEN,
        "skip_tokenizer_init": True,
        "max_num_seqs": rows,
        "page_size": PAGE_SIZE,
        "num_pages": rows * MODEL_LEN // PAGE_SIZE + 1,
        "enable_prefix_caching": caching,
    }


def first_token_seconds(engine: InlineEngine, prompt: Sequence[int], name: str) -> tuple[float, int]:
    """Seconds until the first token of a request alone, and the tokens that it found."""
    begin = time.perf_counter()
    engine.send(AddRequest(EngineRequest(name, tuple(prompt), max_tokens=1)))
    while True:
        for output in (one for message in engine.receive() for one in outputs(message)):
            if output.token_ids:
                seconds, found = time.perf_counter() - begin, output.num_cached_tokens
                while engine.core.busy:
                    engine.receive()
                return seconds, found


def measure_ttft(model: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds to the first token, of a miss, a hit and a host hit in turn, and how many times as fast the hits
    are."""
    told = engine_options(model, 8, caching=True) | {"swap_space": HOST_GIB}
    engine = InlineEngine(EngineConfig.from_options(**told))
    milliseconds: dict[str, list[float]] = {"miss": [], "hit": [], "host hit": []}
    for repeat in range(options.rounds + 1):
        work = shared_work(argparse.Namespace(**vars(options) | {"requests": 3}), 1000 + repeat)
        for (way, kept), prompt in zip(milliseconds.items(), work.prompts, strict=True):
            assert not isinstance(prompt, str)
            if way == "host hit":
                crowd_out(engine, f"crowd {repeat}")
            seconds, found = first_token_seconds(engine, prompt, f"{way} {repeat}")
            expected = 0 if way == "miss" else options.prefix // PAGE_SIZE * PAGE_SIZE
            if found != expected:
                raise AssertionError(f"a {way} found {found} tokens, not {expected}")
            kept += [1e3 * seconds] * (repeat > 0)
    engine.core.check_integrity()
    stats = engine.core.stats()
    engine.close()
    if stats.host_cache_hits != options.rounds + 1:
        raise AssertionError(f"{stats.host_cache_hits} requests had pages brought back, not {options.rounds + 1}")
    ratios = {}
    for way in ("hit", "host hit"):
        ratios[way] = [miss / hit for miss, hit in zip(milliseconds["miss"], milliseconds[way], strict=True)]
        print(f"a {way}'s first token: {spread_text(spread(ratios[way]))} times as soon as a miss's", flush=True)
    pages, seconds = stats.page_copies["in"]
    return {
        "milliseconds": {way: spread(values) for way, values in milliseconds.items()},
        "miss_over_hit": spread(ratios["hit"]),
        "miss_over_host_hit": spread(ratios["host hit"]),
        "host_pages_of_a_hit": pages / stats.host_cache_hits,
        "microseconds_a_page": 1e6 * seconds / pages,
        "page_bytes": stats.page_bytes,
    }


def crowd_out(engine: InlineEngine, name: str) -> None:
    """Moves all cached pages to host memory, and waits for that."""
    pool = engine.core.scheduler.pool
    pool.release(pool.allocate(pool.num_available) or ())
    first_token_seconds(engine, [FIRST_ORDINARY_ID], name)


def measure_throughput(model: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the whole work by every engine, and how many times as fast jaxserve with the cache is."""
    peers, absent = find_peers(options)
    peer_options = {"model": str(model), "dtype": "bfloat16", "max_model_len": MODEL_LEN}
    with contextlib.ExitStack() as stack:
        sides = [
            stack.enter_context(
                start_jaxserve({"options": engine_options(model, options.requests, caching=caching)}, name)
            )
            for name, caching in (("with cache", True), ("without", False))
        ]
        for peer in peers:
            extra = {"enable_prefix_caching": True} if peer == "vllm" else {"max_num_seqs": options.requests}
            try:
                sides.append(stack.enter_context(start_peer(peer, options.peer_python, peer_options | extra)))
            except SideError as error:
                absent[peer] = str(error)
        contestants = [Contestant(side, options.rounds) for side in sides]
        take_turns([Contestant(side, 1) for side in sides], [shared_work(options, 0)])
        take_turns(contestants, [shared_work(options, repeat) for repeat in range(1, options.rounds + 1)])
        seconds = {one.side.name: [run.seconds for run in one.runs] for one in contestants}
        found = {
            "seconds": {name: spread(values) for name, values in seconds.items()},
            "output_tokens_per_second": {
                name: options.requests * options.output / statistics.median(values) for name, values in seconds.items()
            },
            "faster_than": {
                name: ratio(seconds["with cache"], values) for name, values in seconds.items() if name != "with cache"
            },
            "versions": {side.name: side.versions for side in sides},
            "idle_cores_of_others": {one.side.name: max(one.idle_cores) for one in contestants},
            "compilations": sum(run.details.get("compilations", 0) for one in contestants for run in one.runs),
            "absent": absent,
        }
    for name, times in found["faster_than"].items():
        print(f"with the cache as fast as {name}: {spread_text(times)} times", flush=True)
    return found


def measure_costs(options: argparse.Namespace) -> dict[str, Any]:
    """What the cache costs the host."""
    steps = [step_overhead(case, running, options.cost_rounds, 200) for case in CASES for running in options.running]
    calls = all_calls(CACHED_PAGES, 1000)
    rows = [
        (
            f"{one['case']}, {one['running']}",
            *one["microseconds"].values(),
            one["ratio"]["median"],
            one["ratio_of_equals"]["median"],
        )
        for one in steps
    ]
    print(report.table(("microseconds of a step", "with cache", "without", "ratio", "of equals"), rows))
    header = ("keys", "lookup", "insert", "release", "evict")
    rows = [(f"{one['policy']}, {one['cached']:,} cached", *(one[name] for name in header)) for one in calls]
    print(report.table(("microseconds a page", *header), rows))
    return {"steps": steps, "calls": calls}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help="default: all")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--prefix", type=int, default=1500, help="tokens that requests share")
    parser.add_argument("--own", type=int, default=20, help="tokens of each prompt behind the prefix")
    parser.add_argument("--output", type=int, default=32, help="tokens of each request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cost-rounds", type=int, default=15, help="of 200 steps, of each case of the host's costs")
    parser.add_argument("--running", type=int, nargs="+", default=[64, 256], help="requests of those cases")
    parser.add_argument("--peer-python", default="", help="the Python that has the peers; default: none takes part")
    parser.add_argument("--peers", type=lambda text: text.split(","), default=["vllm"], help=f"of {', '.join(PEERS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="of the result file; default: prefix_caching_jax<version>")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"--parts names {', '.join(sorted(unknown))}; it takes {', '.join(PARTS)}")
    if options.prefix + options.own + options.output > MODEL_LEN:
        parser.error(f"--prefix, --own and --output are more than {MODEL_LEN} tokens together")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the figures and writes the result."""
    options = parse(arguments)
    results: dict[str, Any] = {}
    if "costs" in options.parts:
        results["costs"] = measure_costs(options)
    with tempfile.TemporaryDirectory() as folder:
        model = pathlib.Path(folder) / SHAPE
        if options.parts != ["costs"]:
            write_checkpoint(model, SHAPES[SHAPE])
        if "ttft" in options.parts:
            results["ttft"] = measure_ttft(model, options)
        if "throughput" in options.parts:
            results["throughput"] = measure_throughput(model, options)
    settings = {name: value for name, value in vars(options).items() if name not in ("peer_python", "name")}
    settings |= {"model": SHAPE, "page_size": PAGE_SIZE, "max_model_len": MODEL_LEN}
    path = report.write(options.name or f"prefix_caching_jax{report.versions()['jax']}", settings, results)
    print(f"{report.describe()}\nwritten: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
