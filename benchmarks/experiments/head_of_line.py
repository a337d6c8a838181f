"""Short requests that find every place taken by a long one: `python -m benchmarks.experiments.head_of_line`."""

from __future__ import annotations

import numpy as np

from benchmarks.experiments import cases, harness
from benchmarks.experiments.cases import Case, Experiment, Panel, Scale
from jaxserve.simulator.traces import Trace, make_trace


def make_cases(scale: Scale) -> list[Case]:
    """As many long requests as may run at once, and short ones that come while they decode."""
    trace = taken_places(scale)
    alone = trace.select(np.array(trace.tenants) == "long")
    give_way = {"preempt_length_ratio": 10.0}
    return [
        Case("long alone", alone),
        Case("keep their places", trace),
        Case("give way, computed again", trace, options=give_way | {"preemption_mode": "recompute"}),
        Case("give way, swapped", trace, options=give_way | {"preemption_mode": "swap"}),
    ]


def taken_places(scale: Scale) -> Trace:
    """max_num_seqs long requests, all there at once, and then half as many short ones, one after another."""
    first, apart = (2.0, 0.15) if scale.name == "engine" else (8.0, 0.75)
    rows, short = scale.seqs, scale.seqs // 2
    return make_trace(
        "places taken",
        np.concatenate([np.zeros(rows), first + apart * np.arange(short)]),
        [2 * scale.prompt] * rows + [scale.prompt // 2] * short,
        [20 * scale.output] * rows + [scale.output // 2] * short,
        tenants=["long"] * rows + ["short"] * short,
    )


EXPERIMENT = Experiment(
    name="head_of_line",
    question="Short requests that find every place taken by long ones",
    cases=make_cases,
    panels=(
        Panel("short.ttft_mean", "", "short: mean TTFT, ms", 1e3, log=True),
        Panel("short.ttft_p99", "", "short: p99 TTFT, ms", 1e3, log=True),
        Panel("long.e2e_mean", "", "long: mean end to end, s"),
        Panel("long.e2e_p99", "", "long: p99 end to end, s"),
        cases.THROUGHPUT,
        cases.PREEMPTIONS,
    ),
    columns=(
        cases.THROUGHPUT,
        cases.TTFT,
        cases.TTFT_P99,
        cases.ITL_P99,
        cases.E2E,
        cases.E2E_P99,
        cases.PREEMPTIONS,
        cases.SWAPPED,
    ),
    by_tenant=True,
    limits={
        "engine": {"max_num_seqs": 32, "max_num_batched_tokens": 1024},
        "simulation": {
            "max_num_seqs": 64, "max_num_batched_tokens": 8192, "max_model_len": 16384, "swap_space": 64.0,
        },
    },
)  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(harness.main(EXPERIMENT))
