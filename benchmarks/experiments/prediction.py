"""What a wrong prediction of output lengths costs shortest-first: `python -m benchmarks.experiments.prediction`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping

import numpy as np

from benchmarks.experiments import cases, harness
from benchmarks.experiments.cases import Case, Experiment, Scale
from benchmarks.experiments.workloads import tenants
from jaxserve.request import EngineRequest
from jaxserve.scheduler.kendall import kendall_tau
from jaxserve.simulator.simulation import ClientRule

ERRORS = (0.0, 0.25, 0.5, 1.0, 2.0)


class NoisyOracle:
    """Knows the true lengths, times a log-normal error of the given sigma."""

    def __init__(self, lengths: Mapping[str, int], sigma: float):
        rng = np.random.default_rng(0)
        noise = np.exp(rng.normal(0.0, sigma, len(lengths))) if sigma else np.ones(len(lengths))
        self._expected = {name: length * error for (name, length), error in zip(lengths.items(), noise, strict=True)}
        self._ranked: deque[tuple[float, int]] = deque(maxlen=512)

    @property
    def kendall_tau(self) -> float | None:
        return kendall_tau(self._ranked)

    def expected(self, request: EngineRequest) -> float:
        return max(1.0, float(self._expected[request.request_id]))

    def observe(self, request: EngineRequest, output_tokens: int, expected: float) -> None:
        self._ranked.append((expected, output_tokens))


def _oracle(sigma: float) -> Callable[[Mapping[str, int]], NoisyOracle]:
    return lambda lengths: NoisyOracle(lengths, sigma)


def make_cases(scale: Scale) -> list[Case]:
    """Three tenants in overload, under fcfs and under sjf with an oracle of rising error."""
    trace = tenants(scale, requests=2 * scale.requests)
    client = ClientRule(16 * scale.output)
    sjf = {"policy": "sjf", "sjf_ageing": 1.0}
    found = [
        Case(f"sigma {sigma:g}", trace, x=sigma, series="sjf, true lengths with an error", options=sjf, client=client,
             load=scale.overload, predictor=_oracle(sigma))
        for sigma in ERRORS
    ]  # fmt: skip
    found.append(
        Case("own predictor", trace, series="sjf, own predictor", options=sjf, client=client, load=scale.overload)
    )
    return [*found, Case("fcfs", trace, series="fcfs", client=client, load=scale.overload)]


EXPERIMENT = Experiment(
    name="prediction",
    question="Error of predicted output lengths against the gain of shortest-first",
    cases=make_cases,
    panels=(cases.TTFT, cases.E2E, cases.E2E_P99, cases.TAU),
    xlabel="sigma of log(predicted / true length)",
    limits={"engine": {"max_num_seqs": 32}, "simulation": {"max_num_seqs": 64}},
)

if __name__ == "__main__":
    raise SystemExit(harness.main(EXPERIMENT))
