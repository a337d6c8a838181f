"""The engine's own cost of a step: `python -m benchmarks.host_overhead`.

An engine over a runner that packs every step into the real vectors and computes nothing: its ids come from a table. The
parts of a step are those of benchmarks/host_step.py.

Cases: `steady`, every request decodes from the first step measured to the last; `mixed`, requests end and others join
all the time; `queue`, the same with 4,000 requests waiting. A profile shows where the time goes, as its own run.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import gc
import io
import pstats
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.host_step import PARTS, HostMeter, by_part, send
from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.messages import AddRequest, outputs
from jaxserve.kv_cache.page_copy import PageCopy
from jaxserve.models.config import ModelConfig
from jaxserve.request import EngineRequest
from jaxserve.runner.packing import ForwardPacker, SamplePacker
from jaxserve.runner.protocol import PageCopies, RunnerInfo
from jaxserve.scheduler.buckets import Buckets
from jaxserve.scheduler.plan import StepPlan, StepResult

VOCAB = 32_000
PAGE_SIZE = 16
QUEUE = 4_000
MODEL = ModelConfig("LlamaForCausalLM", VOCAB, 8, 8, 1, 1, 1, 8, 4096)


@dataclasses.dataclass(frozen=True)
class Case:
    """prompt, new_tokens: ranges (low, high) of the lengths, high excluded. queue: requests kept waiting."""

    name: str
    prompt: tuple[int, int]
    new_tokens: tuple[int, int]
    queue: int


class PackingRunner:
    """Runner protocol: packs, and answers with random ids."""

    def __init__(self, buckets: Buckets, num_slots: int, num_pages: int):
        self.info = RunnerInfo(
            vocab_size=VOCAB, max_model_len=MODEL.max_position_embeddings, eos_token_ids=(2,), page_size=PAGE_SIZE,
            num_pages=num_pages, num_parameters=0, architecture="none", dtype="none", platform="none",
            attention="none", num_executables=0, compile_seconds=0.0, kv_cache="none",
        )  # fmt: skip
        self.step_costs = self.disk = None
        self.pack_seconds = 0.0
        self.num_compilations = self.compile_misses = self.num_executables = 0
        self._forward = {
            size: ForwardPacker(size, buckets.rows_of(size), PAGE_SIZE, num_slots) for size in buckets.tokens
        }
        self._sample = {size: SamplePacker(size, num_slots) for size in buckets.rows}
        self._ids = np.random.default_rng(0).integers(3, VOCAB, (64, num_slots), np.int32)

    def close(self, copies: Sequence[PageCopy] = ()) -> None:
        pass

    def page_copies(self) -> dict[str, PageCopies]:
        return {}

    def shared_reads(self) -> dict[str, int]:
        return {}

    def fitted(self, plan: StepPlan) -> StepPlan:
        return plan

    def dispatch_forward(self, plan: StepPlan) -> np.ndarray:
        self._forward[plan.token_bucket].pack(plan)
        if plan.row_bucket:
            self._sample[plan.row_bucket].pack(plan)
        return self._ids[plan.step % len(self._ids), : plan.num_sampled]

    def dispatch_sample(self, plan: StepPlan, masks: np.ndarray | None = None) -> None:
        pass  # packed with the forward program's vector

    def done(self, pending: np.ndarray) -> bool:
        return False

    def reset(self) -> None:
        pass

    def collect(self, pending: np.ndarray) -> StepResult:
        return StepResult(pending)


class Source:
    """Requests of a case, made beforehand: making one is the client's work."""

    def __init__(self, case: Case, count: int, seed: int):
        rng = np.random.default_rng(seed)
        self._requests = [
            EngineRequest(
                f"{seed:08x}-{number:023x}",  # as long as a UUID in hexadecimal
                tuple(rng.integers(3, VOCAB, rng.integers(*case.prompt)).tolist()),
                max_tokens=int(rng.integers(*case.new_tokens)),
                temperature=1.0,
                seed=number,
                stop_token_ids=(2,),
            )
            for number in range(count)
        ]
        self._next = 0

    def add(self, core: EngineCore, count: int) -> None:
        for request in self._requests[self._next : self._next + count]:
            core.handle(AddRequest(request))
        self._next += count
        assert self._next <= len(self._requests), "the case ran out of requests"


def make_core(running: int, num_pages: int | None = None, *, caching: bool = True) -> EngineCore:
    """An engine for `running` sequences at once, by default with pages for all. caching: of prefixes."""
    num_pages = num_pages or running * MODEL.max_position_embeddings // PAGE_SIZE + 1
    config = EngineConfig(
        architecture=MODEL,
        load_format="dummy",
        scheduler=SchedulerConfig(max_num_seqs=running, max_num_batched_tokens=max(512, 2 * running)),
        cache=CacheConfig(page_size=PAGE_SIZE, num_pages=num_pages, enable_prefix_caching=caching),
    )
    return EngineCore(config, PackingRunner(Buckets.from_config(config, "cpu"), running, num_pages))


class FullEngine:
    """An engine that is kept full: a request joins for each that ends. It is filled and has settled when it is made.

    steps: how many will follow, at most.
    """

    def __init__(self, core: EngineCore, case: Case, running: int, steps: int):
        self.core = core
        self._wanted = running + case.queue
        settle = 4 * case.prompt[1] * running // core.config.scheduler.max_num_batched_tokens + 64
        shortest = case.new_tokens[0] + 1
        self._source = Source(case, self._wanted + (settle + steps) * running // shortest, seed=1)
        for _ in range(settle):
            self.refill()
            core.step()

    def refill(self) -> None:
        """Adds the requests that are missing before the next step."""
        missing = self._wanted - self.core.scheduler.num_running - self.core.scheduler.num_waiting
        self._source.add(self.core, max(0, missing))


def run(core: EngineCore, case: Case, running: int, steps: int, each: Callable[[EngineCore], Any]) -> list[Any]:
    """Fills the engine, lets it settle, then calls `each` for every step, adding a request for each that ends."""
    engine = FullEngine(core, case, running, steps)
    gc.collect()
    gc.freeze()  # what was made beforehand is the clients'
    results = []
    for _ in range(steps):
        engine.refill()
        results.append(each(core))
    gc.unfreeze()
    return results


def measure(case: Case, running: int, steps: int) -> dict[str, Any]:
    """Microseconds of each part and of all, and what the steps did."""
    core = make_core(running)
    with HostMeter() as meter:
        turns = run(core, case, running, steps, meter.step)
    core.check_integrity()
    ended = sum(one.finish_reason is not None for _, made in turns for message in made for one in outputs(message))
    return {
        "case": case.name,
        "running": running,
        "steps": steps,
        "ended_per_step": ended / steps,
        "waiting": core.scheduler.num_waiting,
        "microseconds": by_part([spent for spent, _ in turns]),
    }


def profile(case: Case, running: int, steps: int, lines: int) -> list[str]:
    """The functions that take most time of their own, of a run under cProfile (which makes calls dearer)."""
    profiler = cProfile.Profile()

    def each(core: EngineCore) -> None:
        profiler.enable()
        send(core.step())
        profiler.disable()

    run(make_core(running), case, running, steps, each)
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).strip_dirs().sort_stats("tottime").print_stats(lines)
    table = [line for line in text.getvalue().splitlines() if line.strip()]
    return [f"{case.name}, {running} running, {steps} steps"] + table[table.index(_first(table, "   ncalls")) :]


def _first(lines: list[str], start: str) -> str:
    return next(line for line in lines if line.startswith(start))


def main() -> int:
    """Prints the table and the profiles and writes the result; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--running", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--steps", type=int, default=1000, help="at most 2,500")
    parser.add_argument("--profile-lines", type=int, default=20)
    parser.add_argument("--name", help="name of the result file; default: host_overhead_jax<version>")
    options = parser.parse_args()
    steps = options.steps
    cases = (
        Case("steady", (32, 33), (3000, 3001), 0),
        Case("mixed", (16, 257), (16, 257), 0),
        Case("queue", (16, 257), (16, 257), QUEUE),
    )
    results = [measure(case, running, steps) for case in cases for running in options.running]
    profiles = [profile(case, max(options.running), steps // 2, options.profile_lines) for case in cases[:2]]
    name = options.name or f"host_overhead_jax{report.versions()['jax']}"
    settings = {"running": options.running, "steps": steps, "page_size": PAGE_SIZE, "vocab_size": VOCAB}
    path = report.write(name, settings, {"cases": results, "profiles": profiles})
    print(report.describe())
    rows = [
        (f"{result['case']}, {result['running']}", result["ended_per_step"])
        + tuple(
            f"{result['microseconds'][part]['mean']:.0f} / {result['microseconds'][part]['p50']:.0f} / "
            f"{result['microseconds'][part]['p99']:.0f}"
            for part in (*PARTS, "all")
        )
        for result in results
    ]
    print("microseconds a step: mean / p50 / p99")
    print(report.table(("case, running", "ended", *PARTS, "all"), rows))
    for lines in profiles:
        print("\n" + "\n".join(lines))
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
