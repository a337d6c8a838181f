"""Tunes options for a trace: searches in simulation, confirms on the engine, and writes a gin file with the
evidence.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence

from tqdm import tqdm

from jaxserve.config.settings import EngineConfig
from jaxserve.runner.protocol import Runner
from jaxserve.simulator.capacity import search_capacity
from jaxserve.simulator.command import load_setup, load_trace
from jaxserve.simulator.replay import replay
from jaxserve.simulator.search import (
    MET,
    Options,
    Score,
    Serve,
    Trial,
    candidates,
    owner_of,
    search_space,
    stressed,
    successive_halving,
    value_of,
)
from jaxserve.simulator.setup import with_options
from jaxserve.simulator.simulation import ClientRule, SimulationResult, simulate
from jaxserve.simulator.simulation_report import Slo
from jaxserve.simulator.traces import Trace

CAPACITY_TOLERANCE = 0.03
"""Relative tolerance of the capacities in the evidence."""


REFUTED = 0.05
"""Share by which the engine must have served worse than with the configuration itself for options to be rejected: runs
in real time differ by less from one to the next."""


UNCHANGED = "no option is better than the configuration, which stays as it is"
"""Message where a file changes nothing."""


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Results of the tuning.

    Attributes:
        before: of the configuration, in simulation and, where confirmed, on the engine.
        after: of `best`, in simulation and, where confirmed, on the engine.
        capacities: of both in simulation, requests a second.
        costs: source of the simulation's costs.
        reason: why it was not confirmed.
        refuted: options that simulated better and served worse than the configuration itself.
        candidates: number simulated, the configuration itself among them.
    """

    best: Trial
    before: Trial
    capacities: tuple[float, float] | None = None
    engine_before: Score | None = None
    engine_after: Score | None = None
    engine_requests: int = 0
    reason: str = ""
    costs: str = ""
    refuted: Trial | None = None
    candidates: int = 0

    @property
    def tried(self) -> Trial:
        """Candidate with the best simulation."""
        return self.refuted or self.best


def tune(
    parsed: argparse.Namespace,
    given: Sequence[str],
    config: EngineConfig,
    overrides: Sequence[str],
    make_runner: Callable[[EngineConfig], Runner],
    load: Callable[[str], object],
) -> None:
    """Searches, confirms, prints and writes.

    Args:
        parsed: the command line of `jaxserve.tune`.
        given: the arguments as they were given, for the file's comments.
        config: the configuration.
        overrides: NAME=VALUE of the command line, which the file repeats.
        make_runner: starts the engine's runner, to confirm the result.
        load: reads a gin file; raises ValueError where it cannot.

    Raises:
        ValueError: an argument, the trace or the file of costs is faulty.
        OSError: a file cannot be read or written.
    """
    if any(pathlib.Path(name).resolve() == parsed.output.resolve() for name in parsed.config.split(",")):
        raise ValueError(f"--output {parsed.output.name} is the configuration itself; name another file")
    if parsed.stress and Slo.parse(parsed.slo) == Slo():
        raise ValueError("--stress needs targets to miss: give --slo, such as --slo ttft=0.5,tpot=0.05")
    trace, slo, client = load_trace(parsed), Slo.parse(parsed.slo), ClientRule.parse(parsed.client_max_tokens)
    with tqdm(unit="simulation", file=sys.stderr) as bar:
        costs = ""

        def serve(chosen: EngineConfig, part: Trace) -> SimulationResult:
            nonlocal costs
            setup = load_setup(parsed, chosen)
            costs = setup.costs.name
            result = simulate(setup.config, part, setup.costs, setup.device, client=client)
            bar.update(1)
            return result

        evidence, factor = search(config, trace, slo, serve, parsed)
        evidence = dataclasses.replace(evidence, costs=costs)
    evidence = confirm(config, trace.faster(factor), slo, client, evidence, parsed, make_runner)
    about = [f"python -m jaxserve.tune {shlex.join(_public(given))}", *_lines(evidence, trace, factor, slo)]
    print("\n".join(about[1:]))
    text = gin_text(config, evidence.best.options, parsed.config, overrides, about)
    write_readable(parsed.output, text, load)


def search(
    config: EngineConfig, trace: Trace, slo: Slo, serve: Serve, parsed: argparse.Namespace
) -> tuple[Evidence, float]:
    """Returns the best candidate and the configuration itself on the whole trace, and the factor of its rate."""
    drawn = candidates(config, search_space(config, trace), parsed.candidates, parsed.seed, slo)
    if len(drawn) == 1:
        raise ValueError(
            f"--candidates {parsed.candidates} leaves no options to try beside the configuration itself; raise it"
        )
    factor = stressed(config, trace, slo, serve) if parsed.stress else 1.0
    tables = successive_halving(
        config,
        trace.faster(factor) if factor != 1.0 else trace,
        slo,
        serve,
        count=parsed.candidates,
        rungs=parsed.rungs,
        seed=parsed.seed,
    )
    if len(tables[0]) == 1:
        raise ValueError(
            f"none of the other {len(drawn) - 1} candidates can serve the trace: they hold too few pages, or skip more "
            "requests as too long; raise --candidates"
        )
    best, before = tables[-1][0], next(trial for trial in tables[-1] if not trial.options)
    evidence = Evidence(best, before, candidates=len(tables[0]))
    if not parsed.stress:
        return evidence, factor  # a rate of its own was asked for, and may be far from the capacity

    def capacity(options: Options) -> float:
        def share(part: Trace) -> float:
            return slo.share(serve(with_options(config, options), part))

        return search_capacity([trace.faster(factor)], share, target=MET, tolerance=CAPACITY_TOLERANCE).rate

    own = capacity({})
    return dataclasses.replace(evidence, capacities=(own, capacity(best.options) if best.options else own)), factor


def confirm(
    config: EngineConfig,
    trace: Trace,
    slo: Slo,
    client: ClientRule,
    evidence: Evidence,
    parsed: argparse.Namespace,
    make_runner: Callable[[EngineConfig], Runner],
) -> Evidence:
    """Serves the first seconds of the trace on the engine, as configured and with the best options.

    Where these are worse by more than REFUTED, the configuration itself is the best.
    """
    if not evidence.best.options:
        return dataclasses.replace(evidence, reason="no options to confirm")
    if not parsed.confirm_seconds:
        return dataclasses.replace(evidence, reason="not asked for")
    if config.load_format != "dummy" and (config.model is None or not pathlib.Path(config.model).is_dir()):
        return dataclasses.replace(evidence, reason="the model is not at hand")
    count = max(1, int((trace.arrivals < parsed.confirm_seconds).sum()))
    part = trace.part(0, count)
    scores = []
    for options in ({}, evidence.best.options):
        chosen = with_options(config, options)
        runner = make_runner(chosen)
        replay(chosen, runner, part.part(0, min(count, 8)), client=client)  # warms up
        scores.append(Score.of(replay(chosen, runner, part, client=client, seed=parsed.seed), slo))
    found = dataclasses.replace(evidence, engine_before=scores[0], engine_after=scores[1], engine_requests=count)
    if scores[1].clearly_below(scores[0], REFUTED):
        return dataclasses.replace(found, best=evidence.before, refuted=evidence.best)
    return found


def gin_text(config: EngineConfig, options: Options, base: str, overrides: Sequence[str], about: Sequence[str]) -> str:
    """Returns a gin file that includes `base`, repeats the overrides and sets the options; about: its comments."""
    lines = [f"# {line}".rstrip() for line in about]
    lines += ["", f"include {base!r}", ""]
    for override in overrides:
        name, _, value = override.partition("=")
        lines.append(f"{name.strip()} = {_literal(value.strip())}")
    for name, value in sorted(options.items()):
        was = value_of(config, name)
        lines.append(f"{type(owner_of(config, name)).__name__}.{name} = {value!r}  # was {was!r}")
    return "\n".join(lines) + "\n"


def write_readable(path: pathlib.Path, text: str, load: Callable[[str], object]) -> None:
    """Writes a gin file once `load` could read it; the existing file stays until then."""
    draft = path.with_name(f".{path.stem}.draft.gin")
    try:
        draft.write_text(text, encoding="utf-8")
        load(str(draft))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _lines(evidence: Evidence, trace: Trace, factor: float, slo: Slo) -> list[str]:
    best, before = evidence.tried, evidence.before
    rate = f"{trace.rate * factor:.3g} requests/s" + ("" if factor == 1.0 else f", {factor:.3g} times its own rate")
    lines = [
        f"step times: {evidence.costs}",
        f"trace {trace.name}, {best.requests:,} requests{_skipped(before, best)} at {rate}; targets {slo}",
        f"simulation, before: {_told(before.score)}",
    ]
    if not best.options:
        return [*lines, f"none of {evidence.candidates - 1} others simulated better: {UNCHANGED}"]
    lines.append(f"simulation, after:  {_told(best.score)}")
    if evidence.capacities is not None:
        rates = "before {:.3g}, after {:.3g} requests/s".format(*evidence.capacities)
        lines.append(f"simulation, highest rate with {100 * MET:g} % within targets: {rates}")
    if evidence.engine_before is None or evidence.engine_after is None:
        return [*lines, f"engine: not confirmed, {evidence.reason}"]
    if evidence.refuted is not None:
        tried = ", ".join(f"{name}={value!r}" for name, value in sorted(evidence.refuted.options.items()))
        lines.append(f"the engine was slower by over {REFUTED:.0%} with what simulated best: {tried}")
        lines.append(UNCHANGED)
    return [
        *lines,
        f"engine, before ({evidence.engine_requests} requests): {_told(evidence.engine_before)}",
        f"engine, after  ({evidence.engine_requests} requests): {_told(evidence.engine_after)}",
    ]


def _skipped(before: Trial, best: Trial) -> str:
    if before.skipped == best.skipped:
        return f" ({before.skipped:,} too long, not served)" if before.skipped else ""
    return f" ({before.skipped:,} too long before, {best.skipped:,} after)"


def _told(score: Score) -> str:
    return (
        f"goodput {score.goodput:.3f} requests/s ({100 * score.good_share:.1f} % within targets), "
        f"{score.tokens_per_second:,.1f} output tokens/s, mean TTFT {-1e3 * score.promptness:,.1f} ms"
    )


def _public(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with paths cut to their last part, so that the file reveals nothing of the machine."""
    found = []
    for argument in arguments:
        name, equals, value = argument.rpartition("=")
        if not argument.startswith("--gin") and "/" in value:
            value = pathlib.PurePath(value).name
        found.append(f"{name}{equals}{value}")
    return found


def _literal(text: str) -> str:
    """Formats a gin value: text that is no literal is quoted, as overrides on the command line may omit quotes."""
    try:
        compile(text, "value", "eval")
        bare = text.isidentifier() and text not in ("True", "False", "None")
    except SyntaxError:
        bare = True
    return repr(text) if bare else text
