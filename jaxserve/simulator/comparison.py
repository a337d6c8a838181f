"""Simulates several configurations over one trace and compares them: the body of `jaxserve.simulate`."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxserve.config.checks import did_you_mean
from jaxserve.config.settings import EngineConfig
from jaxserve.simulator import simulation_plots as plots
from jaxserve.simulator.cache_replay import infinite_cache
from jaxserve.simulator.capacity import Capacity, parts_of, search_capacity
from jaxserve.simulator.command import assignments, literal, load_setup, load_trace, parts
from jaxserve.simulator.fleet import FleetConfig, FleetResult, simulate_fleet
from jaxserve.simulator.setup import Setup, option_names, with_options
from jaxserve.simulator.simulation import ClientRule, fitting
from jaxserve.simulator.simulation_report import Slo, report, table
from jaxserve.simulator.traces import Trace

FLEET_OPTIONS = {field.name for field in dataclasses.fields(FleetConfig)}


@dataclasses.dataclass(frozen=True)
class Run:
    """Holds one of the compared configurations."""

    name: str
    setup: Setup
    fleet: FleetConfig


def run_comparison(parsed: argparse.Namespace, config: EngineConfig) -> None:
    """Simulates, prints and writes as the command line requests.

    Raises:
        ValueError: an argument, the trace or the file of costs is faulty.
        OSError: a file cannot be read or written.
    """
    trace = load_trace(parsed)
    slo, client = Slo.parse(parsed.slo), ClientRule.parse(parsed.client_max_tokens)
    if parsed.capacity is not None and slo == Slo():
        raise ValueError("--capacity needs targets to keep: give --slo, such as --slo ttft=0.5,tpot=0.05")
    runs = list(make_runs(parsed, config))
    if not runs:
        raise ValueError("--compare leaves nothing to simulate")
    print(describe(trace, runs))
    serve = simulations if parsed.capacity is None else capacities
    document = serve(parsed, runs, trace, slo, client)
    if parsed.json is not None:
        parsed.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def compared(given: Sequence[Sequence[str]], known: set[str]) -> dict[str, list[Any]]:
    """Returns the values to try by option.

    Raises ValueError for an option that is unknown, or stands or has a value twice.
    """
    varied: dict[str, list[Any]] = {}
    for item in itertools.chain.from_iterable(given):
        name, equals, text = item.partition("=")
        if not equals or not text:
            raise ValueError(f"--compare {item!r}: it must be NAME=VALUE,VALUE,...")
        if name not in known:
            raise ValueError(f"--compare {name!r} is unknown; {did_you_mean(name, known)}")
        if name in varied:
            raise ValueError(f"--compare has {name!r} twice; give its values together, as {name}=VALUE,VALUE,...")
        values = [literal(part) for part in parts(text)]
        if twice := [value for place, value in enumerate(values) if value in values[:place]]:
            raise ValueError(f"--compare {item!r} has the value {twice[0]!r} twice; give it once")
        varied[name] = values
    return varied


def make_runs(parsed: argparse.Namespace, config: EngineConfig) -> Iterator[Run]:
    """Yields all combinations of the --compare options, except those that the configuration refuses, which are
    reported.

    A run's name lists the options in which the runs differ.
    """
    base = {"replicas": parsed.replicas, "routing": parsed.routing, "scaling": parsed.scaling}
    base |= assignments("fleet", parsed.fleet)
    unknown = set(base) - FLEET_OPTIONS
    if unknown:
        raise ValueError(f"--fleet has {', '.join(unknown)}; known are {', '.join(sorted(FLEET_OPTIONS))}")
    varied = compared(parsed.compare, option_names(config) | FLEET_OPTIONS)
    several = {name for name, values in varied.items() if len(values) > 1}
    for chosen in itertools.product(*([(name, value) for value in values] for name, values in varied.items())):
        options = {name: value for name, value in chosen if name not in FLEET_OPTIONS}
        fleet = base | {name: value for name, value in chosen if name in FLEET_OPTIONS}
        told = [f"{name}={value}" for name, value in chosen if name in several or not several]
        name = ", ".join(told) or "as configured"
        try:
            changed = with_options(config, options)
        except ValueError as error:
            if not several:
                raise
            print(f"{name}: left out, {error}", file=sys.stderr)
            continue
        yield Run(name, load_setup(parsed, changed), FleetConfig(**fleet))


def describe(trace: Trace, runs: Sequence[Run]) -> str:
    """Describes the simulation in two lines, or three where prompts have content."""
    first = runs[0].setup
    page_size = first.config.cache.page_size
    sessions = f" of {trace.num_sessions:,} sessions" if trace.has_turns else ""
    lines = [
        f"{trace.name}: {len(trace):,} requests{sessions} in {trace.seconds:,.1f} s ({trace.rate:.3g}/s), prompts of "
        f"{trace.prompt_tokens.mean():,.0f} tokens on average, outputs of {trace.output_tokens.mean():,.0f}"
    ]
    if trace.prompts:
        share = infinite_cache(trace, page_size).hit_rate
        lines.append(f"a prefix cache without end would find {100 * share:.2f} % of the prompt tokens")
    lines.append(f"{first.costs.name}; {first.device.num_pages - 1:,} pages of {page_size} tokens")
    return "\n".join(lines)


def simulations(
    parsed: argparse.Namespace, runs: Sequence[Run], trace: Trace, slo: Slo, client: ClientRule
) -> dict[str, Any]:
    fleets: dict[str, FleetResult] = {}
    for run in runs:
        begin = time.perf_counter()
        with tqdm(total=len(trace), desc=run.name, unit="request", file=sys.stderr, mininterval=0.5) as bar:
            fleets[run.name] = simulate_fleet(run.setup, trace, run.fleet, client=client, progress=bar.update)
        steps = sum(len(each["begin"]) for each in fleets[run.name].result.steps)
        print(f"{run.name}: {steps:,} steps simulated in {time.perf_counter() - begin:.1f} s")
    reports = {name: report(fleet.result, slo) for name, fleet in fleets.items()}
    print(table(reports))
    if parsed.plot is not None:
        written = plots.draw_all({name: fleet.result for name, fleet in fleets.items()}, parsed.plot)
        if len(runs) == 1:
            pages = runs[0].setup.device.num_pages - 1
            written += plots.compositions(fleets[runs[0].name].result, pages, parsed.plot)
        if any(len(fleet.changes) > 1 for fleet in fleets.values()):
            counts, edges = np.histogram(trace.arrivals, bins=max(1, round(trace.seconds / 10)))
            rates = edges[:-1].tolist(), (counts / np.diff(edges)).tolist()
            changes = {name: fleet.changes for name, fleet in fleets.items()}
            written.append(plots.replicas(changes, rates, parsed.plot / "replicas.png"))
        print("plots: " + ", ".join(path.name for path in written))
    return {
        "trace": trace.name,
        "runs": {name: each.to_dict() for name, each in reports.items()},
        "replicas": {name: fleet.changes for name, fleet in fleets.items()},
    }


def capacities(
    parsed: argparse.Namespace, runs: Sequence[Run], trace: Trace, slo: Slo, client: ClientRule
) -> dict[str, Any]:
    found: dict[str, Capacity] = {}
    for run in runs:

        def good_share(part: Trace, run: Run = run) -> float:
            result = simulate_fleet(run.setup, part, run.fleet, client=client).result
            bar.update(1)
            return slo.share(result)

        with tqdm(desc=run.name, unit="simulation", file=sys.stderr) as bar:
            found[run.name] = search_capacity(parts_of(trace, parsed.rounds), good_share, target=parsed.capacity)
        skipped = fitting(run.setup.config, trace, run.setup.device, client)[1]
        missed = f"; {skipped:,} of {len(trace):,} requests are too long and count as missed" if skipped else ""
        print(f"{run.name}: {100 * parsed.capacity:g} % within {slo} up to {found[run.name]}{missed}")
    if parsed.plot is not None:
        parsed.plot.mkdir(parents=True, exist_ok=True)
        points = {name: list(each.points) for name, each in found.items()}
        print(f"plot: {plots.capacity(points, parsed.capacity, parsed.plot / 'capacity.png').name}")
    return {
        "trace": trace.name,
        "slo": str(slo),
        "capacities": {name: dataclasses.asdict(each) | {"rate": each.rate} for name, each in found.items()},
    }
