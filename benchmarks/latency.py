"""Latency of one batch, alone on the engine: `python -m benchmarks.latency --peer-python PYTHON`.

The batch: --batch-size requests of --input-len random ids and --output-len new tokens each, all there at once. Each
repeat draws new ids and runs the batch twice: with one new token, which takes the time to the first token, and whole.
jaxserve and the peers that a Python has run in turn (--peers none: jaxserve alone). See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.load.load_figures import statistics_ms
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.sides import contest
from benchmarks.sides.contest import Contestant
from benchmarks.sides.side_process import Run
from benchmarks.spread import spread_text
from benchmarks.work import SHAPES, Work, random_work


def batches(options: argparse.Namespace) -> list[Work]:
    """For the warm-up and each repeat the batch with one new token and the whole batch, after one another."""
    vocab_size, size = SHAPES[options.model]["vocab_size"], options.batch_size
    lengths = (options.input_len, options.input_len)
    works = []
    for repeat in range(2 * options.repeats + 2):
        new_tokens = options.output_len if repeat % 2 else 1
        works.append(random_work(size, lengths, (new_tokens, new_tokens), vocab_size, options.seed, repeat))
    return works


def figures(runs: Sequence[Run], output_len: int) -> dict[str, Any]:
    """Statistics over the repeats, under vLLM's names, from runs with one new token and whole ones in turn.

    latency is of the whole batch; ttft of the batch with one new token; tpot the rest of latency by the rest of tokens.
    """
    first = [run.seconds for run in runs[::2]]
    whole = [run.seconds for run in runs[1::2]]
    tpot = [(long - short) / (output_len - 1) for short, long in zip(first, whole, strict=True)]
    found: dict[str, Any] = {
        "avg_latency": float(np.mean(whole)),
        "latencies": whole,
        "percentiles": {str(part): float(np.percentile(whole, part)) for part in (10, 25, 50, 75, 90, 99)},
    }
    found |= statistics_ms("ttft", first) | statistics_ms("tpot", tpot) | statistics_ms("e2el", whole)
    return found | {"cpu_cores": sum(run.cpu_seconds for run in runs[1::2]) / sum(whole)}


def measure(model: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    """Every side's figures, and how many times as fast as each peer jaxserve is, within each repeat."""
    peers, absent = contest.find_peers(options)
    warm, works = batches(options)[:2], batches(options)[2:]
    with contest.started(model, options.model, options.batch_size, options, peers, absent) as sides:
        for side in sides.values():
            for work in warm:
                side.run(work)
            side.settle()
        contestants = [Contestant(side, len(works)) for side in sides.values()]
        contest.take_turns(contestants, works)
    ours = [run.seconds for run in contestants[0].runs[1::2]]
    results: dict[str, Any] = {"sides": [], "ratios": {}, "absent": absent}
    for contestant in contestants:
        found = {"name": contestant.side.name, "versions": contestant.side.versions}
        results["sides"].append(found | figures(contestant.runs, options.output_len))
        if contestant is not contestants[0]:
            theirs = [run.seconds for run in contestant.runs[1::2]]
            results["ratios"][contestant.side.name] = contest.ratio(ours, theirs)
    results["steps"] = contestants[0].runs[-1].details["steps"]
    return results


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="153m", help="a shape with random weights")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128, help="at least 2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    contest.add_arguments(parser)
    parser.add_argument("--name", help="name of the result file; default: latency_MODEL_jax<version>")
    options = parser.parse_args(arguments)
    contest.check_arguments(parser, options)
    if options.output_len < 2:
        parser.error(f"--output-len is {options.output_len}; it must be at least 2, one token after the first")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and writes the result; returns the exit status."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        model = pathlib.Path(folder) / f"llama-{options.model}"
        write_checkpoint(model, SHAPES[options.model])
        results = measure(model, options)
    settings = {name: value for name, value in vars(options).items() if name not in ("name", "peer_python")}
    name = options.name or f"latency_{options.model}_jax{report.versions()['jax']}"
    path = report.write(name, settings, results)
    print(report.describe())
    columns = ("median_e2el_ms", "p99_e2el_ms", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms")
    print(
        report.table(("", *columns), [(side["name"], *(side[name] for name in columns)) for side in results["sides"]])
    )
    for peer, found in results["ratios"].items():
        print(f"speed of jaxserve over {peer}: {spread_text(found)}")
    for peer, reason in results["absent"].items():
        print(f"{peer} is absent: {reason}")
    print("per step: " + ", ".join(f"{name} {value:.3f}" for name, value in results["steps"].items()))
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
