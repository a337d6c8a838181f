"""How sequences give way, and which: `python -m benchmarks.experiments.preemption`."""

from __future__ import annotations

from benchmarks.experiments import cases, harness
from benchmarks.experiments.cases import Case, Experiment, Scale
from benchmarks.experiments.workloads import at_once, tenants
from jaxserve.config.scheduling import PREEMPTION_MODES, VICTIMS
from jaxserve.simulator.simulation import ClientRule


def make_cases(scale: Scale) -> list[Case]:
    """A pool that holds far fewer sequences than may run, so that many lose their pages."""
    trace = at_once(tenants(scale))
    client = ClientRule(16 * scale.output)
    pages = 112 if scale.name == "engine" else 4096
    found = [
        Case(kind, trace, series="kind", options={"preemption_mode": kind}, client=client, num_pages=pages)
        for kind in PREEMPTION_MODES
    ]
    found += [
        Case(f"victim: {victim}", trace, series="victim, by recompute", client=client, num_pages=pages,
             options={"victim": victim, "preemption_mode": "recompute"})
        for victim in VICTIMS
    ]  # fmt: skip
    watermark = {"watermark": 0.1, "preemption_mode": "recompute"}
    reserve = {"page_reservation": "max_tokens"}
    return [
        *found,
        Case("watermark 0.1", trace, series="kept from happening", options=watermark, client=client, num_pages=pages),
        Case("max_tokens reserved", trace, series="kept from happening", options=reserve, client=client,
             num_pages=pages),
    ]  # fmt: skip


EXPERIMENT = Experiment(
    name="preemption",
    question="Preemption in a pool that is far too small: kinds and victims",
    cases=make_cases,
    panels=(cases.THROUGHPUT, cases.TTFT, cases.E2E, cases.E2E_P99, cases.PREEMPTIONS, cases.SWAPPED),
    columns=(
        cases.THROUGHPUT, cases.TTFT, cases.TTFT_P99, cases.TPOT, cases.ITL, cases.ITL_P99, cases.E2E, cases.E2E_P99,
        cases.SEQUENCES, cases.PREEMPTIONS, cases.SWAPPED,
    ),
    limits={"simulation": {"swap_space": 64.0}},
)  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(harness.main(EXPERIMENT))
