"""Formats the report as a page: one run, or several side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

_GIB = 1024**3


def render(reports: Sequence[dict[str, Any]]) -> str:
    """Returns a Markdown page of several runs' `Report.to_json` for one configuration and target; the first one
    leads.
    """
    parts = (_head, _summary, _programs, _kernels, _roofline, _decode, _memory)
    sections = ("\n".join(part(reports)) for part in parts)
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    first = reports[0]
    model, shapes, target = first["shapes"]["model"], first["shapes"], first["target"]
    yield f"# {model['architecture']}, {model['num_hidden_layers']} layers, compiled for {target['device_kind']}"
    yield ""
    yield (
        f"Width {model['hidden_size']:,}, {model['num_attention_heads']} query and {model['num_key_value_heads']} "
        f"key-value heads of {model['head_dim']}, vocabulary {model['vocab_size']:,}, {shapes['dtype']}; "
        f"{shapes['num_pages']:,} pages of {shapes['page_size']} positions, up to {shapes['num_slots']} sequences of "
        f"{shapes['max_model_len']:,}; attention `{shapes['attention']}`."
    )
    yield ""
    names = list(dict.fromkeys(name for report in reports for name in report["versions"]))
    yield from _table(
        ["", *(f"run {number + 1}" for number in range(len(reports)))],
        [
            *([name, *(report["versions"].get(name, "") for report in reports)] for name in names),
            ["programs", *(len(report["programs"]) for report in reports)],
            ["seconds, all programs", *(f"{report['seconds']:.0f}" for report in reports)],
        ],
    )
    options = " ".join(f"`{name}={value}`" for name, value in first["compiler_options"].items())
    if options:
        yield ""
        yield f"Compiler options: {options}"


def _summary(reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Summarizes the properties that every program must have, and whether they hold."""
    yield "## What was checked"
    yield ""
    rows: list[list[object]] = []
    for number, report in enumerate(reports):
        programs = report["programs"]
        kernels = [kernel for program in programs for kernel in program["kernels"]]
        steps = [program for program in programs if program["command_buffers"] is not None]
        rows.append(
            [
                number + 1,
                sum((kernel["spill_store_bytes"] or 0) + (kernel["spill_load_bytes"] or 0) for kernel in kernels),
                _span([program["command_buffers"] for program in steps]),
                sum(program["outside_command_buffers"] for program in steps),
                "yes" if all(program["alias_bytes"] == program["donated_bytes"] for program in programs) else "no",
                sum(program["pool_copies"] for program in programs),
                sum(program["triton_matmuls"] for program in programs),
                f"{max((kernel['shared_memory_bytes'] for kernel in kernels), default=0):,}",
            ]
        )
    yield from _table(
        [
            "run",
            "bytes spilled",
            "command buffers a program",
            "launches outside them",
            "aliased = donated bytes",
            "copies of a page pool",
            "untuned Triton matmuls",
            f"largest shared memory (limit {reports[0]['target']['shared_memory_per_block']:,})",
        ],
        rows,
    )
    problems = [f"run {number + 1}: {line}" for number, report in enumerate(reports) for line in report["problems"]]
    if problems:
        yield ""
        yield "**Problems**"
        yield ""
        yield from (f"- {line}" for line in problems)


def _programs(reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "## Programs"
    yield ""
    yield (
        "Pool: bytes of the page pools that the program updates in place. Aliased: of all donated arguments (pools, "
        "slots, hidden buffer). Kernels: launches of kernels and calls of cuBLASLt in the program."
    )
    for number, report in enumerate(reports):
        yield ""
        yield f"Run {number + 1}, {_versions(report)}:"
        yield ""
        yield from _table(
            [
                "program",
                "compile s",
                "executable KB",
                "temporaries MB",
                "pool GB",
                "aliased GB",
                "pool copies",
                "command buffers",
                "kernels",
                "cuBLASLt",
                "spills",
            ],
            [
                [
                    f"{program['kind']} {program['size']}",
                    f"{program['seconds']:.1f}",
                    f"{program['serialized_bytes'] / 1e3:,.0f}",
                    f"{program['temp_bytes'] / 1e6:,.1f}",
                    f"{program['pool_bytes'] / 1e9:,.3f}",
                    f"{program['alias_bytes'] / 1e9:,.3f}",
                    program["pool_copies"],
                    _or_dash(program["command_buffers"]),
                    sum(kernel["launches"] for kernel in program["kernels"]) or "-",
                    program["library_calls"].get("kCublasLtMatmul", "-"),
                    sum(
                        (kernel["spill_store_bytes"] or 0) + (kernel["spill_load_bytes"] or 0)
                        for kernel in program["kernels"]
                    ),
                ]
                for program in report["programs"]
            ],
        )


def _kernels(reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lists our kernels one by one, XLA's in one line per kind of program."""
    if not any(program["kernels"] for report in reports for program in report["programs"]):
        return
    yield "## Kernels"
    yield ""
    yield "The project's own, once for all grids; each runs once a layer."
    for number, report in enumerate(reports):
        rows: dict[tuple[Any, ...], list[tuple[str, str]]] = {}
        others: dict[str, list[dict[str, Any]]] = {}
        for program in report["programs"]:
            for kernel in program["kernels"]:
                if kernel["pallas"]:
                    used = ("x".join(map(str, kernel["grid"])), f"{program['kind']} {program['size']}")
                    rows.setdefault(_kernel_row(kernel), []).append(used)
                else:
                    others.setdefault(program["kind"], []).append(kernel)
        yield ""
        yield f"Run {number + 1}, {_versions(report)}:"
        yield ""
        yield from _table(
            ["kernel", "threads", "shared memory", "registers", "spill stores", "spill loads", "grids", "programs"],
            [
                [*row, ", ".join(dict.fromkeys(grid for grid, _ in used)), _listed([program for _, program in used])]
                for row, used in rows.items()
            ],
        )
        yield ""
        yield "XLA's own, most of any kernel:"
        yield ""
        yield from _table(
            ["programs", "kernels", "threads", "shared memory", "registers", "spill stores", "spill loads"],
            [
                [
                    kind,
                    len(kernels),
                    max(_product(kernel["threads"]) for kernel in kernels),
                    max(kernel["shared_memory_bytes"] for kernel in kernels),
                    max(kernel["registers"] or 0 for kernel in kernels),
                    max(kernel["spill_store_bytes"] or 0 for kernel in kernels),
                    max(kernel["spill_load_bytes"] or 0 for kernel in kernels),
                ]
                for kind, kernels in others.items()
            ],
        )


def _roofline(reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    report = reports[0]
    target = report["target"]
    if not target["memory_bandwidth"]:
        return
    yield "## Roofline"
    yield ""
    dtype = report["shapes"]["dtype"]
    rate = target["peak_flops"].get(dtype, 0.0)
    context = report["decode_steps"][0]["context"] if report["decode_steps"] else 0
    yield (
        f"{target['memory_bandwidth'] / 1e12:.2f} TB/s and {rate / 1e12:,.0f} TFLOP/s in {dtype} "
        f"({target['source']}). Bytes: what each instruction reads and writes, as if no cache kept anything; FLOPs: "
        f"of matrix products and attention. A decode program has full rows of {context:,} positions, a forward program "
        "one prompt of its size, a sample program greedy rows. Time: the longer of the two at those rates."
    )
    yield ""
    yield from _table(
        ["program", "bytes read MB", "bytes written MB", "GFLOP", "FLOP a byte", "roofline ms"],
        [
            [
                f"{program['kind']} {program['size']}",
                f"{program['bytes_read'] / 1e6:,.0f}",
                f"{program['bytes_written'] / 1e6:,.1f}",
                f"{sum(program['flops'].values()) / 1e9:,.1f}",
                f"{sum(program['flops'].values()) / max(1, program['bytes_read'] + program['bytes_written']):,.1f}",
                f"{program['roofline_seconds'] * 1e3:,.3f}",
            ]
            for program in report["programs"]
        ],
    )


def _decode(reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    steps = [report["decode_steps"] for report in reports]
    if not any(steps):
        return
    yield "## Decode steps: bytes that must move, and bytes that do"
    yield ""
    yield (
        "Must: every weight once, the keys and values of every position once, the new ones written. Does: all that the "
        "decode and the sample program read and write. Tokens/s: rows over the roofline time of both programs."
    )
    yield ""
    ratios = [f"ratio, run {number + 1}" for number in range(len(reports))] if len(reports) > 1 else ["ratio"]
    by_run = [{(step["rows"], step["context"]): step for step in run} for run in steps]
    yield from _table(
        ["rows", "context", "must MB", "does MB", *ratios, "roofline ms", "tokens/s"],
        [
            [
                step["rows"],
                f"{step['context']:,}",
                f"{step['must_bytes'] / 1e6:,.0f}",
                f"{step['moved_bytes'] / 1e6:,.0f}",
                *(_ratio(run.get((step["rows"], step["context"]))) for run in by_run),
                f"{step['roofline_seconds'] * 1e3:,.3f}",
                f"{step['tokens_per_second']:,.0f}",
            ]
            for step in steps[0]
        ],
    )


def _memory(reports: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield "## Memory of one device"
    yield ""
    names = list(reports[0]["memory"])
    titles = [f"run {number + 1}, GiB" for number in range(len(reports))] if len(reports) > 1 else ["GiB"]
    rows = [[name, *(f"{report['memory'][name] / _GIB:,.3f}" for report in reports)] for name in names]
    yield from _table(["", *titles], rows)


def _kernel_row(kernel: dict[str, Any]) -> tuple[Any, ...]:
    figures = (kernel["registers"], kernel["spill_store_bytes"], kernel["spill_load_bytes"])
    return (
        f"`{kernel['name']}`",
        _product(kernel["threads"]),
        f"{kernel['shared_memory_bytes']:,}",
        *map(_or_dash, figures),
    )


def _versions(report: dict[str, Any]) -> str:
    return f"jax {report['versions']['jax']}"


def _ratio(step: dict[str, Any] | None) -> str:
    return "-" if step is None else f"{step['ratio']:.3f}"


def _or_dash(value: object) -> object:
    return "-" if value is None else value


def _span(values: list[int]) -> str:
    if not values:
        return "-"
    return str(min(values)) if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _listed(programs: list[str]) -> str:
    """Formats programs as "decode 8, 16, 32; forward 8"."""
    by_kind: dict[str, list[str]] = {}
    for program in programs:
        kind, _, size = program.partition(" ")
        by_kind.setdefault(kind, []).append(size)
    return "; ".join(f"{kind} {', '.join(sizes)}" for kind, sizes in by_kind.items())


def _product(values: Sequence[int]) -> int:
    product = 1
    for value in values:
        product *= value
    return product


def _table(head: Sequence[object], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    yield f"| {' | '.join(map(str, head))} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"
