"""Pages taken as tokens come, or reserved for the most there could be: `python -m benchmarks.experiments.paged`."""

from __future__ import annotations

from benchmarks.experiments import cases, harness
from benchmarks.experiments.cases import Case, Experiment, Scale
from benchmarks.experiments.workloads import at_once, chat
from jaxserve.config.scheduling import PAGE_RESERVATIONS
from jaxserve.simulator.simulation import ClientRule

_NAMES = {
    "none": "pages as tokens come",
    "max_tokens": "reserved: prompt and max_tokens",
    "max_model_len": "reserved: the longest sequence",
}


def make_cases(scale: Scale) -> list[Case]:
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


EXPERIMENT = Experiment(
    name="paged",
    question="Memory for keys and values: pages as tokens come, or reserved",
    cases=make_cases,
    panels=(cases.THROUGHPUT, cases.SEQUENCES, cases.PAGE_USE, cases.TTFT, cases.E2E_P99, cases.PREEMPTIONS),
    columns=(
        cases.THROUGHPUT, cases.TTFT, cases.TTFT_P99, cases.TPOT, cases.ITL_P99, cases.E2E, cases.E2E_P99,
        cases.SEQUENCES, cases.PAGE_USE, cases.PREEMPTIONS,
    ),
    xlabel="tokens that the pool holds",
    log_x=True,
    limits={"simulation": {"max_num_seqs": 256, "max_model_len": 4096}},
)  # fmt: skip

if __name__ == "__main__":
    raise SystemExit(harness.main(EXPERIMENT))
