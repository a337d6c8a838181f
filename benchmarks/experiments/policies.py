"""Who goes first, by mean, by p99 and by tenant: `python -m benchmarks.experiments.policies`."""

from __future__ import annotations

from typing import Any

from benchmarks.experiments import cases, harness
from benchmarks.experiments.cases import Case, Experiment, Panel, Scale
from benchmarks.experiments.workloads import FLOOD, tenants
from jaxserve.simulator.simulation import ClientRule

POLICIES: dict[str, dict[str, Any]] = {
    "fcfs": {},
    "sjf": {"policy": "sjf"},
    "priority": {"policy": "priority"},
    "fair": {"policy": "fair"},
    "deadline": {"policy": "deadline"},
    "deadline, late ones dropped": {"policy": "deadline", "drop_late": True},
}


TARGETS = {"engine": 0.3, "simulation": 2.0}


def make_cases(scale: Scale) -> list[Case]:
    """Three tenants at twice the capacity, of which chat floods and code has priority; how long an output will be stays
    hidden behind one max_tokens."""
    trace = tenants(scale, FLOOD, priorities={"code": 5}, requests=2 * scale.requests)
    client = ClientRule(16 * scale.output)
    target = {"ttft_target": TARGETS[scale.name]}
    return [
        Case(name, trace, options=options | (target if "deadline" in name else {}), client=client, load=2.0)
        for name, options in POLICIES.items()
    ]


EXPERIMENT = Experiment(
    name="policies",
    question="Policies at twice the capacity: chat floods (80 % of the requests), code has priority",
    cases=make_cases,
    engine_rounds=3,
    panels=(
        cases.TTFT,
        cases.TTFT_P99,
        cases.E2E,
        *(Panel(f"{name}.ttft_mean", "", f"{name}: mean TTFT, ms", 1e3) for name in ("chat", "code", "write")),
        cases.IN_TIME,
        cases.JAIN,
    ),
    columns=(*cases.COLUMNS, cases.IN_TIME, cases.JAIN),
    ttft_target=TARGETS,
    by_tenant=True,
    limits={"engine": {"max_num_seqs": 32}, "simulation": {"max_num_seqs": 64}},
)

if __name__ == "__main__":
    raise SystemExit(harness.main(EXPERIMENT))
