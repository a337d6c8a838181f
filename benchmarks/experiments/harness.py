"""Runs an experiment: a table, a file of results and a plot for each side it ran on."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import report
from benchmarks.experiments import plots
from benchmarks.experiments.cases import Case, Experiment, Panel
from benchmarks.experiments.figures import summary
from benchmarks.experiments.sides import EngineSide, Side, SimulationSide
from benchmarks.experiments.workloads import at_once

SIDES = {"simulation": SimulationSide, "engine": EngineSide}
LIMITS: dict[str, dict[str, Any]] = {
    "engine": {"max_num_seqs": 64, "max_num_batched_tokens": 512},
    "simulation": {"max_num_seqs": 128, "max_num_batched_tokens": 2048},
}
"""Settings of a side's engine where an experiment says nothing else."""


def main(experiment: Experiment, arguments: Sequence[str] | None = None) -> int:
    """The command line of an experiment; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.experiments.{experiment.name}", description=experiment.question
    )
    add_sides(parser)
    run(experiment, parser.parse_args(arguments))
    return 0


def add_sides(parser: argparse.ArgumentParser) -> None:
    """The options that say where to run."""
    parser.add_argument("--engine", action="store_true", help="only on the engine with the default model")
    parser.add_argument("--simulate", action="store_true", help="only in simulation, an 8B model on an H200")


def run(experiment: Experiment, options: argparse.Namespace) -> None:
    """Runs an experiment on the sides that were chosen; on all of its own where none was."""
    wanted = {"engine": options.engine, "simulation": options.simulate}
    for name in experiment.sides:
        if wanted[name] or not any(wanted.values()):
            side = SIDES[name](LIMITS[name] | experiment.limits.get(name, {}))
            present(experiment, side, run_cases(experiment, side))


def run_cases(experiment: Experiment, side: Side) -> list[dict[str, Any]]:
    """A row of figures for each case, with its name, place and series."""
    cases = experiment.cases(side.scale)
    capacities: dict[int, float] = {}
    if side.scale.name == "engine" and cases:
        side.run(dataclasses.replace(cases[0], load=None, trace=at_once(cases[0].trace.part(0, 40))))  # warms up
    rows = []
    for case in cases:
        begin = time.perf_counter()
        rate = None
        if case.load is not None:
            reference = case.reference or case.trace
            if id(reference) not in capacities:
                capacities[id(reference)] = capacity(side, dataclasses.replace(case, trace=reference))
            rate = case.load * capacities[id(reference)]
            case = dataclasses.replace(case, trace=case.trace.faster(rate / reference.rate))
        found = side.run(case)
        row = {
            "case": case.name,
            "x": case.x,
            "series": case.series,
            "load": case.load,
            "requests_per_second_sent": rate,
        }
        row |= {"options": dict(case.options), **summary(found, experiment.ttft_target.get(side.scale.name))}
        rows.append(row)
        print(f"{side.scale.name}: {case.name} {case.series}: {time.perf_counter() - begin:.1f} s", flush=True)
    return rows


def capacity(side: Side, case: Case) -> float:
    """Requests a second that the side gets through with its own settings when all are there at once."""
    plain = Case("capacity", at_once(case.trace), client=case.client)
    return summary(side.run(plain))["requests_per_second"]


def present(experiment: Experiment, side: Side, rows: list[dict[str, Any]]) -> None:
    """Prints the table and writes results/experiments/NAME_SIDE.json and .png."""
    name = f"experiments/{experiment.name}_{side.scale.name}"
    settings = {"side": side.about, "limits": dict(side.scale.limits)}
    path = report.write(name, settings, {"question": experiment.question, "cases": rows})
    print(report.describe() if side.scale.name == "engine" else side.about["model"])
    print(table(experiment, rows))
    title = f"{experiment.question}\n{side.about['model']}"
    plots.draw(experiment, rows, title, report.RESULTS / f"{name}.png")
    print(f"written: {path} and .png")


def table(experiment: Experiment, rows: Sequence[dict[str, Any]]) -> str:
    """The columns of the experiment; below, where it wants them, the latencies of each tenant."""
    columns = [panel for panel in experiment.columns if any(row.get(panel.key) is not None for row in rows)]
    lines = [report.table(("case", *(panel.column for panel in columns)), [_cells(row, columns) for row in rows])]
    if experiment.by_tenant:
        inner = [panel for panel in columns if panel.key.partition("_")[0] in ("queue", "ttft", "tpot", "itl", "e2e")]
        names = dict.fromkeys(key.removesuffix(".requests") for row in rows for key in row if key.endswith(".requests"))
        mine = [_cells(row, inner, name) for row in rows for name in names if f"{name}.requests" in row]
        lines += ["", report.table(("case, tenant", *(panel.column for panel in inner)), mine)]
    return "\n".join(lines)


def _cells(row: dict[str, Any], columns: Sequence[Panel], tenant: str = "") -> list[Any]:
    name = ", ".join(filter(None, (row["case"], row["series"] * (row["series"] != row["case"]), tenant)))
    values = [row.get(f"{tenant}.{panel.key}" if tenant else panel.key) for panel in columns]
    return [
        name,
        *("-" if value is None else value * panel.factor for value, panel in zip(values, columns, strict=True)),
    ]
