"""Whether a change made anything slower: `python -m benchmarks.before_after --against DIR`.

DIR is another checkout of this repository. Both run the offline workloads of `benchmarks.compare` and serve over gRPC,
in turn within each round; a ratio above 1 says that this checkout is faster. The client is this checkout's for both.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import report
from benchmarks.load import datasets, runs
from benchmarks.load.runs import Target
from benchmarks.load.server_process import started_server
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.sides.side_process import Side, start_jaxserve
from benchmarks.spread import spread, spread_text
from benchmarks.work import SHAPES, Workload
from benchmarks.work import WORKLOADS as COMPARED
from jaxserve.serving.clients.grpc_client import Client

MODEL_LEN = 1024
ROWS = 64
WORKLOADS = COMPARED | {"steps": Workload("steps", "153m", ROWS, (16, 32), (65, 65), transformers_rounds=0)}
"""`steps` decodes and does little else, in rounds that are short enough to take turns often."""


def offline(name: str, against: pathlib.Path, rounds: int, folder: pathlib.Path) -> list[list[float]]:
    """One workload through the offline engines of both checkouts."""
    workload = WORKLOADS[name]
    model = checkpoint(workload.model, folder)
    rows = min(ROWS, workload.requests)
    options = {
        "model": str(model),
        "dtype": "bfloat16",
        "max_model_len": MODEL_LEN,
        "skip_tokenizer_init": True,
        "max_num_seqs": rows,
        "num_pages": rows * MODEL_LEN // 16 + 1,
    }
    with contextlib.ExitStack() as stack:
        sides = [
            stack.enter_context(start_jaxserve({"options": options}, name, root))
            for name, root in (("after", report.ROOT), ("before", against))
        ]

        def run(side: Side, repeat: int) -> float:
            seconds = side.run(workload.work(0, repeat)).seconds
            side.settle()
            return workload.work(0, repeat).most_output_tokens / seconds

        return in_turn(sides, run, rounds)


def serving(model: str, against: pathlib.Path, rounds: int, folder: pathlib.Path) -> list[list[float]]:
    """64 requests at once over gRPC to the servers of both checkouts: the shipped model ("tiny"), or a random one."""
    overrides = []
    vocab_size = 512
    if model != "tiny":
        vocab_size = SHAPES[model]["vocab_size"]
        settings = {
            "EngineConfig.model": str(checkpoint(model, folder)),
            "EngineConfig.dtype": "bfloat16",
            "EngineConfig.skip_tokenizer_init": True,
            "EngineConfig.max_model_len": MODEL_LEN,
            "CacheConfig.num_pages": ROWS * MODEL_LEN // 16 + 1,
        }
        overrides = [f"--gin.{name}={value!r}" for name, value in settings.items()]
    with contextlib.ExitStack() as stack:
        targets = []
        for root in (report.ROOT, against):
            address, pid = stack.enter_context(started_server("tiny.gin", overrides, root))
            with Client(address) as client:
                client.wait_ready(600)
            targets.append(Target(address, pid, 1.0, None, {}, 1.0, 0, False))

        def run(target: Target, repeat: int) -> float:
            requests = datasets.random_requests(ROWS, (32, 512), (16, 256), vocab_size, 2, repeat)
            found = runs.load(target, requests, math.inf)
            if found["failed"]:
                raise RuntimeError(f"{found['failed']} requests failed")
            return found["output_throughput"]

        return in_turn(targets, run, rounds)


def in_turn(sides: Sequence[Any], run: Callable[[Any, int], float], rounds: int) -> list[list[float]]:
    """Output tokens a second of [after, before] in each round, one warm-up round before."""
    found: list[list[float]] = []
    for repeat in range(rounds + 1):
        order = (0, 1) if repeat % 2 else (1, 0)  # so that a drift favors neither
        rates = dict(sorted((number, run(sides[number], repeat)) for number in order))
        if repeat:
            found.append([rates[0], rates[1]])
            print(f"  round {repeat}: {rates[0]:,.1f} after, {rates[1]:,.1f} before", flush=True)
    return found


def in_pairs(measure: Callable[[], list[list[float]]], pairs: int) -> dict[str, Any]:
    """Measures with `pairs` pairs of processes: two processes of one program differ by more than their rounds do."""
    found = [measure() for _ in range(pairs)]
    ratios = [statistics.median(after / before for after, before in rounds) for rounds in found]
    return {"output_throughput": found, "ratio": spread(ratios)}


def checkpoint(model: str, folder: pathlib.Path) -> pathlib.Path:
    """A checkpoint of a shape with random weights, written once."""
    directory = folder / model
    if not directory.exists():
        write_checkpoint(directory, SHAPES[model])
    return directory


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.before_after", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--against", type=pathlib.Path, required=True, metavar="DIR", help="the other checkout")
    parser.add_argument("--workloads", default="153m,single", help=f"offline, of {','.join(WORKLOADS)}")
    parser.add_argument("--serving", default="tiny,153m", help=f"over gRPC, of tiny,{','.join(SHAPES)}")
    parser.add_argument("--rounds", type=int, default=3, help="of each pair of processes")
    parser.add_argument(
        "--pairs", type=int, default=3, help="pairs of processes; a ratio is the median of their medians"
    )
    options = parser.parse_args(arguments)
    against = options.against.resolve()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind, measure, names in (("offline", offline, options.workloads), ("serving", serving, options.serving)):
            for name in filter(None, names.split(",")):
                print(f"{kind} {name}", flush=True)
                once = functools.partial(measure, name, against, options.rounds, pathlib.Path(scratch))
                results[f"{kind} {name}"] = found = in_pairs(once, options.pairs)
                print(f"{kind} {name}: after over before {spread_text(found['ratio'])}", flush=True)
    settings = {
        "against": report.commit(against),
        "rounds": options.rounds,
        "pairs": options.pairs,
        "max_model_len": MODEL_LEN,
    }
    print(report.write("before_after", settings | {"max_model_len": MODEL_LEN}, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
