"""What long requests do to short ones: `python -m benchmarks.experiments.mixed_lengths`."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from benchmarks.experiments import cases, harness
from benchmarks.experiments.cases import Case, Experiment, Panel, Scale
from benchmarks.experiments.workloads import Tenant, tenants
from jaxserve.simulator.simulation import ClientRule

WHO = (Tenant("short", 0.7, prompt=0.5, output=0.5), Tenant("long", 0.3, prompt=6.0, output=3.0))
WAYS: dict[str, dict[str, Any]] = {
    "whole prompts": {"enable_chunked_prefill": False},
    "chunked": {},
    "chunked, prefill share 0.3": {"prefill_share": 0.3},
    "chunked, length balanced": {"formation": "length_balanced"},
    "chunked, throughput formation": {"formation": "throughput"},
    "chunked, sjf": {"policy": "sjf"},
    "chunked, long ones give way": {"preempt_length_ratio": 10.0},
    "separated": {"mode": "separated"},
}


def make_cases(scale: Scale) -> list[Case]:
    """70 % short and 30 % long at 90 % of capacity, and the same short ones without the long."""
    trace = tenants(scale, WHO)
    trace = dataclasses.replace(trace, prompt_tokens=np.minimum(trace.prompt_tokens, scale.tokens // 2))
    alone = trace.select(np.array(trace.tenants) == "short")
    client = ClientRule(16 * scale.output)
    found = [Case("short ones alone", alone, load=0.9, reference=trace, client=client)]
    return found + [Case(name, trace, options=options, load=0.9, client=client) for name, options in WAYS.items()]


EXPERIMENT = Experiment(
    name="mixed_lengths",
    question="What 30 % long requests do to 70 % short ones, at 90 % of capacity",
    cases=make_cases,
    panels=(
        Panel("short.ttft_mean", "", "short: mean TTFT, ms", 1e3),
        Panel("short.ttft_p99", "", "short: p99 TTFT, ms", 1e3),
        Panel("short.itl_p99", "", "short: p99 ITL, ms", 1e3),
        Panel("short.e2e_mean", "", "short: mean end to end, s"),
        Panel("long.ttft_mean", "", "long: mean TTFT, ms", 1e3),
        Panel("long.e2e_mean", "", "long: mean end to end, s"),
        cases.THROUGHPUT,
    ),
    by_tenant=True,
    limits={
        "engine": {"max_num_seqs": 32, "max_num_batched_tokens": 1024},
        "simulation": {"max_num_seqs": 64, "max_num_batched_tokens": 8192, "max_model_len": 16384},
    },
)

if __name__ == "__main__":
    raise SystemExit(harness.main(EXPERIMENT))
