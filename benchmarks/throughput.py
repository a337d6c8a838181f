"""Offline throughput of jaxserve alone: `python -m benchmarks.throughput`.

The work: 64 requests with prompts of 32 to 512 random ids and 16 to 256 new tokens each, greedy, end-of-sequence
ignored. Every repeat draws new ids of the same lengths, so that no prefix cache can help. The engine runs in a process
of its own with every core, and the clock starts when it is warm. For the ratio to other engines: benchmarks/compare.py.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks import report
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.sides.process import Run, start_jaxserve
from benchmarks.work import SHAPES, WORKLOADS, Work, engine_options, random_work


def summary(work: Work, runs: Sequence[Run]) -> dict[str, Any]:
    """Figures of the median repeat under vLLM's names, and what the median repeat's steps cost on the host."""
    middle = sorted(runs, key=lambda run: run.seconds)[(len(runs) - 1) // 2]
    seconds = statistics.median(run.seconds for run in runs)
    return {
        "duration": seconds,
        "durations": [run.seconds for run in runs],
        "completed": len(work.prompts),
        "total_input_tokens": work.input_tokens,
        "total_output_tokens": work.most_output_tokens,
        "request_throughput": len(work.prompts) / seconds,
        "output_throughput": work.most_output_tokens / seconds,
        "total_token_throughput": (work.input_tokens + work.most_output_tokens) / seconds,
        "best_output_throughput": work.most_output_tokens / min(run.seconds for run in runs),
        "cpu_cores": middle.cpu_seconds / middle.seconds,
        "compilations": sum(run.details["compilations"] for run in runs),
        "steps": middle.details["steps"],
    }


def measure(model: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    """Starts the engine, warms it with the same lengths and runs the repeats."""
    pages = options.max_num_seqs * options.max_model_len // 16 + 1  # nothing is ever preempted
    settings = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "dtype": "bfloat16",
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "num_pages": pages,
    } | engine_options(options.engine, options.model)

    def work(repeat: int) -> Work:
        vocab_size = SHAPES[options.model]["vocab_size"]
        return random_work(options.num_prompts, options.inputs, options.outputs, vocab_size, options.seed, repeat)

    with start_jaxserve({"options": settings}) as side:
        side.run(work(0))
        runs = []
        for repeat in range(1, options.repeats + 1):
            runs.append(side.run(work(repeat)))
            print(f"repeat {repeat}: {runs[-1].seconds:.2f} s", flush=True)
        ready = {key: value for key, value in side.ready.items() if key not in ("side", "versions")}
    return summary(work(1), runs) | {"engine": ready}


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table and writes the result; returns the exit status."""
    default = WORKLOADS["153m"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default=default.model, help="a shape with random weights")
    parser.add_argument("--num-prompts", type=int, default=default.requests)
    parser.add_argument("--inputs", type=bounds, default=default.inputs, metavar="LEAST,MOST", help="prompt tokens")
    parser.add_argument("--outputs", type=bounds, default=default.outputs, metavar="LEAST,MOST", help="new tokens")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument(
        "--engine",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="another option of LLM, e.g. token_buckets=[8,64,512]; may repeat",
    )
    parser.add_argument("--name", help="name of the result file; default: throughput_MODEL_jax<version>")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        model = pathlib.Path(folder) / f"llama-{options.model}"
        write_checkpoint(model, SHAPES[options.model])
        results = measure(model, options)
    settings = {name: value for name, value in vars(options).items() if name != "name"}
    name = options.name or f"throughput_{options.model}_jax{report.versions()['jax']}"
    path = report.write(name, settings, results)
    print(report.describe())
    fields = ("output_throughput", "total_token_throughput", "best_output_throughput", "duration", "cpu_cores")
    print(report.table(("", *fields), [("jaxserve", *(results[field] for field in fields))]))
    print("per step: " + ", ".join(f"{name} {value:.3f}" for name, value in results["steps"].items()))
    print(f"compilations in the timed repeats: {results['compilations']}")
    print(f"written: {path}")
    return 0


def bounds(text: str) -> tuple[int, int]:
    """LEAST,MOST as two whole numbers."""
    least, most = (int(part) for part in text.split(","))
    if not 1 <= least <= most:
        raise argparse.ArgumentTypeError(f"{text} is no range; give LEAST,MOST with 1 <= LEAST <= MOST")
    return least, most


if __name__ == "__main__":
    raise SystemExit(main())
