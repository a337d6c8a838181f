"""Sequences that run at once, from 1 to 256: `python -m benchmarks.experiments.batch_size`."""

from __future__ import annotations

from benchmarks.experiments import cases, harness
from benchmarks.experiments.cases import Case, Experiment, Scale
from benchmarks.experiments.workloads import chat

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def make_cases(scale: Scale) -> list[Case]:
    """As many clients as may run, each with its next request when the last one ends."""
    most = 512 if scale.name == "engine" else 2048
    trace = chat(scale, requests=most)
    return [
        Case(
            f"{size}", trace.part(0, min(most, max(32 if scale.name == "engine" else 64, 8 * size))), x=size,
            options={"max_num_seqs": size}, concurrency=size,
        )
        for size in SIZES
    ]  # fmt: skip


EXPERIMENT = Experiment(
    name="batch_size",
    question="What more sequences at once cost each of them",
    cases=make_cases,
    panels=(cases.THROUGHPUT, cases.SERVICE, cases.SERVICE_P99, cases.TTFT, cases.TPOT, cases.ITL_P99),
    columns=(
        cases.THROUGHPUT, cases.SERVICE, cases.SERVICE_P99, cases.TTFT, cases.TTFT_P99, cases.TPOT, cases.ITL,
        cases.ITL_P99, cases.UTILISATION, cases.SEQUENCES,
    ),
    xlabel="sequences at once (max_num_seqs)",
    log_x=True,
    limits={"engine": {"max_num_seqs": 256}, "simulation": {"max_num_seqs": 256}},
)  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(harness.main(EXPERIMENT))
