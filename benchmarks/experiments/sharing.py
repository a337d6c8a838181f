"""The experiments on requests that begin alike, as data (see `batching`)."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.experiments import cases
from benchmarks.experiments.cases import Case, Scale, experiment
from jaxserve.config.scheduling import POLICIES
from jaxserve.simulator.conversations import AGENT, ConversationConfig, conversation_trace

SMALL_AGENT = dataclasses.replace(
    AGENT, sessions=16, turns=6, shared=48, first=32, later=16, output=16, pause=0.2, max_length=500
)
"""An agent in the context of the engine's default model."""

NOT_FOR_AGENTS = ("priority", "deadline")
"""Policies that order by what these requests do not have."""


def agents(scale: Scale, rate: float) -> ConversationConfig:
    """Agents that begin at `rate` a second; three quarters of them are one tenant's, the rest another's."""
    small = scale.name == "engine"
    agent = SMALL_AGENT if small else dataclasses.replace(AGENT, sessions=60)
    return dataclasses.replace(agent, rate=rate, tenants="many:3/few:1")


@experiment(
    question="Agents whose prompts repeat what was said before: policies, with the prefix cache and without it",
    panels=(
        dataclasses.replace(cases.TTFT, log=True),
        dataclasses.replace(cases.TTFT_P99, log=True),
        cases.GOODPUT,
        cases.HIT_RATE,
        cases.THROUGHPUT,
        cases.PREEMPTIONS,
    ),
    columns=(
        cases.THROUGHPUT,
        cases.TTFT,
        cases.TTFT_P99,
        cases.TPOT,
        cases.E2E,
        cases.GOODPUT,
        cases.IN_TIME,
        cases.HIT_RATE,
        cases.PREEMPTIONS,
        cases.JAIN,
    ),
    xlabel="agents that begin in a second",
    log_x=True,
    limits={
        "engine": {"max_num_seqs": 16, "max_num_batched_tokens": 512},
        "simulation": {"max_num_seqs": 64, "max_num_batched_tokens": 8192, "max_model_len": 65536, "page_size": 64},
    },
    ttft_target={"engine": 0.5, "simulation": 2.0},
)
def agent_policies(scale: Scale) -> list[Case]:
    """Sixty agents of 30 turns, more and more of them at once, until their prefixes do not fit the pool."""
    ways: dict[str, dict[str, Any]] = {"fcfs, no prefix cache": {"enable_prefix_caching": False}}
    ways |= {policy: {"policy": policy} for policy in POLICIES if policy not in NOT_FOR_AGENTS}
    found = []
    for rate in (2.0, 4.0, 8.0) if scale.name == "engine" else (0.2, 0.3, 0.4):
        trace = conversation_trace(agents(scale, rate))
        found += [Case(f"{rate:g}", trace, x=rate, series=way, options=options) for way, options in ways.items()]
    return sorted(found, key=lambda case: list(ways).index(case.series))
