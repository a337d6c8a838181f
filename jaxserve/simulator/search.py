"""Searches options for a trace by successive halving: random candidates on growing prefixes of the trace."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxserve.config.checks import at_least
from jaxserve.config.settings import EngineConfig
from jaxserve.simulator.setup import with_options
from jaxserve.simulator.simulation import SimulationResult
from jaxserve.simulator.simulation_report import Slo
from jaxserve.simulator.traces import Trace

Options = Mapping[str, Any]
Serve = Callable[[EngineConfig, Trace], SimulationResult]
"""Serves a trace under a configuration; ValueError where the configuration cannot be used."""

MET = 0.9
"""Share of requests within the targets that a server is expected to reach."""


@dataclasses.dataclass(frozen=True, order=True)
class Score:
    """Ranks a run, higher is better: requests a second within the targets; where equal, output tokens a second and a
    shorter mean time to first token.
    """

    goodput: float
    tokens_per_second: float
    promptness: float
    good_share: float

    @classmethod
    def of(cls, result: SimulationResult, slo: Slo) -> Score:
        good, seconds = slo.met(result), result.seconds
        first = result.ttft[result.completed]
        return cls(
            goodput=float(good.sum()) / seconds if seconds else 0.0,
            tokens_per_second=float(result.output_tokens.sum()) / seconds if seconds else 0.0,
            promptness=-float(first.mean()) if len(first) else -np.inf,
            good_share=slo.share(result),
        )

    def clearly_below(self, other: Score, tolerance: float) -> bool:
        """Returns whether it is worse, and its first metric that differs from the other's by more than the share
        `tolerance` is the lower one.
        """
        if self < other:
            for name in ("goodput", "tokens_per_second", "promptness"):
                mine, theirs = getattr(self, name), getattr(other, name)
                if abs(mine - theirs) > tolerance * abs(theirs):
                    return mine < theirs
        return False


@dataclasses.dataclass(frozen=True)
class Trial:
    """Result of a candidate on a prefix of the trace.

    Attributes:
        options: differences from the configuration; {} is itself.
        skipped: requests that are too long for it.
    """

    options: Options
    requests: int
    score: Score
    skipped: int = 0


def search_space(config: EngineConfig, trace: Trace) -> dict[str, tuple[Any, ...]]:
    """Returns the values to try for each option, around those configured.

    Policies that use tenants, priorities or deadlines are tried where the trace has any. Limits stay within twice the
    configured ones, for which memory was planned.
    """
    limits = config.scheduler
    policies = ["fcfs", "sjf", "deadline"]
    policies += ["fair"] if len(set(trace.tenants)) > 1 else []
    policies += ["priority"] if len(set(trace.priorities.tolist())) > 1 else []
    tokens, seqs = limits.max_num_batched_tokens, limits.max_num_seqs
    return {
        "policy": tuple(policies),
        "formation": ("greedy", "length_balanced", "throughput"),
        "mode": ("continuous", "continuous", "separated"),
        "max_num_batched_tokens": tuple(
            dict.fromkeys(max(8, int(tokens * share)) for share in (0.125, 0.25, 0.5, 1, 2))
        ),
        "max_num_seqs": tuple(dict.fromkeys(max(1, int(seqs * share)) for share in (0.25, 0.5, 1, 2))),
        "long_prefill_token_threshold": (0, *(size for size in (256, 512, 1024, 2048) if size < tokens)),
        "prefill_share": (0.2, 0.5, 0.7, 1.0),
        "fill_buckets": (True, False),
        "watermark": (0.0, 0.01, 0.05),
        "scheduler_delay_factor": (0.0, 0.0, 0.5),
        "preemption_mode": ("recompute", "auto") if config.cache.swap_space else ("recompute",),
        "load_profile": (False, False, True),
    }


def candidates(
    config: EngineConfig, space: Mapping[str, Sequence[Any]], count: int, seed: int, slo: Slo = Slo()
) -> list[Options]:
    """Returns the configuration itself and count - 1 random others, each valid and without duplicates.

    A candidate changes only some of the options, so that harmful changes do not hide helpful ones. Where the policy is
    "deadline" it aims at the targets of `slo`.
    """
    targets = {"ttft_target": slo.ttft, "tpot_target": slo.tpot}
    aims = {name: target for name, target in targets.items() if math.isfinite(target)}
    at_least("candidates", count, 1)
    rng = np.random.default_rng(seed)
    found: list[Options] = [{}]
    for _ in range(100 * count):
        if len(found) == count:
            break
        names = [name for name in space if rng.random() < 0.4]
        drawn = {name: space[name][int(rng.integers(len(space[name])))] for name in names}
        if drawn.get("policy", config.scheduler.policy) == "deadline":
            drawn |= aims
        options = {name: value for name, value in drawn.items() if value != value_of(config, name)}
        if options in found or not _valid(config, options):
            continue
        found.append(options)
    return found


def successive_halving(
    config: EngineConfig,
    trace: Trace,
    slo: Slo,
    serve: Serve,
    *,
    count: int = 27,
    keep: float = 1 / 3,
    rungs: int = 3,
    seed: int = 0,
) -> list[list[Trial]]:
    """Runs successive halving and returns the trials of each rung, best first.

    The last rung serves the whole trace; each one before it the share `keep` of the next. The configuration itself is
    in every rung, for comparison; candidates that skip more requests than it are left out, since less work would make
    them look faster.

    Source: Jamieson and Talwalkar, "Non-stochastic best arm identification", AISTATS 2016.

    Raises ValueError where the configuration itself cannot serve the trace.
    """
    at_least("rungs", rungs, 1)
    remaining = candidates(config, search_space(config, trace), count, seed, slo)
    tables: list[list[Trial]] = []
    for rung in range(rungs):
        prefix = trace.part(0, max(1, round(len(trace) * keep ** (rungs - 1 - rung))))
        trials = []
        for options in remaining:
            try:
                result = serve(with_options(config, options), prefix)
            except ValueError:
                if not options:
                    raise
                continue  # the device cannot hold what these options ask for
            trials.append(Trial(options, len(prefix), Score.of(result, slo), result.num_skipped))
        skipped = next(trial.skipped for trial in trials if not trial.options)
        trials = [trial for trial in trials if trial.skipped <= skipped]
        trials.sort(key=lambda trial: (trial.score, -len(trial.options)), reverse=True)  # of equals the plainest
        tables.append(trials)
        kept = [trial.options for trial in trials[: max(1, round(len(trials) * keep))]]
        remaining = kept if {} in kept else [*kept, {}]
    return tables


def stressed(config: EngineConfig, trace: Trace, slo: Slo, serve: Serve, share: float = MET) -> float:
    """Returns the factor of the trace's rate, a power of 1.25 of at least 1, at which fewer than `share` of the
    requests meet the targets: where all do, no option could prove better.
    """
    factor = 1.0
    while factor < 1000:
        result = serve(config, trace.faster(factor))
        if slo.share(result) < share:
            return factor
        factor *= 1.25
    raise ValueError(
        f"targets {slo} are met by {100 * share:g} % of the requests at any rate: they are too loose to tune"
    )


def value_of(config: Any, name: str) -> Any:
    """Returns the value of a field of the configuration or of one of its sections."""
    return getattr(owner_of(config, name), name)


def owner_of(config: Any, name: str) -> Any:
    """Returns the configuration, or the section, that has the field. Raises ValueError where none has."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name == name:
            return config
        if dataclasses.is_dataclass(value):
            try:
                return owner_of(value, name)
            except ValueError:
                continue
    raise ValueError(f"option {name!r} is unknown")


def _valid(config: EngineConfig, options: Options) -> bool:
    try:
        with_options(config, options)
    except ValueError:
        return False
    return True
