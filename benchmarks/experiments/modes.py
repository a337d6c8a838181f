"""Batching modes compared: `python -m benchmarks.experiments.modes`."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from benchmarks.experiments import cases, harness
from benchmarks.experiments.cases import Case, Experiment, Scale
from benchmarks.experiments.workloads import ten_requests

BATCH = 16
MODES: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "static": {"mode": "static", "batch_size": BATCH, "max_wait_seconds": 0.5},
    "dynamic": {"mode": "dynamic", "batch_size": BATCH, "max_wait_seconds": 0.5},
    "continuous": {"enable_chunked_prefill": False},
    "continuous, chunked": {},
    "separated, prefill first": {"mode": "separated", "phase_order": "prefill_first"},
    "separated, alternating": {"mode": "separated", "phase_order": "alternating"},
    "separated, decode first": {"mode": "separated", "phase_order": "decode_first"},
}


def make_cases(scale: Scale) -> list[Case]:
    """The ten requests of 10 to 100 output tokens, 40 times over: all at once, and at 60 % of capacity."""
    small = scale.name == "engine"
    trace = ten_requests(40, 8 if small else 256, 1 if small else 4)
    some = trace.part(0, 120 if small else 400)
    arriving = dataclasses.replace(some, arrivals=np.cumsum(np.random.default_rng(0).exponential(1.0, len(some))))
    few = trace.part(0, 30)  # one at a time takes as long a request however many there are
    found = [
        Case(name, few if name == "none" else trace, series="all at once", options=options)
        for name, options in MODES.items()
    ]
    return found + [
        Case(name, arriving, series="arriving at 60 % of capacity", options=options, load=0.6)
        for name, options in MODES.items()
        if name != "none"  # it would only queue
    ]


EXPERIMENT = Experiment(
    name="modes",
    question="Batching modes on requests of 10 to 100 output tokens",
    cases=make_cases,
    engine_rounds=3,
    panels=(cases.THROUGHPUT, dataclasses.replace(cases.TTFT, log=True), cases.E2E_P99, cases.UTILISATION),
    limits={side: {"max_num_seqs": BATCH} for side in ("engine", "simulation")},
)

if __name__ == "__main__":
    raise SystemExit(harness.main(EXPERIMENT))
