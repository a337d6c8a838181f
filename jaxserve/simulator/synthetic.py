"""Generates synthetic traces from arrival processes and length distributions, seeded.

As text, on the command line: `synthetic:rate=5,count=1000,arrivals=gamma,burstiness=0.25,lengths=azure_conv,seed=1`.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from jaxserve.config.checks import at_least, between, one_of
from jaxserve.simulator.trace_options import parsed
from jaxserve.simulator.traces import Trace, make_trace

ARRIVALS = ("poisson", "gamma", "onoff", "even", "at_once")

Mixture = tuple[tuple[float, float, float], ...]
"""Components of a log-normal mixture: (weight, mu, sigma) of the natural logarithm of tokens."""

LENGTHS: dict[str, tuple[Mixture, Mixture]] = {
    "azure_conv": (
        ((0.63, 6.27, 1.00), (0.29, 6.98, 0.06), (0.08, 8.31, 0.05)),
        ((0.72, 4.64, 0.71), (0.28, 6.01, 0.05)),
    ),
    "azure_code": (((0.31, 5.52, 1.31), (0.69, 7.65, 0.72)), ((0.66, 2.37, 0.38), (0.34, 3.60, 0.90))),
}
"""Prompt and output lengths fitted to the Azure 2023 traces (Patel et al., Splitwise, ISCA 2024), independent."""


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """Configures `synthetic_trace`.

    Attributes:
        rate: requests a second on average.
        count: requests.
        seed: of everything random.
        arrivals: "poisson"; "gamma" with gaps whose coefficient of variation is 1 / sqrt(burstiness); "onoff": Poisson
            bursts with silence between them, on_seconds and off_seconds long on average (exponential), which keep the
            rate on average; "even" gaps; "at_once".
        lengths: "azure_conv" or "azure_code", the mixtures fitted to those traces.
        prompt: instead of it "N", "LOW-HIGH" (uniform, both included) or "N/N/..." (in rotation).
        output: as prompt.
        max_length: longer prompts and outputs are cut to it.
        max_tokens: as the clients set it; 0 leaves it to the rule of the simulation.
        tenants: "NAME:WEIGHT/NAME:WEIGHT/...": shares of the requests.
        priorities: the same with numbers for names.
        deadline: seconds after the arrival; 0 is none.
    """

    rate: float = 4.0
    count: int = 1000
    seed: int = 0
    arrivals: str = "poisson"
    burstiness: float = 1.0
    on_seconds: float = 5.0
    off_seconds: float = 15.0
    lengths: str = "azure_conv"
    prompt: str = ""
    output: str = ""
    max_length: int = 131072
    max_tokens: int = 0
    tenants: str = ""
    priorities: str = ""
    deadline: float = 0.0

    def __post_init__(self) -> None:
        between("synthetic rate", self.rate, 1e-9)
        at_least("synthetic count", self.count, 1)
        at_least("synthetic seed", self.seed, 0)
        one_of("synthetic arrivals", self.arrivals, ARRIVALS)
        one_of("synthetic lengths", self.lengths, tuple(LENGTHS))
        at_least("synthetic max_length", self.max_length, 1)
        at_least("synthetic max_tokens", self.max_tokens, 0)
        between("synthetic burstiness", self.burstiness, 1e-3)
        between("synthetic on_seconds", self.on_seconds, 1e-3)
        between("synthetic off_seconds", self.off_seconds, 0.0)
        between("synthetic deadline", self.deadline, 0.0)

    @classmethod
    def parse(cls, text: str) -> SyntheticConfig:
        """Parses "NAME=VALUE,NAME=VALUE"; "" is the defaults. Raises ValueError naming what cannot be parsed."""
        return parsed("synthetic", cls(), text)


def synthetic_trace(config: SyntheticConfig) -> Trace:
    """Generates the trace that the configuration describes, deterministically.

    Arrivals, lengths, tenants and priorities are drawn from separate streams: another rate leaves the lengths
    unchanged.
    """
    streams = _streams(config)
    arrivals, tenants, priorities = streams[0], streams[3], streams[4]
    prompts, outputs = (np.minimum(drawn, config.max_length) for drawn in _drawn(config, streams))
    return make_trace(
        "synthetic",
        _arrivals(config, arrivals),
        prompts,
        outputs,
        max_tokens=config.max_tokens,
        tenants=drawn_names("tenants", config.tenants, config.count, tenants) or "",
        priorities=[
            _whole("priorities", name)
            for name in drawn_names("priorities", config.priorities, config.count, priorities)
        ]
        or 0,
        deadlines=config.deadline or np.inf,
    )


def count_cut(config: SyntheticConfig) -> dict[str, int]:
    """Counts the prompts and outputs that `synthetic_trace` cuts to max_length."""
    drawn = _drawn(config, _streams(config))
    counts = [int((lengths > config.max_length).sum()) for lengths in drawn]
    return dict(zip(("prompt", "output"), counts, strict=True))


def _streams(config: SyntheticConfig) -> list[np.random.Generator]:
    """Returns the random streams of arrivals, prompts, outputs, tenants and priorities."""
    return [np.random.default_rng([config.seed, stream]) for stream in range(5)]


def _drawn(config: SyntheticConfig, streams: list[np.random.Generator]) -> tuple[np.ndarray, np.ndarray]:
    """Draws lengths of prompts and outputs, not yet cut."""
    prompts, outputs = LENGTHS[config.lengths]
    return (
        _lengths("prompt", config.prompt, prompts, config, streams[1]),
        _lengths("output", config.output, outputs, config, streams[2]),
    )


def _arrivals(config: SyntheticConfig, rng: np.random.Generator) -> np.ndarray:
    mean, count = 1 / config.rate, config.count
    if config.arrivals == "at_once":
        return np.zeros(count)
    if config.arrivals == "even":
        return np.arange(count) * mean
    if config.arrivals == "gamma":
        return np.cumsum(rng.gamma(config.burstiness, mean / config.burstiness, count))
    times = np.cumsum(rng.exponential(mean, count))
    return _with_silence(times, config, rng) if config.arrivals == "onoff" else times


def _with_silence(times: np.ndarray, config: SyntheticConfig, rng: np.random.Generator) -> np.ndarray:
    """Compresses Poisson times into bursts: time advances only during a burst, and faster to make up for the
    silence.
    """
    share = config.on_seconds / (config.on_seconds + config.off_seconds)
    busy = times * share  # time within bursts
    ends = np.zeros(0)
    while not len(ends) or ends[-1] < busy[-1]:
        more = rng.exponential(config.on_seconds, 1 + int(busy[-1] / config.on_seconds))
        ends = np.concatenate([ends, (ends[-1] if len(ends) else 0.0) + np.cumsum(more)])
    silence = np.concatenate([[0.0], np.cumsum(rng.exponential(config.off_seconds, len(ends)))])
    return busy + silence[np.searchsorted(ends, busy)]


def _lengths(name: str, text: str, mixture: Mixture, config: SyntheticConfig, rng: np.random.Generator) -> np.ndarray:
    count = config.count
    if not text:
        weights = np.array([part[0] for part in mixture])
        part = rng.choice(len(mixture), count, p=weights / weights.sum())
        mu, sigma = (np.array([each[place] for each in mixture])[part] for place in (1, 2))
        found = np.rint(np.exp(rng.normal(mu, sigma))).astype(np.int64)
    elif match := re.fullmatch(r"(\d+)-(\d+)", text):
        low, high = map(int, match.groups())
        if not 1 <= low <= high:
            raise ValueError(f"synthetic {name} is {text!r}; LOW-HIGH must rise from at least 1")
        found = rng.integers(low, high + 1, count)
    else:
        found = np.resize([_whole(name, each) for each in text.split("/")], count)
    return np.maximum(found, 1)


def drawn_names(name: str, text: str, count: int, rng: np.random.Generator) -> list[str]:
    """Draws `count` names by the weights that "NAME:WEIGHT/NAME:WEIGHT/..." gives; "" draws none.

    name: the setting's, for errors, which are a ValueError.
    """
    if not text:
        return []
    names, weights = [], []
    for item in text.split("/"):
        label, _, weight = item.partition(":")
        try:
            weights.append(float(weight or 1.0))
        except ValueError as error:
            raise ValueError(f"synthetic {name} has {item!r}; it must be NAME:WEIGHT") from error
        names.append(label)
    shares = np.array(weights)
    if not (shares > 0).all():
        raise ValueError(f"synthetic {name} is {text!r}; each weight must be above 0")
    return [names[place] for place in rng.choice(len(names), count, p=shares / shares.sum()).tolist()]


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"synthetic {name} has {text!r}; it must be a whole number") from error
