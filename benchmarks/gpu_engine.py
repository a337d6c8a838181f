"""The whole engine on a GPU, beside its simulation: `python -m benchmarks.gpu_engine --config llama.gin --output DIR`.

Starts the engine once, with random weights where the configuration says `EngineConfig.load_format = 'dummy'`, and then

1. `start`: seconds of each phase; what the allocator has in use beside what was planned;
2. `costs`: times of steps of every bucket, as a file for `python -m jaxserve.simulate --model-cost`, and how far the
   roofline of `--target`, which needs no device, is from them;
3. `check`: traces in real time beside their simulation, with costs fitted to the steps of part 2 (none of which is of
   these traces) and with the roofline;
4. `modes`: the batching modes on ten lengths, many times over;
5. `chunked`: long prompts, whole and in chunks, beside requests that decode.

Each part's results are written when it ends. `--seconds` bounds the time: a part that would begin later is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import report
from benchmarks.experiments.batching import MODES
from benchmarks.experiments.cases import Case
from benchmarks.experiments.run_figures import summary
from benchmarks.experiments.sides import EngineSide
from benchmarks.experiments.simulation_check import FIGURES, figures
from benchmarks.experiments.workloads import beside_decodes, ten_requests
from benchmarks.step_costs import MeteredRunner, StepMeter, describe, drive, sweep
from jaxserve.config import gin_config
from jaxserve.config.settings import EngineConfig
from jaxserve.engine.core import EngineCore
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.simulator import (
    ClientRule,
    CostModel,
    FittedCosts,
    HostCosts,
    SimulatedDevice,
    StepTime,
    SyntheticConfig,
    simulate,
    synthetic_trace,
    with_options,
    write_costs,
)
from jaxserve.simulator.replay import replay
from jaxserve.simulator.setup import find_target, set_up
from jaxserve.simulator.simulation import fitting

WORKLOADS = {
    "chat, Poisson": "prompt=64-1024,output=64-256,rate=16",
    "long prompts, bursts": "prompt=2048-6144,output=16-64,arrivals=gamma,burstiness=0.4,rate=3",
    "long outputs, all at once": "prompt=32-256,output=128-512,arrivals=at_once",
}
"""Synthetic traces by name, about half of what the roofline of an H200 says that it serves."""

CHECKED_POLICY = "fcfs"


class Bench:
    """The engine under test and where its results go."""

    def __init__(self, options: argparse.Namespace, config: EngineConfig):
        self.options, self.config = options, config
        self._begin = time.perf_counter()
        self.results: dict[str, Any] = {}
        self.runner = ModelRunner(config, progress=True)
        info = self.runner.info
        self.device = SimulatedDevice(info.num_pages, info.max_model_len, info.platform, info.num_host_pages)
        self.steps: list[StepTime] = []
        self.host = HostCosts()

    def part(self, name: str, measure: Callable[[], Any], seconds: float) -> None:
        """Runs a part that takes about so many seconds, where there is time, and writes what it found."""
        spent = time.perf_counter() - self._begin
        if spent + seconds > self.options.seconds:
            self.results[name] = f"not run: {spent:.0f} of {self.options.seconds:.0f} s were spent"
        else:
            try:
                self.results[name] = measure()
            except Exception as error:  # the other parts need not suffer
                traceback.print_exc()
                self.results[name] = f"failed: {type(error).__name__}: {error}"
        print(f"{name}: {time.perf_counter() - self._begin - spent:.1f} s", flush=True)
        self._write()

    def _write(self) -> None:
        devices = jax.devices()
        settings = {"config": self.options.config, "gin": self.options.gin, "seed": self.options.seed}
        document = report.document("gpu_engine", settings, self.results)
        document["machine"] |= {"device": devices[0].device_kind, "devices": len(devices)}
        path = self.options.output / "gpu_engine.json"
        path.write_text(json.dumps(document, indent=1, default=float) + "\n", encoding="utf-8")

    # ------------------------------------------------------------------------------------------------------- parts

    def start(self) -> dict[str, Any]:
        """StartupSpans in seconds, the plan's parts and the allocator's figures in bytes."""
        stats = jax.devices()[0].memory_stats() or {}
        info = self.runner.info
        return {
            "phases": {name: seconds for name, _, seconds in info.phases},
            "plan": dict(info.memory),
            "allocator": stats,
            "pages": info.num_pages,
            "programs": len(self.runner.programs.executables),
            "from_cache": self.runner.programs.num_cached,
        }

    def costs(self) -> dict[str, Any]:
        """Measures steps, writes them for the simulator and compares the roofline with them."""
        metered = MeteredRunner(self.runner)
        core = EngineCore(self.config, metered)
        batches = sweep(self.config, min(self.options.longest, self.runner.info.max_model_len), 12, self.options.seed)
        drive(core, batches[::8], self.options.seed, "warm-up")
        metered.shapes.clear()
        meter = StepMeter(core.recorder, metered)
        drive(core, batches, self.options.seed)
        self.steps, self.host = meter.steps(), meter.host()
        fitted = self.fitted()
        about = {"machine": report.machine(), "versions": report.versions(), "config": self.options.config}
        write_costs(self.options.output / "costs.json", self.steps, name=self.name, host=self.host, about=about)
        return {
            "steps": len(self.steps),
            "fit_error": fitted.error,
            "host": dataclasses.asdict(self.host),
            "by_bucket": by_bucket(self.steps, {"fitted": fitted, "roofline": self.roofline()}),
        }

    def check(self) -> list[dict[str, Any]]:
        """Each workload's figures on the engine, and the simulations' ratios to them; or why it was left out."""
        client = ClientRule.parse("1024")
        models = {"fitted": self.fitted(), "roofline": self.roofline()}
        config = with_options(self.config, {"policy": CHECKED_POLICY})
        rows = []
        for name, text in WORKLOADS.items():
            trace = synthetic_trace(SyntheticConfig.parse(f"count={self.options.requests},seed=1,{text}"))
            if not len(fitting(config, trace, self.device, client)[0]):
                reason = f"none of its requests fits: max_model_len {self.device.max_model_len}"
                rows.append({"workload": name, "left_out": reason})
                print(f"{name}: left out, {reason}", flush=True)
                continue
            seen = figures([replay(config, self.runner, trace, client=client)])
            told = {
                which: figures([simulate(config, trace, costs, self.device, client=client)])
                for which, costs in models.items()
            }
            ratios = {which: {key: each[key] / seen[key] for key in FIGURES} for which, each in told.items()}
            rows.append({"workload": name, "engine": seen, "ratio": ratios})
            print(name, seen, ratios, flush=True)
        return rows

    def modes(self) -> list[dict[str, Any]]:
        """The modes on ten lengths, all requests there at once."""
        side = EngineSide({"max_num_seqs": 16}, self.runner, config=self.config)
        trace = ten_requests(12, 256, 2)
        side.run(Case("warm-up", trace.part(0, 30)))
        return self._cases(
            side, [Case(name, trace, options=options) for name, options in MODES.items() if name != "none"]
        )

    def chunked(self) -> list[dict[str, Any]]:
        """One long prompt after another beside 64 requests that decode."""
        side = EngineSide({}, self.runner, config=self.config)
        found = []
        for length in self.options.prompts:
            trace = beside_decodes(64, 300, length, [0.0] * 10)
            found.append(Case(f"{length} whole", trace, options={"enable_chunked_prefill": False}))
            found += [
                Case(f"{length}, steps of {chunk}", trace, options={"max_num_batched_tokens": chunk})
                for chunk in (512, 2048)
            ]
        return self._cases(side, found)

    # ----------------------------------------------------------------------------------------------------- helpers

    def _cases(self, side: EngineSide, cases: Sequence[Case]) -> list[dict[str, Any]]:
        rows = []
        for case in cases:
            rows.append({"case": case.name, **summary(side.run(case))})
            shown = (
                "output_tokens_per_second",
                "ttft_mean",
                "itl_p99",
                "e2e_p99",
                "decoding.itl_p99",
                "decoding.itl_max",
            )
            print(case.name, {key: rows[-1][key] for key in shown if key in rows[-1]}, flush=True)
        return rows

    @property
    def name(self) -> str:
        return describe(self.runner.info)

    def fitted(self) -> FittedCosts:
        return FittedCosts.fit(self.steps, name=self.name, host=self.host)

    def roofline(self) -> CostModel:
        return set_up(self.config, target=find_target(self.options.target), host=self.host).costs


def by_bucket(steps: Sequence[StepTime], models: dict[str, CostModel]) -> list[dict[str, Any]]:
    """Median milliseconds of single steps by bucket, and each model's median ratio to them."""
    groups: dict[tuple[str, int, int], list[StepTime]] = {}
    for step in steps:
        if len(step.shapes) == 1:
            shape = step.shapes[0]
            kind = "decode" if not shape.prefill_tokens else "mixed" if shape.decode_rows else "prefill"
            size = shape.row_bucket if kind == "decode" else shape.token_bucket
            context = 0 if kind != "decode" else 2 ** round(math.log2(max(1, shape.decode_context / shape.decode_rows)))
            groups.setdefault((kind, size, context), []).append(step)
    return [
        {
            "kind": kind, "bucket": size, "context": context, "steps": len(found),
            "ms": 1e3 * statistics.median(step.seconds for step in found),
            **{
                name: float(np.median([model.seconds(step.shapes[0]) / step.seconds for step in found]))
                for name, model in models.items()
            },
        }
        for (kind, size, context), found in sorted(groups.items())
    ]  # fmt: skip


def main() -> int:
    """Runs the parts; returns 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, required=True, metavar="DIR")
    parser.add_argument("--target", default="h200", help="whose roofline is compared (default h200)")
    parser.add_argument("--seconds", type=float, default=300.0, help="for everything (default 300)")
    parser.add_argument("--requests", type=int, default=120, help="of each trace of part 3 (default 120)")
    parser.add_argument("--longest", type=int, default=2048, help="tokens of the longest sequence of part 2")
    parser.add_argument("--prompts", type=int, nargs="+", default=[2000, 8000], help="long prompts of part 5")
    parser.add_argument("--seed", type=int, default=0)
    options, server, gin = gin_config.load_from_command_line(parser)
    options.gin = str(gin)
    options.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(options, server.engine)
    bench.part("start", bench.start, 0)
    bench.part("costs", bench.costs, 60)
    bench.part("check", bench.check, 45)
    bench.part("modes", bench.modes, 35)
    bench.part("chunked", bench.chunked, 35)
    print(json.dumps(bench.results["start"], default=float))
    for row in bench.results["costs"]["by_bucket"] if isinstance(bench.results["costs"], dict) else ():
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()})
    failed = [name for name, found in bench.results.items() if isinstance(found, str)]
    return report.fail(f"{', '.join(failed)}: {bench.results[failed[0]]}") if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
