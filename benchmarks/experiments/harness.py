"""Runs an experiment: a table, a file of results and a plot for each side it ran on."""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import report
from benchmarks.experiments import experiment_plots as plots
from benchmarks.experiments.cases import THROUGHPUT, Case, Experiment, Panel
from benchmarks.experiments.run_figures import summary
from benchmarks.experiments.sides import EngineSide, Side, SimulationSide
from benchmarks.experiments.workloads import at_once
from jaxserve.telemetry.timings import request_timings

SIDES = {"simulation": SimulationSide, "engine": EngineSide}
FULL = 0.7
LIMITS: dict[str, dict[str, Any]] = {
    "engine": {"max_num_seqs": 64, "max_num_batched_tokens": 512},
    "simulation": {"max_num_seqs": 128, "max_num_batched_tokens": 2048},
}
"""Settings of a side's engine where an experiment says nothing else."""


def run(experiment: Experiment, options: argparse.Namespace) -> None:
    """Runs an experiment on the sides that were chosen; on all of its own where none was."""
    wanted = {"engine": options.engine, "simulation": options.simulate}
    for name in experiment.sides:
        if not wanted[name] and any(wanted.values()):
            continue
        if options.redraw:
            draw(experiment, name)
        else:
            side = SIDES[name]({**LIMITS[name], **experiment.limits.get(name, {})})
            present(experiment, side, run_cases(experiment, side))


def run_cases(experiment: Experiment, side: Side) -> list[dict[str, Any]]:
    """A row of figures for each case, with its name, place and series."""
    cases = experiment.cases(side.scale)
    capacities: dict[int, float] = {}
    if side.scale.name == "engine" and cases:
        side.run(dataclasses.replace(cases[0], load=None, trace=at_once(cases[0].trace.part(0, 40))))  # warms up
    rounds = experiment.engine_rounds if side.scale.name == "engine" else 1
    found = []
    for turn in range(rounds):
        found.append([_row(experiment, side, case, capacities) for case in cases])
        print(f"{side.scale.name}: round {turn + 1} of {rounds} done", flush=True)
    return [middle(rows) for rows in zip(*found, strict=True)]


def middle(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure over the rounds, and the throughput of each round."""
    if len(rows) == 1:
        return rows[0]
    row = dict(rows[0])
    for name, value in row.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            row[name] = statistics.median(found for each in rows if (found := each[name]) is not None)
    row["rounds"] = [each[THROUGHPUT.key] for each in rows]
    return row


def _row(experiment: Experiment, side: Side, case: Case, capacities: dict[int, float]) -> dict[str, Any]:
    begin = time.perf_counter()
    rate = None
    if case.load is not None:
        reference = case.reference or case.trace
        if id(reference) not in capacities:
            capacities[id(reference)] = capacity(side, dataclasses.replace(case, trace=reference))
        rate = case.load * capacities[id(reference)]
        case = dataclasses.replace(case, trace=case.trace.faster(rate / reference.rate))
    found = summary(side.run(case), experiment.ttft_target.get(side.scale.name))
    print(f"{side.scale.name}: {case.name} {case.series}: {time.perf_counter() - begin:.1f} s", flush=True)
    row = {"case": case.name, "x": case.x, "series": case.series, "load": case.load, "requests_per_second_sent": rate}
    return row | {"options": dict(case.options), **found}


def capacity(side: Side, case: Case) -> float:
    """Requests a second that the side gets through with its own settings when all are there at once.

    Taken from when FULL of the output tokens are there: later the longest requests run on alone.
    """
    run = side.run(Case("capacity", at_once(case.trace), client=case.client))
    timings = request_timings(run.events)
    times = sorted(time for each in timings for time in each.token_times)
    seconds = times[int(FULL * (len(times) - 1))] - min(each.arrived for each in timings)
    return FULL * len(timings) / seconds


def present(experiment: Experiment, side: Side, rows: list[dict[str, Any]]) -> None:
    """Prints the table and writes results/experiments/NAME_SIDE.json, .txt (the table) and .png."""
    name = f"experiments/{experiment.name}_{side.scale.name}"
    settings = {"side": side.about, "limits": dict(side.scale.limits)}
    path = report.write(name, settings, {"question": experiment.question, "cases": rows})
    print(report.describe() if side.scale.name == "engine" else side.about["model"])
    print(table(experiment, rows))
    draw(experiment, side.scale.name)
    print(f"written: {path}, .txt and .png")


def draw(experiment: Experiment, side: str) -> None:
    """Draws what results/experiments/NAME_SIDE.json holds, and writes its table beside it."""
    path = report.RESULTS / "experiments" / f"{experiment.name}_{side}.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    title = f"{experiment.question}\n{document['settings']['side']['model']}"
    text = f"{title}\n\n{table(experiment, document['results']['cases'])}\n"
    path.with_suffix(".txt").write_text(text, encoding="utf-8")
    plots.draw(experiment, document["results"]["cases"], title, path.with_suffix(".png"))


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
