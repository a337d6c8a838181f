"""The simulation against the engine it simulates: `python -m benchmarks.experiments.simulation_check`.

The default model serves three workloads under two policies in real time, in interleaved rounds; the same traces are
simulated with costs fitted to the steps of all those runs together. For each of throughput, mean TTFT and mean TPOT the
table has the engine's over all rounds and the ratio of the simulation to it: of the same trace, the median over the
rounds, since a round in which the machine stood still for a moment says nothing of the simulation. Prints a table and
writes JSON; exit status 1 where a ratio is further off than the project promises.

What is checked is all but the time of a step: queues, batches, chunks, pages, policies, the loop with a step in flight.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import report
from benchmarks.spread import spread
from benchmarks.step_costs import MeteredRunner, StepMeter
from jaxserve.config import gin_config
from jaxserve.config.settings import EngineConfig
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.simulator import (
    ClientRule,
    FittedCosts,
    HostCosts,
    SimulatedDevice,
    SimulationResult,
    StepTime,
    SyntheticConfig,
    simulate,
    synthetic_trace,
    with_options,
)
from jaxserve.simulator.replay import replay
from jaxserve.telemetry.recorder import Recorder

PROMISED = 0.10
FIGURES = ("throughput", "ttft", "tpot")


WORKLOADS = {
    "chat, Poisson": "prompt=16-256,output=16-128,rate=12",
    "long prompts, bursts": "prompt=256-1024,output=8-48,arrivals=gamma,burstiness=0.4,rate=3",
    "long outputs, all at once": "prompt=8-64,output=32-256,arrivals=at_once,count=128",
}
"""Synthetic traces by name; the rates are about half of what two cores serve."""


def figures(results: Sequence[SimulationResult]) -> dict[str, float]:
    """Output tokens a second, and means in seconds over all requests of all rounds."""
    joined = {
        name: np.concatenate([getattr(each, name)[each.completed] for each in results]) for name in ("ttft", "tpot")
    }
    tokens = sum(int(each.output_tokens.sum()) for each in results)
    return {
        "throughput": tokens / sum(each.seconds for each in results),
        "ttft": float(joined["ttft"].mean()),
        "tpot": float(np.nanmean(joined["tpot"])),
    }


def run(
    config: EngineConfig, policies: Sequence[str], rounds: int, count: int, seed: int, client: ClientRule
) -> tuple[list[dict[str, Any]], FittedCosts, int]:
    """Every workload under every policy: figures of the engine and of the simulation."""
    runner = ModelRunner(config)
    cells = list(itertools.product(WORKLOADS, policies))
    steps: list[StepTime] = []
    hosts: list[HostCosts] = []
    served: dict[tuple[str, str], list[SimulationResult]] = {cell: [] for cell in cells}
    traces = {
        (workload, turn): synthetic_trace(SyntheticConfig.parse(f"count={count},seed={seed + turn},{text}"))
        for workload, text in WORKLOADS.items()
        for turn in range(rounds)
    }
    replay(config, runner, traces["chat, Poisson", 0], client=client)  # warms up
    for turn in range(rounds):
        for workload, policy in cells if turn % 2 else reversed(cells):
            metered, recorder = MeteredRunner(runner), Recorder()
            meter = StepMeter(recorder, metered)
            chosen = with_options(config, {"policy": policy})
            trace = traces[workload, turn]
            served[workload, policy].append(replay(chosen, metered, trace, client=client, seed=turn, recorder=recorder))
            steps += meter.steps()
            hosts.append(meter.host())
    host = HostCosts(
        before=float(np.median([each.before for each in hosts])), after=float(np.median([each.after for each in hosts]))
    )
    costs = FittedCosts.fit(steps, name="the default model, measured in this run", host=host)
    info = runner.info
    device = SimulatedDevice(info.num_pages, info.max_model_len, info.platform, info.num_host_pages)
    rows = []
    for workload, policy in cells:
        chosen = with_options(config, {"policy": policy})
        simulated = [simulate(chosen, traces[workload, turn], costs, device, client=client) for turn in range(rounds)]
        pairs = [
            (figures([one]), figures([other])) for one, other in zip(served[workload, policy], simulated, strict=True)
        ]
        rows.append(
            {
                "workload": workload,
                "policy": policy,
                "requests": sum(len(each.trace) for each in served[workload, policy]),
                "engine": figures(served[workload, policy]),
                "simulation": figures(simulated),
                "engine_rounds": [seen for seen, _ in pairs],
                "simulation_rounds": [told for _, told in pairs],
                "ratio": {name: spread([told[name] / seen[name] for seen, told in pairs]) for name in FIGURES},
            }
        )
    return rows, costs, len(steps)


def main() -> int:
    """Prints the table and writes the result; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", default=["fcfs", "sjf"])
    parser.add_argument("--rounds", type=int, default=3, help="of every workload and policy (default 3)")
    parser.add_argument(
        "--requests", type=int, default=64, help="of a workload in a round where it does not say (default 64)"
    )
    parser.add_argument("--client-max-tokens", default="256", help="what clients set as max_tokens (default 256)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", help="name of the result file; default: simulation_check_jax<version>")
    options, server, _ = gin_config.load_from_command_line(parser)
    client = ClientRule.parse(options.client_max_tokens)
    rows, costs, count = run(server.engine, options.policies, options.rounds, options.requests, options.seed, client)
    settings = {
        "rounds": options.rounds,
        "requests": options.requests,
        "workloads": WORKLOADS,
        "client_max_tokens": options.client_max_tokens,
        "seed": options.seed,
        "measured_steps": count,
        "fit_error": costs.error,
        "host": dataclasses.asdict(costs.host),
    }
    name = options.name or f"simulation_check_jax{report.versions()['jax']}"
    path = report.write(name, settings, rows)
    print(report.describe())
    print(f"costs fitted to {count} steps; mean error of a step {100 * costs.error:.1f} % of the mean step")
    header = (
        "workload, policy",
        *(f"{name} {side}" for name in FIGURES for side in ("engine", "ratio", "of rounds")),
    )
    print("throughput in output tokens a second, times in ms")
    print(report.table(header, [_row(row) for row in rows]))
    print(f"written: {path}")
    worst = max(abs(row["ratio"][name]["median"] - 1) for row in rows for name in FIGURES)
    return 0 if worst <= PROMISED else report.fail(f"a figure of the simulation is {100 * worst:.1f} % off")


def _row(row: dict[str, Any]) -> tuple[Any, ...]:
    cells: list[Any] = [f"{row['workload']}, {row['policy']}"]
    for name in FIGURES:
        unit = 1.0 if name == "throughput" else 1e3
        ratio = row["ratio"][name]
        cells += [row["engine"][name] * unit, ratio["median"], f"{ratio['min']:.2f} to {ratio['max']:.2f}"]
    return tuple(cells)


if __name__ == "__main__":
    raise SystemExit(main())
