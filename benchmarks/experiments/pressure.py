"""The experiments on long prompts beside others, and on pools that are too small, as data (see `batching`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from benchmarks.experiments import cases
from benchmarks.experiments.cases import Case, Panel, Scale, experiment
from benchmarks.experiments.workloads import Tenant, at_once, beside_decodes, chat, tenants
from jaxserve.config.scheduling import PAGE_RESERVATIONS, PREEMPTION_MODES, VICTIMS
from jaxserve.simulator.simulation import ClientRule
from jaxserve.simulator.traces import Trace, make_trace

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
WORK = (cases.UTILIZATION, Panel("steps", "steps", ""))
"""Panels, and two parts of the columns, of experiments with `beside_decodes`."""


@experiment(
    question="Long prompts, whole or in chunks, beside requests that decode",
    panels=PANELS,
    columns=(*LATENCIES, *WORK),
    xlabel="tokens of a long prompt",
    log_x=True,
    limits={
        "engine": {"max_num_seqs": 32, "max_num_batched_tokens": 2048},
        "simulation": {"max_num_seqs": 128, "max_num_batched_tokens": 20480, "max_model_len": 32768},
    },
)
def chunked_prefill(scale: Scale) -> list[Case]:
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


def pairs_of_prompts(length: int, rows: int, output: int, pairs: int, seconds: float) -> Trace:
    """Two long prompts at a time, so many seconds apart, beside `rows` requests that decode."""
    return beside_decodes(rows, output, length, np.repeat(seconds * np.arange(1, pairs + 1), 2).tolist())


@experiment(
    question="Long prompts by the tokens of each, and of all, in a step, beside requests that decode",
    panels=PANELS,
    columns=(*LATENCIES, Panel("prompt.ttft_p99", "p99", "", 1e3), *WORK),
    xlabel="prefill tokens in a step, of each prompt or of all",
    log_x=True,
    limits={
        "engine": {"max_num_seqs": 32, "max_num_batched_tokens": 2048},
        "simulation": {"max_num_seqs": 128, "max_num_batched_tokens": 8192},
    },
)
def chunk_size(scale: Scale) -> list[Case]:
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


@experiment(
    question="Prefill tokens as a share of a step that decodes too",
    panels=(cases.THROUGHPUT, cases.TTFT, cases.TTFT_P99, cases.TPOT, cases.ITL_P99, cases.UTILIZATION),
    xlabel="prefill_share",
    limits={"engine": {"max_num_batched_tokens": 512}, "simulation": {"max_num_batched_tokens": 4096}},
)
def prefill_share(scale: Scale) -> list[Case]:
    """Prompts four times as long as usual, at 80 % of capacity."""
    trace = chat(dataclasses.replace(scale, prompt=4 * scale.prompt))
    return [
        Case(
            f"{share:g}", trace, x=share, series=name, options={"prefill_share": share, "fill_buckets": fill}, load=0.8
        )
        for name, fill in (("padding left as it is", False), ("padding filled with prompts", True))
        for share in (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
    ]


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


@experiment(
    question="What 30 % long requests do to 70 % short ones, at 90 % of capacity",
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
def mixed_lengths(scale: Scale) -> list[Case]:
    """70 % short and 30 % long at 90 % of capacity, and the same short ones without the long."""
    trace = tenants(scale, WHO)
    trace = dataclasses.replace(trace, prompt_tokens=np.minimum(trace.prompt_tokens, scale.tokens // 2))
    alone = trace.select(np.array(trace.tenants) == "short")
    client = ClientRule(16 * scale.output)
    found = [Case("short ones alone", alone, load=0.9, reference=trace, client=client)]
    return found + [Case(name, trace, options=options, load=0.9, client=client) for name, options in WAYS.items()]


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


@experiment(
    question="Short requests that find every place taken by long ones",
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
def head_of_line(scale: Scale) -> list[Case]:
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


_NAMES = {
    "none": "pages as tokens come",
    "max_tokens": "reserved: prompt and max_tokens",
    "max_model_len": "reserved: the longest sequence",
}


@experiment(
    question="Memory for keys and values: pages as tokens come, or reserved",
    panels=(cases.THROUGHPUT, cases.SEQUENCES, cases.PAGE_USE, cases.TTFT, cases.E2E_P99, cases.PREEMPTIONS),
    columns=(
        cases.THROUGHPUT, cases.TTFT, cases.TTFT_P99, cases.TPOT, cases.ITL_P99, cases.E2E, cases.E2E_P99,
        cases.SEQUENCES, cases.PAGE_USE, cases.PREEMPTIONS,
    ),
    xlabel="tokens that the pool holds",
    log_x=True,
    limits={"simulation": {"max_num_seqs": 256, "max_model_len": 4096}},
)  # fmt: skip
def paged(scale: Scale) -> list[Case]:
    """Pools of several sizes, everything there at once; max_tokens is four times what is generated on average."""
    trace = at_once(chat(scale))
    client = ClientRule(4 * scale.output)
    sizes = (4096, 8192, 16384, 32768) if scale.name == "engine" else (16384, 32768, 65536, 131072, 262144)
    return [
        Case(
            f"{size}", trace, x=size, series=_NAMES[reservation], client=client,
            options={"page_reservation": reservation}, num_pages=size // 16,
        )
        for reservation in PAGE_RESERVATIONS
        for size in sizes
    ]  # fmt: skip


@experiment(
    question="Preemption in a pool that is far too small: kinds and victims",
    panels=(cases.THROUGHPUT, cases.TTFT, cases.E2E, cases.E2E_P99, cases.PREEMPTIONS, cases.SWAPPED),
    columns=(
        cases.THROUGHPUT, cases.TTFT, cases.TTFT_P99, cases.TPOT, cases.ITL, cases.ITL_P99, cases.E2E, cases.E2E_P99,
        cases.SEQUENCES, cases.PREEMPTIONS, cases.SWAPPED,
    ),
    limits={"simulation": {"swap_space": 64.0}},
)  # fmt: skip
def preemption(scale: Scale) -> list[Case]:
    """A pool that holds far fewer sequences than may run, so that many lose their pages."""
    trace = at_once(tenants(scale))
    client = ClientRule(16 * scale.output)
    pages = 112 if scale.name == "engine" else 4096
    found = [
        Case(kind, trace, series="kind", options={"preemption_mode": kind}, client=client, num_pages=pages)
        for kind in PREEMPTION_MODES
    ]
    found += [
        Case(f"victim: {victim}", trace, series="victim, by recompute", client=client, num_pages=pages,
             options={"victim": victim, "preemption_mode": "recompute"})
        for victim in VICTIMS
    ]  # fmt: skip
    watermark = {"watermark": 0.1, "preemption_mode": "recompute"}
    reserve = {"page_reservation": "max_tokens"}
    return [
        *found,
        Case("watermark 0.1", trace, series="kept from happening", options=watermark, client=client, num_pages=pages),
        Case("max_tokens reserved", trace, series="kept from happening", options=reserve, client=client,
             num_pages=pages),
    ]  # fmt: skip
