"""How a batch is chosen from the queue: `python -m benchmarks.experiments.formations`."""

from __future__ import annotations

from benchmarks.experiments import cases, harness
from benchmarks.experiments.cases import Case, Experiment, Scale
from benchmarks.experiments.workloads import tenants
from jaxserve.scheduler_config import FORMATIONS
from jaxserve.simulator.simulation import ClientRule


def make_cases(scale: Scale) -> list[Case]:
    """Three tenants at 1.3 times capacity, so that there is a queue to choose from; chat has priority."""
    trace = tenants(scale, priorities={"chat": 5, "write": 8})
    client = ClientRule(16 * scale.output)
    found = [Case(name, trace, options={"formation": name}, client=client, load=1.3) for name in FORMATIONS]
    adaptive = {"adaptive_batch_size": True, "target_batch_tokens": scale.seqs * scale.prompt // 2}
    return [*found, Case("greedy, adaptive size", trace, options=adaptive, client=client, load=1.3)]


EXPERIMENT = Experiment(
    name="formations",
    question="Formations of a batch, three tenants at 1.3 times capacity",
    cases=make_cases,
    panels=(cases.THROUGHPUT, cases.TTFT, cases.TTFT_P99, cases.E2E, cases.E2E_P99, cases.UTILISATION),
    by_tenant=True,
    limits={"engine": {"max_num_seqs": 32}, "simulation": {"max_num_seqs": 64}},
)

if __name__ == "__main__":
    raise SystemExit(harness.main(EXPERIMENT))
