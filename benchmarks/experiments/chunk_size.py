"""Tokens of a prompt, and of all prompts, in a step: `python -m benchmarks.experiments.chunk_size`."""

from __future__ import annotations

import numpy as np

from benchmarks.experiments import harness
from benchmarks.experiments.cases import Case, Experiment, Panel, Scale
from benchmarks.experiments.chunked_prefill import LATENCIES, PANELS, WORK
from benchmarks.experiments.workloads import beside_decodes
from jaxserve.simulator.traces import Trace


def make_cases(scale: Scale) -> list[Case]:
    """Long prompts, two at a time, beside requests that decode; the same budget for all."""
    small = scale.name == "engine"
    trace = pairs_of_prompts(1500, 16, 1200, 4, 0.8) if small else pairs_of_prompts(8000, 64, 900, 10, 0.9)
    chunks = (32, 64, 128, 256) if small else (256, 512, 1024, 2048)
    limits = (64, 256, 1024) if small else (512, 2048, 8192)
    found = [
        Case(f"{chunk:,}", trace, x=chunk, series="chunk size", options={"long_prefill_token_threshold": chunk})
        for chunk in chunks
    ]
    found += [
        Case(f"{limit:,}", trace, x=limit, series="prefill limit of a step",
             options={"prefill_share": limit / scale.tokens, "fill_buckets": False})
        for limit in limits
    ]  # fmt: skip
    return [*found, Case("whole", trace, series="whole prompts", options={"enable_chunked_prefill": False})]


def pairs_of_prompts(length: int, rows: int, output: int, pairs: int, seconds: float) -> Trace:
    """Two long prompts at a time, so many seconds apart, beside `rows` requests that decode."""
    return beside_decodes(rows, output, length, np.repeat(seconds * np.arange(1, pairs + 1), 2).tolist())


EXPERIMENT = Experiment(
    name="chunk_size",
    question="Long prompts by the tokens of each, and of all, in a step, beside requests that decode",
    cases=make_cases,
    panels=PANELS,
    columns=(*LATENCIES, Panel("prompt.ttft_p99", "p99", "", 1e3), *WORK),
    xlabel="prefill tokens in a step, of each prompt or of all",
    log_x=True,
    limits={
        "engine": {"max_num_seqs": 32, "max_num_batched_tokens": 2048},
        "simulation": {"max_num_seqs": 128, "max_num_batched_tokens": 8192},
    },
)

if __name__ == "__main__":
    raise SystemExit(harness.main(EXPERIMENT))
