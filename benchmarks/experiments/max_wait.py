"""How long a batch waits to fill: `python -m benchmarks.experiments.max_wait`."""

from __future__ import annotations

import dataclasses

from benchmarks.experiments import cases, harness
from benchmarks.experiments.cases import Case, Experiment, Scale
from benchmarks.experiments.workloads import chat

WAITS = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)


def make_cases(scale: Scale) -> list[Case]:
    """Static and dynamic batches at 30 % of what continuous batching gets through, and that beside them."""
    trace = chat(scale)
    found = [
        Case(f"{wait:g} s", trace, x=wait, series=mode, load=0.3,
             options={"mode": mode, "batch_size": scale.seqs, "max_wait_seconds": wait})
        for mode in ("static", "dynamic")
        for wait in WAITS
    ]  # fmt: skip
    return [*found, Case("continuous", trace, series="continuous", load=0.3)]


EXPERIMENT = Experiment(
    name="max_wait",
    question="How long a batch waits to fill, at 30 % of what continuous batching can do",
    cases=make_cases,
    panels=(
        cases.THROUGHPUT,
        *(dataclasses.replace(panel, log=True) for panel in (cases.TTFT, cases.TTFT_P99, cases.E2E)),
        cases.UTILISATION,
        cases.SEQUENCES,
    ),
    xlabel="max_wait_seconds",
    limits={"engine": {"max_num_seqs": 16}, "simulation": {"max_num_seqs": 32}},
)

if __name__ == "__main__":
    raise SystemExit(harness.main(EXPERIMENT))
