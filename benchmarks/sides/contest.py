"""What comparisons have in common: the engines that are started, the turns they take, the ratio of their times."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.sides.side_process import PEERS, Run, Side, SideError, installed_peers, start_jaxserve, start_peer
from benchmarks.spread import spread
from benchmarks.work import SHAPES, Work, engine_options

IDLE_CORES = 0.05
"""More CPU than this, in cores, that waiting engines took while another was timed makes a ratio doubtful."""


@dataclasses.dataclass
class Contestant:
    """One engine in a comparison and its runs of the workload at hand. rounds: those that it takes part in."""

    side: Side
    rounds: int
    runs: list[Run] = dataclasses.field(default_factory=list)
    idle_cores: list[float] = dataclasses.field(default_factory=list)


def take_turns(contestants: Sequence[Contestant], works: Sequence[Work]) -> None:
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


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
    """How many times as fast as a peer: seconds of both in each round that the peer took part in -> the spread."""
    return spread([their / our for our, their in zip(ours, theirs, strict=False)])


@contextlib.contextmanager
def started(
    model: pathlib.Path,
    shape: str,
    max_num_seqs: int,
    options: argparse.Namespace,
    peers: Sequence[str],
    absent: dict[str, str],
) -> Iterator[dict[str, Side]]:
    """Every engine with a model, by name, jaxserve first; a peer that cannot start joins `absent` with its reason.

    max_num_seqs: requests that run at once; jaxserve has pages for all of them, so that it never preempts.
    """
    common = {"model": str(model), "dtype": "bfloat16", "max_model_len": options.max_model_len}
    with contextlib.ExitStack() as stack:
        settings = engine_options(options.engine, shape)
        pages = max_num_seqs * -(-options.max_model_len // settings.get("page_size", 16)) + 1
        base = {"skip_tokenizer_init": True, "max_num_seqs": max_num_seqs, "num_pages": pages}
        sides = {"jaxserve": stack.enter_context(start_jaxserve({"options": base | common | settings}))}
        for peer in peers:
            extra = {"max_num_seqs": max_num_seqs} if peer == "transformers" else options.vllm_options
            try:
                sides[peer] = stack.enter_context(start_peer(peer, options.peer_python, common | extra))
            except SideError as error:
                absent[peer] = str(error)
        yield sides


def find_peers(options: argparse.Namespace) -> tuple[list[str], dict[str, str]]:
    """The peers that will run, and why each other one will not."""
    try:
        installed = installed_peers(options.peer_python)
    except (OSError, subprocess.CalledProcessError) as error:
        return [], dict.fromkeys(PEERS, f"--peer-python does not run ({type(error).__name__})")
    absent = {peer: "not installed" for peer in PEERS if peer not in installed}
    absent |= {peer: "not asked for" for peer in PEERS if peer in installed and peer not in options.peers}
    return [peer for peer in PEERS if peer not in absent], absent


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command line that say what engines run and how."""
    parser.add_argument(
        "--peer-python", default=sys.executable, help="the Python that has the peers; default: this one"
    )
    parser.add_argument("--peers", type=lambda text: text.split(","), default=list(PEERS), help="default: all")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument(
        "--engine",
        action="append",
        default=[],
        metavar="[MODEL:]NAME=JSON",
        help="an option of jaxserve's LLM, e.g. 153m:max_num_batched_tokens=256; may repeat",
    )
    parser.add_argument("--vllm-options", type=json.loads, default={}, metavar="JSON", help="for vllm.LLM")


def check_arguments(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the process with one line where an option that `add_arguments` added is faulty."""
    if unknown := set(options.peers) - {*PEERS, "none"}:
        parser.error(f"--peers names {', '.join(sorted(unknown))}; it takes {', '.join(PEERS)} or none")
    try:
        for shape in SHAPES:
            engine_options(options.engine, shape)
    except ValueError as error:
        parser.error(str(error))
