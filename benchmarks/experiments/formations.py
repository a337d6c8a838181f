"""How a batch is chosen from the queue: `python -m benchmarks.experiments.formations`."""

from __future__ import annotations

from benchmarks.experiments import cases, harness
from benchmarks.experiments.cases import Case, Experiment, Scale
from benchmarks.experiments.workloads import tenants
from jaxserve.config.scheduling import FORMATIONS
from jaxserve.simulator.simulation import ClientRule


def make_cases(scale: Scale) -> list[Case]:
    """Three tenants in overload, so that there is a queue to choose from; write has priority, then chat. Nobody loses a
    place to a request of higher priority: what is compared is whom a formation chooses."""
    trace = tenants(scale, priorities={"chat": 5, "write": 8})
    client = ClientRule(16 * scale.output)
    adaptive = {"adaptive_batch_size": True, "target_batch_tokens": scale.seqs * scale.prompt // 2}
    ways = {name: {"formation": name} for name in FORMATIONS} | {"greedy, adaptive size": adaptive}
    found = [
        Case(name, trace, series="continuous", options=options, client=client, load=scale.overload)
        for name, options in ways.items()
    ]
    static = {"mode": "static", "batch_size": scale.seqs // 2, "max_wait_seconds": 0.1}
    found += [
        Case(name, trace, series="static batches", options=static | {"formation": name}, client=client, load=0.7)
        for name in FORMATIONS
    ]
    dynamic = static | {"mode": "dynamic", "length_bucket": scale.prompt}
    return [*found, Case("length buckets", trace, series="dynamic batches", options=dynamic, client=client, load=0.7)]


EXPERIMENT = Experiment(
    name="formations",
    question="Formations of a batch: continuous in overload, static at 0.7 of what continuous can do",
    cases=make_cases,
    engine_rounds=3,
    panels=(cases.THROUGHPUT, cases.TTFT, cases.TTFT_P99, cases.E2E, cases.E2E_P99, cases.UTILISATION),
    by_tenant=True,
    limits={
        "engine": {"max_num_seqs": 32, "preempt_priority_gap": None},
        "simulation": {"max_num_seqs": 64, "preempt_priority_gap": None},
    },
)

if __name__ == "__main__":
    raise SystemExit(harness.main(EXPERIMENT))
