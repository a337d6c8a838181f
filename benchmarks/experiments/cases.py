"""What an experiment consists of: its cases, and the figures and panels that compare them."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from jaxserve.config.scheduling import SchedulerConfig
from jaxserve.request import EngineRequest
from jaxserve.simulator.simulation import ClientRule
from jaxserve.simulator.traces import Trace

NO_OPTIONS: Mapping[str, Any] = types.MappingProxyType({})


class Predictor(Protocol):
    """What the scheduler asks of a predictor."""

    @property
    def kendall_tau(self) -> float | None: ...

    def expected(self, request: EngineRequest) -> float: ...

    def observe(self, request: EngineRequest, output_tokens: int, expected: float) -> None: ...


@dataclasses.dataclass(frozen=True)
class Case:
    """One run of an engine.

    x: its place on the horizontal axis of a plot over numbers; None is all along it. series: its line or bar color.
    options: flat scheduler settings, on top of those of the side. scheduler: all of them instead.
    load: the trace's requests arrive at this share of the rate at which the engine gets through them when all are there
    at once with its own settings; None leaves the arrivals as they are. reference: the trace that this is said of,
    where `trace` is a part of it.
    concurrency: so many clients that each send their next request when the last one ends; None is open loop.
    num_pages: of the pool, the null page not counted; None is all there are.
    predictor: makes what stands in for the scheduler's own, from the true lengths by request id.
    """

    name: str
    trace: Trace
    x: float | None = None
    series: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    scheduler: SchedulerConfig | None = None
    client: ClientRule = ClientRule("exact")
    load: float | None = None
    reference: Trace | None = None
    concurrency: int | None = None
    num_pages: int | None = None
    predictor: Callable[[Mapping[str, int]], Predictor] | None = None


@dataclasses.dataclass(frozen=True)
class Panel:
    """A figure: its name in a row of results, what the head of a column and an axis say, and a factor for its unit."""

    key: str
    column: str
    label: str
    factor: float = 1.0
    log: bool = False


THROUGHPUT = Panel("output_tokens_per_second", "tok/s", "output tokens / s")
TTFT = Panel("ttft_mean", "TTFT ms", "mean TTFT, ms", 1e3)
TTFT_P99 = Panel("ttft_p99", "p99", "p99 TTFT, ms", 1e3)
TPOT = Panel("tpot_mean", "TPOT ms", "mean TPOT, ms", 1e3)
ITL = Panel("itl_mean", "ITL ms", "mean ITL, ms", 1e3)
ITL_P99 = Panel("itl_p99", "p99 ITL ms", "p99 ITL, ms", 1e3)
E2E = Panel("e2e_mean", "e2e s", "mean end to end, s")
E2E_P99 = Panel("e2e_p99", "p99", "p99 end to end, s")
QUEUE = Panel("queue_mean", "queue ms", "mean queue time, ms", 1e3)
SERVICE = Panel("service_mean", "service s", "mean time in service, s")
SERVICE_P99 = Panel("service_p99", "p99", "p99 time in service, s")
UTILIZATION = Panel("utilisation", "useful %", "useful of computed tokens, %", 100)
SEQUENCES = Panel("sequences", "seqs", "sequences per step")
PAGE_USE = Panel("page_use", "pages %", "pages in use, %", 100)
PREEMPTIONS = Panel("preemptions", "preempted", "preemptions")
SWAPPED = Panel("preempted_by_swap", "swapped", "preemptions by swap")
TAU = Panel("kendall_tau", "tau", "Kendall tau of predictions")
IN_TIME = Panel("in_time", "in time %", "first token in time, %", 100)
GOODPUT = Panel("goodput", "goodput", "first token in time, requests / s")
HIT_RATE = Panel("hit_rate", "cached %", "prompt tokens found in the cache, %", 100)
JAIN = Panel("jain", "Jain", "Jain index of tenants' service")

COLUMNS = (THROUGHPUT, TTFT, TTFT_P99, TPOT, ITL, ITL_P99, E2E, E2E_P99, QUEUE, UTILIZATION, PREEMPTIONS, TAU)
"""What a table shows where an experiment does not choose."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """What a side is and how much work suits it.

    requests: of a case. prompt, output: mean tokens of a usual request. seqs, tokens: its max_num_seqs and
    max_num_batched_tokens. limits: all settings of the side's own engine that are not usual.
    """

    name: str
    requests: int
    prompt: int
    output: int
    seqs: int
    tokens: int
    limits: Mapping[str, Any]

    @property
    def overload(self) -> float:
        """A load under which a queue builds up within the few requests of a case."""
        return 3.0 if self.name == "engine" else 1.3


@dataclasses.dataclass(frozen=True)
class Experiment:
    """name: of its function and files. question: what it answers. cases: made for a side's scale.

    xlabel: of a plot over numbers; "" plots bars, one a case. limits: settings of the side's engine, by the side's
    name, on top of its own. engine_rounds: how often the engine runs all cases, one after another; a row then has the
    medians. ttft_target: seconds within which a first token is in time, by side. by_tenant: the table has a part for
    each tenant (a panel's key may be "TENANT.figure").
    """

    name: str
    question: str
    cases: Callable[[Scale], list[Case]]
    panels: tuple[Panel, ...]
    columns: tuple[Panel, ...] = COLUMNS
    xlabel: str = ""
    log_x: bool = False
    by_tenant: bool = False
    limits: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    ttft_target: Mapping[str, float] = dataclasses.field(default_factory=dict)
    engine_rounds: int = 2
    sides: tuple[str, ...] = ("simulation", "engine")


EXPERIMENTS: dict[str, Experiment] = {}
"""Every experiment by its name, once the modules that hold them are imported."""


def experiment(**fields: Any) -> Callable[[Callable[[Scale], list[Case]]], Callable[[Scale], list[Case]]]:
    """Makes a function that makes cases an experiment of the same name; `fields` are those of `Experiment`."""

    def register(make_cases: Callable[[Scale], list[Case]]) -> Callable[[Scale], list[Case]]:
        name = make_cases.__name__
        EXPERIMENTS[name] = Experiment(name=name, cases=make_cases, **fields)
        return make_cases

    return register
