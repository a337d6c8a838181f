"""Who goes first, by mean, by p99 and by tenant: `python -m benchmarks.experiments.policies`."""

from __future__ import annotations

from typing import Any

from benchmarks.experiments import cases, harness
from benchmarks.experiments.cases import Case, Experiment, Panel, Scale
from benchmarks.experiments.workloads import tenants
from jaxserve.simulator.simulation import ClientRule

POLICIES: dict[str, dict[str, Any]] = {
    "fcfs": {},
    "sjf": {"policy": "sjf"},
    "priority": {"policy": "priority"},
    "fair": {"policy": "fair"},
    "deadline": {"policy": "deadline"},
}


def make_cases(scale: Scale) -> list[Case]:
    """Three tenants at 1.3 times capacity; what they ask for stays hidden behind one max_tokens. Chat has priority."""
    trace = tenants(scale, priorities={"chat": 5}, requests=2 * scale.requests)
    client = ClientRule(16 * scale.output)
    target = {"ttft_target": 1.0 if scale.name == "engine" else 2.0}
    return [
        Case(name, trace, options=options | (target if name == "deadline" else {}), client=client, load=1.3)
        for name, options in POLICIES.items()
    ]


EXPERIMENT = Experiment(
    name="policies",
    question="Policies, three tenants at 1.3 times capacity (chat 55 % of the requests, code 25 %, write 20 %)",
    cases=make_cases,
    panels=(
        cases.TTFT,
        cases.TTFT_P99,
        cases.E2E,
        cases.E2E_P99,
        *(Panel(f"{name}.ttft_mean", "", f"{name}: mean TTFT, ms", 1e3) for name in ("chat", "code", "write")),
        cases.JAIN,
    ),
    columns=(*cases.COLUMNS, cases.JAIN),
    by_tenant=True,
    limits={"engine": {"max_num_seqs": 32}, "simulation": {"max_num_seqs": 64}},
)

if __name__ == "__main__":
    raise SystemExit(harness.main(EXPERIMENT))
