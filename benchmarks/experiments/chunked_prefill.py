"""Prompts whole or in chunks, beside requests that decode: `python -m benchmarks.experiments.chunked_prefill`."""

from __future__ import annotations

from benchmarks.experiments import cases, harness
from benchmarks.experiments.cases import Case, Experiment, Panel, Scale
from benchmarks.experiments.workloads import beside_decodes


def make_cases(scale: Scale) -> list[Case]:
    """Long prompts, one after another, while short requests decode."""
    small = scale.name == "engine"
    lengths = (128, 256, 512, 1024, 1900) if small else (1000, 2000, 5000, 10000, 20000)
    chunks = (64, 128, 256) if small else (512, 1024, 2048)
    rows = 16 if small else 64
    found = []
    for length in lengths:
        trace = beside_decodes(rows, 60 if small else 600, length, [0.0] * (6 if small else 20))
        ways = {"whole": {"enable_chunked_prefill": False}}
        # what the rows that decode leave of the step is the chunk
        ways |= {f"chunked, steps of {chunk}": {"max_num_batched_tokens": chunk} for chunk in chunks}
        found += [Case(f"{length}", trace, x=length, series=way, options=options) for way, options in ways.items()]
    return sorted(found, key=lambda case: case.series != "whole" and int(case.series.split()[-1]))


PANELS = (
    Panel("decoding.itl_max", "", "decoding requests: longest ITL, ms", 1e3),
    Panel("decoding.itl_p99", "", "decoding requests: p99 ITL, ms", 1e3),
    Panel("decoding.tpot_mean", "", "decoding requests: mean TPOT, ms", 1e3),
    Panel("prompt.ttft_mean", "", "long prompts: mean TTFT, ms", 1e3),
)
LATENCIES = (
    Panel("decoding.itl_mean", "ITL ms", "", 1e3),
    Panel("decoding.itl_p99", "p99 ITL ms", "", 1e3),
    Panel("decoding.itl_max", "longest ITL ms", "", 1e3),
    Panel("decoding.tpot_mean", "TPOT ms", "", 1e3),
    Panel("prompt.ttft_mean", "long TTFT ms", "", 1e3),
)
WORK = (cases.UTILISATION, Panel("steps", "steps", ""))
"""Panels, and two parts of the columns, of experiments with `beside_decodes`."""


EXPERIMENT = Experiment(
    name="chunked_prefill",
    question="Long prompts, whole or in chunks, beside requests that decode",
    cases=make_cases,
    panels=PANELS,
    columns=(*LATENCIES, *WORK),
    xlabel="tokens of a long prompt",
    log_x=True,
    limits={
        "engine": {"max_num_seqs": 32, "max_num_batched_tokens": 2048},
        "simulation": {"max_num_seqs": 128, "max_num_batched_tokens": 20480, "max_model_len": 32768},
    },
)

if __name__ == "__main__":
    raise SystemExit(harness.main(EXPERIMENT))
