"""Plots of the suite's results: `python -m benchmarks.gpu.suite_plots DIR` draws what DIR/suite.json has figures for.

matplotlib is optional, and is imported in a process of its own.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.gpu import suite_process as process

Cases = list[dict[str, Any]]
NAMES = ("decode.png", "prefill.png", "step.png")


def draw_in_a_process(output: pathlib.Path, seconds: float) -> tuple[list[str], str]:
    """Names of the plots drawn in `output` within so many seconds, and why there are none."""
    for name in NAMES:
        (output / name).unlink(missing_ok=True)
    log = output / "suite.log"
    ended = process.run(
        process.python("benchmarks.gpu.suite_plots", str(output)), log, seconds, env=process.environment(gpu=False)
    )
    drawn = [name for name in NAMES if (output / name).is_file()]
    if ended.status == 0:
        return drawn, "" if drawn else "there are no figures to draw"
    lines = process.tail(log).strip().splitlines()
    return drawn, lines[-1] if lines else ended.text


def main(directory: str) -> int:
    """Draws every plot that has figures."""
    import matplotlib

    matplotlib.use("Agg")
    output = pathlib.Path(directory)
    document = json.loads((output / "suite.json").read_text(encoding="utf-8"))
    parts = {part["name"]: part for part in document["parts"]}
    good = {name: [case for case in part["cases"] if case["status"] == "ok"] for name, part in parts.items()}
    machine = ceilings(parts.get("environment", {}), good.get("environment", []))
    for draw in (decode_plot, prefill_plot, step_plot):
        draw(good, machine, document, output)
    return 0


def ceilings(part: Mapping[str, Any], cases: Cases) -> dict[str, Any]:
    """Ceilings of the machine: as its part says, or from its cases where it ended before it could say so."""
    summary = part.get("summary", {})
    copies = [case["gb_per_s"] * 1e9 for case in cases if case["case"].startswith("copy")]
    reads = [case["gb_per_s"] * 1e9 for case in cases if case["case"].startswith("read")]
    products = [case["tflop_per_s"] * 1e12 for case in cases if case.get("dtype") == "bfloat16"]
    found = {"copy_bytes_per_s": copies[-1:], "read_bytes_per_s": reads[:1], "bf16_flop_per_s": products[:1]}
    return {name: summary.get(name) or next(iter(values), None) for name, values in found.items()}


def decode_plot(good: Mapping[str, Cases], machine: Mapping[str, Any], document: Any, output: pathlib.Path) -> None:
    """Bytes a second over the context, one line a batch, under the ceiling of a copy."""
    plain = [case for case in good.get("decode", ()) if not case["ragged"] and not case["pool_dtype"]]
    sizes = sorted({case["page_size"] for case in plain})
    chosen = [case for case in plain if sizes and case["page_size"] == sizes[-1]]
    if not chosen:
        return
    figure, axes = _figure(document, f"Decode attention, pages of {sizes[-1]} tokens")
    batches = sorted({case["batch"] for case in chosen})
    for place, batch in enumerate(batches):
        line = sorted((case["context"], case["gb_per_s"]) for case in chosen if case["batch"] == batch)
        shade = (0.15 + 0.75 * place / max(1, len(batches) - 1), 0.3, 0.85 - 0.7 * place / max(1, len(batches) - 1))
        axes.plot(*zip(*line, strict=True), marker="o", color=shade, label=f"batch {batch}")
    _ceiling(axes, machine.get("copy_bytes_per_s"), 1e9, "copy (read + written)")
    _ceiling(axes, machine.get("read_bytes_per_s"), 1e9, "read alone", style=":")
    axes.set_ylabel("bytes of keys, values, queries and results, GB/s")
    _finish(figure, axes, "context, tokens", output / "decode.png")


def prefill_plot(good: Mapping[str, Cases], machine: Mapping[str, Any], document: Any, output: pathlib.Path) -> None:
    """Operations a second over the prompt length, beside the peers."""
    ours = [
        case
        for case in good.get("prefill", ())
        if not case["before"] and not case["decodes"] and not case["pool_dtype"] and case["page_size"] == 64
    ]
    lines: dict[str, dict[int, float]] = {}
    for case in ours:
        line = lines.setdefault("jaxserve", {})
        line[case["new"]] = max(case["tflop_per_s"], line.get(case["new"], 0.0))  # with prompts enough, or one alone
    for name in ("peers_jax", "peers_torch"):
        for case in good.get(name, ()):
            if case.get("kind") == "prefill":
                lines.setdefault(case["peer"], {})[case["new"]] = case["tflop_per_s"]
    if not lines:
        return
    figure, axes = _figure(document, "Causal prefill attention")
    for label, line in lines.items():
        axes.plot(*zip(*sorted(line.items()), strict=True), marker="o", label=label)
    _ceiling(axes, machine.get("bf16_flop_per_s"), 1e12, "bf16 matmul")
    axes.set_ylabel("operations that causality leaves, TFLOP/s")
    _finish(figure, axes, "prompt, tokens", output / "prefill.png")


def step_plot(good: Mapping[str, Cases], machine: Mapping[str, Any], document: Any, output: pathlib.Path) -> None:
    """The parts of a decode step beside its byte limit, by batch."""
    cases = [case for case in good.get("step", ()) if case.get("batch") and not case["pool_dtype"]]
    cases = sorted(cases, key=lambda case: (case["batch"], case["context"]))
    if not cases:
        return
    figure, axes = _figure(document, f"Decode step of {cases[0]['model']}")
    copy = machine.get("copy_bytes_per_s")
    limits = [case["limit_ms"] or (1e3 * case["bytes"] / copy if copy else 0.0) for case in cases]
    places, aside = range(len(cases)), 0.2 if any(limits) else 0.0
    bottom = [0.0] * len(cases)
    kinds = [("dense_ms", "without attention"), ("attention_ms", "attention and KV write"), ("sample_ms", "sampling")]
    for key, label in kinds:
        heights = [max(0.0, case.get(key) or 0.0) for case in cases]
        axes.bar([place - aside for place in places], heights, 0.38, bottom=bottom, label=label)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    whole = [case["step_ms"] for case in cases]
    axes.plot([place - aside for place in places], whole, "k_", markersize=16, label="whole step, as dispatched")
    if any(limits):
        axes.bar([place + aside for place in places], limits, 0.38, color="0.6", label="bytes / copy bandwidth")
    axes.set_xticks(list(places), [f"{case['batch']}\n{case['context']}" for case in cases])
    axes.set_ylabel("time, ms")
    axes.set_xlabel("batch (above) and context in tokens (below)")
    axes.set_ylim(0, 1.35 * max([*bottom, *whole, *limits, 1e-3]))
    axes.legend(ncols=2, loc="upper left")
    figure.savefig(output / "step.png", dpi=120)


def _figure(document: Any, title: str) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    kind = document["probe"].get("kind", "unknown device")
    what = "NOT A GPU: interpret mode on a CPU" if document["note"] else kind
    axes.set_title(f"{title}\n{what}, jax {document['versions']['jax']}", fontsize=11)
    axes.grid(alpha=0.3)
    return figure, axes


def _ceiling(axes: Any, value: float | None, unit: float, label: str, style: str = "--") -> None:
    if value:
        axes.axhline(value / unit, color="0.4", linestyle=style, label=f"{label}: {value / unit:,.0f}")


def _finish(figure: Any, axes: Any, label: str, path: pathlib.Path) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}" if value < 1024 else f"{value / 1024:.0f}k")
    axes.set_xlabel(label)
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
