"""Settings that follow the load, and the presets: `python -m benchmarks.experiments.load_profile`."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.experiments import cases, harness
from benchmarks.experiments.cases import Case, Experiment, Scale
from benchmarks.experiments.workloads import tenants
from jaxserve.config import gin_config
from jaxserve.simulator.simulation import ClientRule

PRESETS = ("interactive", "balanced", "throughput")
LOADS = (0.2, 0.5, 0.8, 1.1)
NEVER = 1e9
"""A bound that no load reaches."""


def make_cases(scale: Scale) -> list[Case]:
    """The profile, the three that it chooses from, each on its own, steps as small as those of latency with prompts
    chunked, and the presets of configs/presets/."""
    trace = tenants(scale, requests=2 * scale.requests)
    client = ClientRule(16 * scale.output)
    small = scale.name == "engine"
    seqs, (low, middle, high) = (64, (64, 256, 1024)) if small else (128, (512, 2048, 4096))
    tokens = {"latency_tokens": low, "balanced_tokens": middle, "throughput_tokens": high}
    follow = {"load_profile": True, **tokens}
    ways: dict[str, dict[str, Any]] = {
        "load_profile": follow,
        "always latency": follow | {"load_low": NEVER, "load_high": NEVER},
        "always balanced": follow | {"load_low": 0.0, "load_high": NEVER},
        "always throughput": follow | {"load_low": 0.0, "load_high": 0.0},
        "small chunked steps": {"max_num_batched_tokens": low},
    }
    found = [
        Case(f"load {load:g}", trace, x=load, series=way, client=client, load=load,
             options={"max_num_seqs": seqs} | options)
        for way, options in ways.items()
        for load in LOADS
    ]  # fmt: skip
    for preset in PRESETS:
        server, _ = gin_config.load(f"{'tiny' if scale.name == 'engine' else 'llama'}.gin,presets/{preset}.gin")
        found += [
            Case(f"load {load:g}", trace, x=load, series=f"preset {preset}", client=client, load=load,
                 scheduler=server.engine.scheduler)
            for load in LOADS
        ]  # fmt: skip
    return found


EXPERIMENT = Experiment(
    name="load_profile",
    question="Settings that follow the load, and presets, from idle to overload",
    cases=make_cases,
    panels=(
        cases.THROUGHPUT,
        dataclasses.replace(cases.TTFT, log=True),
        dataclasses.replace(cases.TTFT_P99, log=True),
        cases.TPOT,
        cases.ITL_P99,
        cases.UTILISATION,
    ),
    xlabel="load (arrivals over what the engine can do)",
    limits={
        "engine": {"max_num_seqs": 256, "max_num_batched_tokens": 8192},
        "simulation": {"max_num_seqs": 256, "max_num_batched_tokens": 8192},
    },
)

if __name__ == "__main__":
    raise SystemExit(harness.main(EXPERIMENT))
