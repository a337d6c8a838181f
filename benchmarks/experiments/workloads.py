"""Traces that several experiments share, in the lengths that suit a side."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.experiments.cases import NO_OPTIONS, Scale
from jaxserve.simulator.traces import Trace, make_trace

TEN_OUTPUTS = (10, 20, 15, 100, 25, 30, 15, 50, 40, 10)
"""Output lengths of ten requests, the worked example of static against continuous batching."""


def ten_requests(times: int, prompt: int, scale: int = 1) -> Trace:
    """The ten requests so many times over, all at once; outputs `scale` times as long."""
    outputs = np.tile(TEN_OUTPUTS, times) * scale
    return make_trace(f"ten requests x {times}", np.zeros(len(outputs)), prompt, outputs)


def beside_decodes(rows: int, output: int, length: int, arrivals: Sequence[float]) -> Trace:
    """`rows` short requests of tenant "decoding", all there at once, and long prompts of "prompt", of one output token
    each, at their times."""
    prompts = len(arrivals)
    return make_trace(
        f"prompts of {length}",
        np.concatenate([np.zeros(rows), arrivals]),
        [8] * rows + [length] * prompts,
        [output] * rows + [1] * prompts,
        tenants=["decoding"] * rows + ["prompt"] * prompts,
    )


def chat(scale: Scale, *, requests: int | None = None, seed: int = 0) -> Trace:
    """Log-normal prompts and outputs (long tails, as in traces of chats), Poisson arrivals at one a second."""
    count = requests or scale.requests
    rng = np.random.default_rng(seed)
    return make_trace(
        "chat",
        np.cumsum(rng.exponential(1.0, count)),
        _log_normal(rng, scale.prompt, 0.8, count),
        _log_normal(rng, scale.output, 0.9, count),
    )


@dataclasses.dataclass(frozen=True)
class Tenant:
    """share: of the requests. prompt, output: lengths as multiples of the scale's. spread: of their logarithms."""

    name: str
    share: float
    prompt: float = 1.0
    output: float = 1.0
    spread: float = 0.4


TENANTS = (
    Tenant("chat", 0.55, prompt=0.6, output=0.5),
    Tenant("code", 0.25, prompt=1.6, output=0.25),
    Tenant("write", 0.2, prompt=0.6, output=3.0),
)
"""Three uses of one model: short answers, long prompts with the shortest answers, long answers; each about as much."""

FLOOD = (
    Tenant("chat", 0.8, prompt=0.6, output=0.5),
    Tenant("code", 0.1, prompt=1.6, output=0.25),
    Tenant("write", 0.1, prompt=0.6, output=3.0),
)
"""The same three, of which chat sends several times as much as each of the others."""


def tenants(
    scale: Scale,
    who: tuple[Tenant, ...] = TENANTS,
    *,
    requests: int | None = None,
    priorities: Mapping[str, int] = NO_OPTIONS,
    seed: int = 0,
) -> Trace:
    """Requests of several tenants, Poisson arrivals at one a second. priorities: by tenant, 0 where not named."""
    count = requests or scale.requests
    rng = np.random.default_rng(seed)
    shares = np.array([tenant.share for tenant in who])
    whose = rng.choice(len(who), count, p=shares / shares.sum())
    prompts, lengths = np.empty(count, np.int64), np.empty(count, np.int64)
    for place, tenant in enumerate(who):
        mine = whose == place
        prompts[mine] = _log_normal(rng, tenant.prompt * scale.prompt, tenant.spread, int(mine.sum()))
        lengths[mine] = _log_normal(rng, tenant.output * scale.output, tenant.spread, int(mine.sum()))
    return make_trace(
        "tenants",
        np.cumsum(rng.exponential(1.0, count)),
        prompts,
        lengths,
        tenants=[who[place].name for place in whose.tolist()],
        priorities=[priorities.get(who[place].name, 0) for place in whose.tolist()],
    )


def at_once(trace: Trace) -> Trace:
    """The same requests, all there from the start; of sessions the first turns."""
    return trace.arriving(np.zeros(len(trace)))


def _log_normal(rng: np.random.Generator, mean: float, sigma: float, count: int) -> np.ndarray:
    """Whole numbers from 1 to 8 times the mean that they have before they are cut."""
    values = rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)
    return np.clip(np.rint(values), 1, 8 * mean).astype(np.int64)
