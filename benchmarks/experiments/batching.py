"""The experiments on how batches are formed and in which order requests join them, as data.

Each function makes the cases of the experiment that has its name, in the sizes that suit a side; what is shown of them
stands above it. `python -m benchmarks.experiments NAME` runs one.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.experiments import cases
from benchmarks.experiments.cases import Case, Panel, Scale, experiment
from benchmarks.experiments.workloads import FLOOD, chat, ten_requests, tenants
from jaxserve.config import gin_config
from jaxserve.config.scheduling import FORMATIONS
from jaxserve.request import EngineRequest
from jaxserve.scheduler.kendall import kendall_tau
from jaxserve.simulator.simulation import ClientRule

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


@experiment(
    question="Batching modes on requests of 10 to 100 output tokens",
    engine_rounds=3,
    panels=(cases.THROUGHPUT, dataclasses.replace(cases.TTFT, log=True), cases.E2E_P99, cases.UTILIZATION),
    limits={side: {"max_num_seqs": BATCH} for side in ("engine", "simulation")},
)
def modes(scale: Scale) -> list[Case]:
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


@experiment(
    question="Formations of a batch: continuous in overload, static at 0.7 of what continuous can do",
    engine_rounds=3,
    panels=(cases.THROUGHPUT, cases.TTFT, cases.TTFT_P99, cases.E2E, cases.E2E_P99, cases.UTILIZATION),
    by_tenant=True,
    limits={
        "engine": {"max_num_seqs": 32, "preempt_priority_gap": None},
        "simulation": {"max_num_seqs": 64, "preempt_priority_gap": None},
    },
)
def formations(scale: Scale) -> list[Case]:
    """Three tenants in overload, so that there is a queue to choose from; write has priority, then chat. Nobody loses a
    place to a request of higher priority: what is compared is whom a formation chooses."""
    trace = tenants(scale, priorities={"chat": 5, "write": 8})
    client = ClientRule(16 * scale.output)
    adaptive = {"adaptive_batch_size": True, "target_batch_tokens": scale.seqs * scale.prompt // 2}
    ways = {name: {"formation": name} for name in FORMATIONS} | {"greedy, adaptive size": adaptive}
    found = [
        Case(name, trace, series="continuous", options=options, client=client, load=scale.overload)
        for name, options in ways.items()
    ]
    static = {"mode": "static", "batch_size": scale.seqs // 2, "max_wait_seconds": 0.1}
    found += [
        Case(name, trace, series="static batches", options=static | {"formation": name}, client=client, load=0.7)
        for name in FORMATIONS
    ]
    dynamic = static | {"mode": "dynamic", "length_bucket": scale.prompt}
    return [*found, Case("length buckets", trace, series="dynamic batches", options=dynamic, client=client, load=0.7)]


POLICIES: dict[str, dict[str, Any]] = {
    "fcfs": {},
    "sjf": {"policy": "sjf"},
    "priority": {"policy": "priority"},
    "fair": {"policy": "fair"},
    "deadline": {"policy": "deadline"},
    "deadline, late ones dropped": {"policy": "deadline", "drop_late": True},
}


TARGETS = {"engine": 0.3, "simulation": 2.0}


@experiment(
    question="Policies at twice the capacity: chat floods (80 % of the requests), code has priority",
    engine_rounds=3,
    panels=(
        cases.TTFT,
        cases.TTFT_P99,
        cases.E2E,
        *(Panel(f"{name}.ttft_mean", "", f"{name}: mean TTFT, ms", 1e3) for name in ("chat", "code", "write")),
        cases.IN_TIME,
        cases.JAIN,
    ),
    columns=(*cases.COLUMNS, cases.IN_TIME, cases.JAIN),
    ttft_target=TARGETS,
    by_tenant=True,
    limits={"engine": {"max_num_seqs": 32}, "simulation": {"max_num_seqs": 64}},
)
def policies(scale: Scale) -> list[Case]:
    """Three tenants at twice the capacity, of which chat floods and code has priority; how long an output will be stays
    hidden behind one max_tokens."""
    trace = tenants(scale, FLOOD, priorities={"code": 5}, requests=2 * scale.requests)
    client = ClientRule(16 * scale.output)
    target = {"ttft_target": TARGETS[scale.name]}
    return [
        Case(name, trace, options=options | (target if "deadline" in name else {}), client=client, load=2.0)
        for name, options in POLICIES.items()
    ]


PRESETS = ("interactive", "balanced", "throughput")
LOADS = (0.2, 0.5, 0.8, 1.1)
NEVER = 1e9
"""A bound that no load reaches."""


@experiment(
    question="Settings that follow the load, and presets, from idle to overload",
    panels=(
        cases.THROUGHPUT,
        dataclasses.replace(cases.TTFT, log=True),
        dataclasses.replace(cases.TTFT_P99, log=True),
        cases.TPOT,
        cases.ITL_P99,
        cases.UTILIZATION,
    ),
    xlabel="load (arrivals over what the engine can do)",
    limits={
        "engine": {"max_num_seqs": 256, "max_num_batched_tokens": 8192},
        "simulation": {"max_num_seqs": 256, "max_num_batched_tokens": 8192},
    },
)
def load_profile(scale: Scale) -> list[Case]:
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


SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@experiment(
    question="What more sequences at once cost each of them",
    panels=(cases.THROUGHPUT, cases.SERVICE, cases.SERVICE_P99, cases.TTFT, cases.TPOT, cases.ITL_P99),
    columns=(
        cases.THROUGHPUT, cases.SERVICE, cases.SERVICE_P99, cases.TTFT, cases.TTFT_P99, cases.TPOT, cases.ITL,
        cases.ITL_P99, cases.UTILIZATION, cases.SEQUENCES,
    ),
    xlabel="sequences at once (max_num_seqs)",
    log_x=True,
    limits={"engine": {"max_num_seqs": 256}, "simulation": {"max_num_seqs": 256}},
)  # fmt: skip
def batch_size(scale: Scale) -> list[Case]:
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


@experiment(
    question="Tokens of a step at most: early first tokens against even gaps",
    panels=(cases.THROUGHPUT, cases.TTFT, cases.TTFT_P99, cases.TPOT, cases.ITL_P99, cases.E2E),
    xlabel="max_num_batched_tokens",
    log_x=True,
    limits={
        "engine": {"max_num_seqs": 64, "max_num_batched_tokens": 2048},
        "simulation": {"max_num_seqs": 128, "max_num_batched_tokens": 8192},
    },
)
def token_budget(scale: Scale) -> list[Case]:
    """Prompts four times as long as usual, at 80 % of what the engine with the largest budget gets through."""
    trace = chat(dataclasses.replace(scale, prompt=4 * scale.prompt))
    budgets = (64, 128, 256, 512, 1024, 2048) if scale.name == "engine" else (512, 1024, 2048, 4096, 8192)
    return [
        Case(f"{budget}", trace, x=budget, series=f"load {load}", options={"max_num_batched_tokens": budget}, load=load)
        for load in (0.5, 0.8)
        for budget in budgets
    ]


WAITS = (0.0, 0.05, 0.1, 0.2, 0.5, 1.0)


@experiment(
    question="How long a batch waits to fill, at 30 % of what continuous batching can do",
    panels=(
        cases.THROUGHPUT,
        *(dataclasses.replace(panel, log=True) for panel in (cases.TTFT, cases.TTFT_P99, cases.E2E)),
        cases.UTILIZATION,
        cases.SEQUENCES,
    ),
    xlabel="max_wait_seconds",
    limits={"engine": {"max_num_seqs": 16}, "simulation": {"max_num_seqs": 32}},
)
def max_wait(scale: Scale) -> list[Case]:
    """Static and dynamic batches at 30 % of what continuous batching gets through, and that beside them."""
    trace = chat(scale)
    found = [
        Case(f"{wait:g} s", trace, x=wait, series=mode, load=0.3,
             options={"mode": mode, "batch_size": scale.seqs, "max_wait_seconds": wait})
        for mode in ("static", "dynamic")
        for wait in WAITS
    ]  # fmt: skip
    return [*found, Case("continuous", trace, series="continuous", load=0.3)]


ERRORS = (0.0, 0.25, 0.5, 1.0, 2.0)


class NoisyOracle:
    """Knows the true lengths, times a log-normal error of the given sigma."""

    def __init__(self, lengths: Mapping[str, int], sigma: float):
        rng = np.random.default_rng(0)
        noise = np.exp(rng.normal(0.0, sigma, len(lengths))) if sigma else np.ones(len(lengths))
        self._expected = {name: length * error for (name, length), error in zip(lengths.items(), noise, strict=True)}
        self._ranked: deque[tuple[float, int]] = deque(maxlen=512)

    @property
    def kendall_tau(self) -> float | None:
        return kendall_tau(self._ranked)

    def expected(self, request: EngineRequest) -> float:
        return max(1.0, float(self._expected[request.request_id]))

    def observe(self, request: EngineRequest, output_tokens: int, expected: float) -> None:
        self._ranked.append((expected, output_tokens))


def _oracle(sigma: float) -> Callable[[Mapping[str, int]], NoisyOracle]:
    return lambda lengths: NoisyOracle(lengths, sigma)


@experiment(
    question="Error of predicted output lengths against the gain of shortest-first",
    panels=(cases.TTFT, cases.E2E, cases.E2E_P99, cases.TAU),
    xlabel="sigma of log(predicted / true length)",
    limits={"engine": {"max_num_seqs": 32}, "simulation": {"max_num_seqs": 64}},
)
def prediction(scale: Scale) -> list[Case]:
    """Three tenants in overload, under fcfs and under sjf with an oracle of rising error."""
    trace = tenants(scale, requests=2 * scale.requests)
    client = ClientRule(16 * scale.output)
    sjf = {"policy": "sjf", "sjf_ageing": 1.0}
    found = [
        Case(f"sigma {sigma:g}", trace, x=sigma, series="sjf, true lengths with an error", options=sjf, client=client,
             load=scale.overload, predictor=_oracle(sigma))
        for sigma in ERRORS
    ]  # fmt: skip
    found.append(
        Case("own predictor", trace, series="sjf, own predictor", options=sjf, client=client, load=scale.overload)
    )
    return [*found, Case("fcfs", trace, series="fcfs", client=client, load=scale.overload)]
