"""Tokens of a step at most: `python -m benchmarks.experiments.token_budget`."""

from __future__ import annotations

import dataclasses

from benchmarks.experiments import cases, harness
from benchmarks.experiments.cases import Case, Experiment, Scale
from benchmarks.experiments.workloads import chat


def make_cases(scale: Scale) -> list[Case]:
    """Prompts four times as long as usual, at 80 % of what the engine with the largest budget gets through."""
    trace = chat(dataclasses.replace(scale, prompt=4 * scale.prompt))
    budgets = (64, 128, 256, 512, 1024, 2048) if scale.name == "engine" else (512, 1024, 2048, 4096, 8192)
    return [
        Case(f"{budget}", trace, x=budget, series=f"load {load}", options={"max_num_batched_tokens": budget}, load=load)
        for load in (0.5, 0.8)
        for budget in budgets
    ]


EXPERIMENT = Experiment(
    name="token_budget",
    question="Tokens of a step at most: early first tokens against even gaps",
    cases=make_cases,
    panels=(cases.THROUGHPUT, cases.TTFT, cases.TTFT_P99, cases.TPOT, cases.ITL_P99, cases.E2E),
    xlabel="max_num_batched_tokens",
    log_x=True,
    limits={
        "engine": {"max_num_seqs": 64, "max_num_batched_tokens": 2048},
        "simulation": {"max_num_seqs": 128, "max_num_batched_tokens": 8192},
    },
)

if __name__ == "__main__":
    raise SystemExit(harness.main(EXPERIMENT))
