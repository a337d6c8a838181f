"""Simulates several replicas behind a router, scaled by a policy."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jaxserve.config.checks import at_least, between, one_of
from jaxserve.planning.step_cost_models import CostModel
from jaxserve.scheduler.step_shape import StepShape
from jaxserve.simulator.forecast import FORECASTS, Forecast
from jaxserve.simulator.routing import ROUTINGS, LeastLoaded, PredictedWork, RoundRobin, Router
from jaxserve.simulator.setup import Setup
from jaxserve.simulator.simulated_engine import SimulatedEngine
from jaxserve.simulator.simulation import (
    ClientRule,
    Progress,
    ReadyRequest,
    SimulationResult,
    TraceRequests,
    collect,
    fitting,
    keys_of,
)
from jaxserve.simulator.traces import Trace

SCALINGS = ("fixed", "forecast", "cost_aware")

_TYPICAL_ROWS = 32
"""Rows of the step in which the router estimates the cost of an output token."""


@dataclasses.dataclass(frozen=True)
class FleetConfig:
    """Configures a fleet.

    Attributes:
        replicas: at the start.
        routing: "round_robin"; "least_loaded", by unfinished requests; "predicted_work", by the seconds that they are
            expected to take.
        scaling: "fixed"; "forecast": as many replicas as the expected rate needs at target_load; "cost_aware": the
            number that costs least, replicas and latency together.
        min_replicas: lower bound.
        max_replicas: upper bound.
        forecast: "ewma" or "holt".
        interval_seconds: between decisions.
        startup_seconds: from the decision until a new replica serves, and the horizon of the forecast.
        replica_rate: requests a second that one replica serves at most; needed unless scaling is "fixed".
        target_load: share of it that "forecast" plans for.
        latency_price: cost of a second of one request's latency, in replica-seconds, under "cost_aware".
    """

    replicas: int = 1
    routing: str = "least_loaded"
    scaling: str = "fixed"
    min_replicas: int = 1
    max_replicas: int = 16
    forecast: str = "holt"
    interval_seconds: float = 10.0
    startup_seconds: float = 30.0
    replica_rate: float = 0.0
    target_load: float = 0.7
    latency_price: float = 0.05

    def __post_init__(self) -> None:
        one_of("routing", self.routing, ROUTINGS)
        one_of("scaling", self.scaling, SCALINGS)
        one_of("forecast", self.forecast, tuple(FORECASTS))
        for name in ("replicas", "min_replicas", "max_replicas"):
            at_least(name, getattr(self, name), 1)
        between("interval_seconds", self.interval_seconds, 1e-3)
        between("startup_seconds", self.startup_seconds, 0.0)
        between("target_load", self.target_load, 0.01, 1.0)
        between("latency_price", self.latency_price, 0.0)
        between("replica_rate", self.replica_rate, 0.0)
        if self.scaling != "fixed":
            if not self.replica_rate:
                raise ValueError(
                    f"replica_rate is 0; scaling {self.scaling!r} needs the requests a second that one replica serves"
                )
            if not self.min_replicas <= self.replicas <= self.max_replicas:
                raise ValueError(
                    f"replicas is {self.replicas}; it must be from min_replicas {self.min_replicas} to max_replicas "
                    f"{self.max_replicas}"
                )


@dataclasses.dataclass(frozen=True, eq=False)
class FleetResult:
    """Result of a fleet.

    Attributes:
        result: of all replicas.
        changes: (time, replicas up from then on, those that start or end included).
    """

    result: SimulationResult
    changes: list[tuple[float, int]]


@dataclasses.dataclass
class _Replica:
    """A replica: its engine, and when it was requested, becomes ready, is drained, and ends."""

    engine: SimulatedEngine
    asked: float
    ready: float
    leaves: float = math.inf
    gone: float = math.inf

    def takes(self, now: float) -> bool:
        return self.ready <= now < self.leaves


def simulate_fleet(
    setup: Setup,
    trace: Trace,
    fleet: FleetConfig = FleetConfig(),
    *,
    client: ClientRule = ClientRule(),
    progress: Progress | None = None,
) -> FleetResult:
    """Serves a trace with a fleet of engines configured by `setup`; the same inputs give the same result.

    The router knows of an end as soon as the replica's step has taken it in. Later turns of a session go to the replica
    of its first one, which has their prefix.
    """
    kept, skipped = fitting(setup.config, trace, setup.device, client)
    run = _Run(setup, fleet, progress, TraceRequests(kept, setup.device, setup.config, client))
    run.serve()
    result = collect(kept, skipped, [each.engine for each in run.replicas], run.where, run.replica_seconds())
    return FleetResult(result, run.changes())


class _Run:
    """Runs a fleet."""

    def __init__(self, setup: Setup, fleet: FleetConfig, progress: Progress | None, requests: TraceRequests):
        self.where = np.zeros(len(requests.trace), np.int64)  # each request's replica
        self._requests = requests
        self._setup = setup
        self._fleet = fleet
        self._progress = progress
        self._router = make_router(fleet.routing, setup.costs)
        self._scaler = None if fleet.scaling == "fixed" else Scaler(fleet, setup.costs)
        self._decision = fleet.interval_seconds
        self._arrived = 0
        self.replicas: list[_Replica] = []
        for _ in range(fleet.replicas):
            self._start(0.0, 0.0)

    def serve(self) -> None:
        """Serves every request."""
        for root in self._requests.roots():
            now = root.request.arrival_time
            self._until(now)
            open_ones = [number for number, each in enumerate(self.replicas) if each.takes(now)]
            self._take(root, self._router.choose(root.request, open_ones))
        self._finish()

    def _until(self, now: float) -> None:
        """Simulates everything up to `now`, scaling decisions included."""
        while self._scaler is not None and self._decision <= now:
            self._advance(self._decision)
            self._decide(self._scaler, self._decision)
            self._decision += self._fleet.interval_seconds
        self._advance(now)

    def _take(self, ready: ReadyRequest, replica: int) -> None:
        """Gives a request to a replica."""
        self._router.place(ready.request, replica)
        self.replicas[replica].engine.submit(*ready)
        self.where[int(ready.request.request_id)] = replica
        self._arrived += 1
        if self._scaler is not None:
            self._scaler.arrived(len(ready.request.prompt_token_ids))

    def _finish(self) -> None:
        """Serves the remaining requests; as long as sessions send further turns, replicas are scaled."""
        while self._scaler is not None and self._requests.trace.has_turns and self._unfinished:
            self._until(self._decision)
        for each in self.replicas:
            each.engine.run_until()
            each.gone = min(each.gone, max(each.engine.now, each.ready))

    @property
    def _unfinished(self) -> bool:
        return any(each.engine.num_unfinished for each in self.replicas)

    def replica_seconds(self) -> float:
        """Returns the total time that replicas were up: all until the last request's end, unless they were removed
        before.
        """
        end = max(each.gone for each in self.replicas)
        return sum((each.gone if each.leaves < math.inf else end) - each.asked for each in self.replicas)

    def changes(self) -> list[tuple[float, int]]:
        moments = sorted(
            {each.asked for each in self.replicas} | {each.gone for each in self.replicas if each.leaves < math.inf}
        )
        return [
            (now, sum(each.asked <= now and (now < each.gone or each.leaves == math.inf) for each in self.replicas))
            for now in moments
        ]

    def _advance(self, now: float) -> None:
        for each in self.replicas:
            if each.gone < math.inf:
                continue
            each.engine.run_until(now)
            if each.leaves <= now and not each.engine.num_unfinished and not each.engine.busy:
                each.gone = max(each.engine.now, each.leaves)

    def _decide(self, scaler: Scaler, now: float) -> None:
        scaler.observe(self._arrived / self._fleet.interval_seconds)
        self._arrived = 0
        staying = [each for each in self.replicas if each.leaves == math.inf]
        wanted = scaler.wanted()
        for _ in range(wanted - len(staying)):
            self._start(now, self._fleet.startup_seconds)
        # The youngest are removed first; one that accepts requests must remain.
        for each in reversed(staying[wanted:]):
            if sum(other.takes(now) for other in self.replicas) > each.takes(now):
                each.leaves = now

    def _start(self, now: float, startup: float) -> None:
        setup, number = self._setup, len(self.replicas)
        engine = SimulatedEngine(
            setup.config,
            setup.device,
            setup.costs,
            content_keys=keys_of(setup.config, self._requests.trace),
            on_finish=lambda index: self._ended(number, index),
            start=now + startup,
        )
        self.replicas.append(_Replica(engine, now, now + startup))

    def _ended(self, replica: int, index: int) -> None:
        outcome = self.replicas[replica].engine.outcomes[index]
        outputs = outcome.tokens
        self._router.ended(index, outputs)
        if self._scaler is not None:
            self._scaler.ended(outputs)
        for turn in self._requests.after(index, outcome.finished):
            self._take(turn, replica)
        if self._progress is not None:
            self._progress(1)


class Scaler:
    """Decides the number of replicas."""

    def __init__(self, fleet: FleetConfig, costs: CostModel):
        self._fleet = fleet
        self._forecast: Forecast = FORECASTS[fleet.forecast]()
        self._seconds = token_seconds(costs)
        self._step = costs.seconds(_typical_step())
        self._prompt = self._output = 0.0  # moving averages of lengths

    def arrived(self, prompt_tokens: int) -> None:
        self._prompt = _blend(self._prompt, prompt_tokens)

    def ended(self, output_tokens: int) -> None:
        if output_tokens:
            self._output = _blend(self._output, output_tokens)

    def observe(self, rate: float) -> None:
        """Records the arrival rate, in requests a second, of the interval that has ended."""
        self._forecast.observe(rate)

    def wanted(self) -> int:
        """Returns the replicas needed at the time when one that is requested now would be ready."""
        fleet = self._fleet
        rate = self._forecast.rate(fleet.startup_seconds / fleet.interval_seconds)
        if fleet.scaling == "forecast":
            count = math.ceil(rate / (fleet.replica_rate * fleet.target_load))
            return min(max(count, fleet.min_replicas), fleet.max_replicas)
        counts = range(fleet.min_replicas, fleet.max_replicas + 1)
        return min(counts, key=lambda count: (self._price(count, rate), count))

    def _price(self, count: int, rate: float) -> float:
        """Returns replica-seconds a second: of the replicas, and of the latency that `count` of them cause.

        The latency is that of a request alone over the idle share of a queue, 1 / (1 - load).
        """
        load = rate / (count * self._fleet.replica_rate)
        alone = self._prompt * self._seconds[0] + self._output * self._step
        # Beyond the capacity more replicas always cost less, whatever latency is worth.
        latency = alone / (1 - load) if load < 1 else 1e9 * load
        return count + self._fleet.latency_price * rate * latency


def make_router(routing: str, costs: CostModel) -> Router:
    """Creates the router of that name."""
    if routing == "predicted_work":
        return PredictedWork(*token_seconds(costs))
    return RoundRobin() if routing == "round_robin" else LeastLoaded()


def token_seconds(costs: CostModel) -> tuple[float, float]:
    """Returns the device seconds of a prompt token and an output token, where a step has many of them."""
    return costs.preemption.recompute_seconds_per_token, costs.seconds(_typical_step()) / _TYPICAL_ROWS


def _typical_step() -> StepShape:
    rows = _TYPICAL_ROWS
    return StepShape(rows, rows, rows, 512.0 * rows, 0, 0.0, 0.0, 512)


def _blend(average: float, value: float) -> float:
    return value if not average else average + 0.05 * (value - average)
