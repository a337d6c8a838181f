"""Prefill tokens as a share of steps that decode too: `python -m benchmarks.experiments.prefill_share`."""

from __future__ import annotations

import dataclasses

from benchmarks.experiments import cases, harness
from benchmarks.experiments.cases import Case, Experiment, Scale
from benchmarks.experiments.workloads import chat


def make_cases(scale: Scale) -> list[Case]:
    """Prompts four times as long as usual, at 80 % of capacity."""
    trace = chat(dataclasses.replace(scale, prompt=4 * scale.prompt))
    return [
        Case(
            f"{share:g}", trace, x=share, series=name, options={"prefill_share": share, "fill_buckets": fill}, load=0.8
        )
        for name, fill in (("padding left as it is", False), ("padding filled with prompts", True))
        for share in (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
    ]


EXPERIMENT = Experiment(
    name="prefill_share",
    question="Prefill tokens as a share of a step that decodes too",
    cases=make_cases,
    panels=(cases.THROUGHPUT, cases.TTFT, cases.TTFT_P99, cases.TPOT, cases.ITL_P99, cases.UTILISATION),
    xlabel="prefill_share",
    limits={"engine": {"max_num_batched_tokens": 512}, "simulation": {"max_num_batched_tokens": 4096}},
)

if __name__ == "__main__":
    raise SystemExit(harness.main(EXPERIMENT))
