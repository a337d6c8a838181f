"""The results as a Markdown page. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

CPU_NOTE = (
    "These are not GPU figures: the suite tried itself on a CPU, with the kernels in Pallas' interpret mode and tiny "
    "sizes. Times and rates here say nothing about any GPU."
)

Row = Mapping[str, Any]

PEERS = ("peers_jax", "peers_torch")

_DECODE = (
    ("batch", "batch"),
    ("context", "context, tokens"),
    ("page_size", "page"),
    ("pool_dtype", "pool"),
    ("ragged", "ragged"),
    ("microseconds", "time, µs"),
    ("gb_per_s", "GB/s"),
    ("share", "of copy"),
)
_PREFILL = (
    ("case", "prompts x new tokens"),
    ("microseconds", "time, µs"),
    ("tflop_per_s", "TFLOP/s"),
    ("share", "of bf16 matmul"),
)
_PEER = (
    ("case", "shape"),
    ("microseconds", "time, µs"),
    ("gb_per_s", "GB/s"),
    ("tflop_per_s", "TFLOP/s"),
    ("share", "of ceiling"),
    ("relative_error", "error"),
)
COLUMNS: dict[str, tuple[tuple[str, str], ...]] = {
    "environment": (
        ("case", "what"),
        ("microseconds", "time, µs"),
        ("gb_per_s", "GB/s"),
        ("tflop_per_s", "TFLOP/s"),
    ),
    "values": (("case", "case"), ("relative_error", "relative error"), ("max_error", "largest error")),
    "decode": _DECODE,
    "prefill": _PREFILL,
    "write": (
        ("kind", "kernel"),
        ("tokens", "tokens"),
        ("pool_dtype", "pool"),
        ("microseconds", "time, µs"),
        ("gb_per_s", "GB/s"),
        ("share", "of copy"),
    ),
    "step": (
        ("batch", "batch"),
        ("context", "context, tokens"),
        ("pool_dtype", "pages"),
        ("step_ms", "step, ms"),
        ("limit_ms", "byte limit, ms"),
        ("share", "limit / step"),
        ("forward_ms", "forward, ms"),
        ("dense_ms", "without attention, ms"),
        ("attention_ms", "attention and write, ms"),
        ("sample_ms", "sampling, ms"),
        ("tokens_per_s", "tokens/s"),
    ),
    "products": (
        ("rows", "rows"),
        ("way", "operands"),
        ("step_ms", "all of a step, ms"),
        ("tflop_per_s", "TFLOP/s"),
    ),
    "host": (
        ("case", "case"),
        ("start_seconds", "start, s"),
        ("step_ms", "step, ms"),
        ("schedule_us", "schedule, µs"),
        ("pack_us", "pack, µs"),
        ("dispatch_us", "dispatch, µs"),
        ("collect_us", "wait, µs"),
        ("update_us", "update, µs"),
        ("outputs_us", "outputs, µs"),
        ("tokens_per_s", "tokens/s"),
    ),
    "bundle": (
        ("case", "program"),
        ("load_ms", "load, ms"),
        ("microseconds", "time, µs"),
        ("microseconds_compiled_here", "compiled here, µs"),
        ("agrees", "agrees"),
    ),
    "peers_jax": _PEER,
    "peers_torch": _PEER,
    "tune": (
        ("case", "kernel"),
        ("tried", "configurations"),
        ("default_microseconds", "shipped, µs"),
        ("microseconds", "best, µs"),
        ("config", "best configuration"),
    ),
}


def markdown(document: Mapping[str, Any], drawn: Sequence[str] = ()) -> str:
    """The page: what was measured on, the state of each part, then a table for each. drawn: names of plots."""
    lines = ["# GPU suite", ""]
    if document["note"]:
        lines += [f"**{document['note']}**", ""]
    if not document["complete"]:
        lines += ["Not complete: the suite is running, or was ended.", ""]
    lines += [*_machine(document), ""]
    states = [(part["title"], part["status"], part["reason"], part["seconds"]) for part in document["parts"]]
    lines += [*_table(("part", "status", "", "seconds"), states), ""]
    lines += [line for name in drawn for line in (f"![{name}]({name})", "")]
    for part in document["parts"]:
        if part["cases"] or part["summary"]:
            lines += [f"## {part['title']}", "", *_part(part)]
    lines += _comparison({part["name"]: part["cases"] for part in document["parts"]})
    return "\n".join(lines).rstrip() + "\n"


def _comparison(cases: Mapping[str, Sequence[Row]]) -> list[str]:
    """Time of a call in microseconds by shape, ours beside each peer's."""
    ours = {case["case"]: case for name in ("decode", "prefill") for case in cases.get(name, ())}
    peers = [case for name in PEERS for case in cases.get(name, ()) if case.get("peer") and case["status"] == "ok"]
    if not peers:
        return []
    names = list(dict.fromkeys(case["peer"] for case in peers))
    shapes = list(dict.fromkeys(case["case"].removeprefix(f"{case['peer']}: ") for case in peers))
    times = {(case["case"].removeprefix(f"{case['peer']}: "), case["peer"]): case["microseconds"] for case in peers}
    rows = [
        [shape, ours.get(shape, {}).get("microseconds"), *(times.get((shape, name)) for name in names)]
        for shape in shapes
    ]
    return ["## Side by side: time of a call, µs", "", *_table(["shape", "jaxserve", *names], rows), ""]


def _machine(document: Mapping[str, Any]) -> list[str]:
    environment = next((part["summary"] for part in document["parts"] if part["name"] == "environment"), {})
    device, smi = environment.get("device", {}), environment.get("nvidia_smi", {})
    versions = document["versions"]
    facts = [
        f"{document['date']}; device {device.get('kind') or document['probe'].get('kind', 'unknown')}",
        f"Python {versions['python']}, jax {versions['jax']}, commit {versions['jaxserve_commit']}"
        + " (changed)" * bool(versions["dirty"]),
    ]
    if isinstance(smi, Mapping):
        facts.append(", ".join(f"{name} {smi[name]}" for name in ("driver_version", "memory.total") if name in smi))
    for name, text in (
        ("copy_bytes_per_s", "copy (read and written) {:,.0f} GB/s"),
        ("read_bytes_per_s", "read {:,.0f} GB/s"),
    ):
        if environment.get(name):
            facts.append(text.format(environment[name] / 1e9))
    if environment.get("bf16_flop_per_s"):
        facts.append(f"bf16 matmul {environment['bf16_flop_per_s'] / 1e12:,.0f} TFLOP/s")
    return ["; ".join(fact for fact in facts if fact) + "."]


def _part(part: Row) -> list[str]:
    lines: list[str] = []
    if part["status"] != "ok":
        lines += [f"{part['status']}: {_cell(part['reason'])}", ""]
    summary = part["summary"]
    if summary.get("implementation"):
        lines += [f"Implementation: {summary['implementation']}.", ""]
    for name in ("note", "bundle"):
        if summary.get(name):
            lines += [f"{name.capitalize()}: {_cell(summary[name])}", ""]
    if summary.get("largest_relative_error"):
        worst = [(kind, f"{error:.2e}") for kind, error in summary["largest_relative_error"].items()]
        lines += [*_table(("largest relative error", ""), worst), ""]
    # A search keeps its hundreds of trials in the JSON; the page has what came of them.
    good = summary.get("results") or [case for case in part["cases"] if case["status"] == "ok"]
    profiles = [case for case in good if "ms_per_step" in case]
    good = [case for case in good if case not in profiles]
    columns = [
        (key, name)
        for key, name in COLUMNS.get(part["name"], (("case", "case"),))
        if any(case.get(key) not in (None, "", False) for case in good)
    ]
    if good:
        rows = [[_value(key, case.get(key)) for key, _ in columns] for case in good]
        lines += [*_table([name for _, name in columns], rows), ""]
    for case in profiles:
        shares = list(case["ms_per_step"].items()) + [(one["name"], one["ms_per_step"]) for one in case["kernels"][:12]]
        lines += [f"{case['case']}, by kind of kernel, then the longest kernels:", ""]
        lines += [*_table(("", "ms a step"), shares), ""]
    for status in ("failed", "absent", "not run"):
        lines += _others(status, [case for case in part["cases"] if case["status"] == status])
    return lines


def _others(status: str, cases: Sequence[Row]) -> list[str]:
    """One line for each case that has no figures; those without a word of their own together."""
    if not cases:
        return []
    if status == "not run":
        return [f"Not run for lack of time: {', '.join(case['case'] for case in cases)}.", ""]
    return [*(f"- {status}: {case['case']}: {_cell(case['reason'])}" for case in cases), ""]


def _value(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    formats: dict[str, Callable[[Any], str]] = {
        "share": lambda number: f"{100 * number:.1f} %",
        "relative_error": lambda number: f"{number:.2e}",
        "max_error": lambda number: f"{number:.2e}",
    }
    if isinstance(value, float):
        return formats.get(key, _number)(value)
    return _cell(str(value))


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())[:300]


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(_value("", cell) for cell in row) + " |" for row in rows]
