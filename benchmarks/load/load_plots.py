"""Plots of a rate sweep: latency against throughput."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

_PANELS = (
    ("time to first token", (("median_ttft_ms", "median"), ("p99_ttft_ms", "99th percentile"))),
    ("time between tokens", (("median_itl_ms", "median"), ("p99_itl_ms", "99th percentile"))),
)


def latency_against_throughput(
    runs: Sequence[Mapping[str, Any]], title: str, path: pathlib.Path, offline: float | None = None
) -> None:
    """Two panels over output tokens a second. runs: figures of a sweep, in order of rate. offline: tokens a second.

    Raises ImportError without matplotlib, which serving itself does not need.
    """
    from matplotlib import ticker
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, (name, lines) in zip(axes, _PANELS, strict=True):
        for (field, label), marker in zip(lines, "os", strict=True):
            points = [(run["output_throughput"], run[field]) for run in runs if run[field] is not None]
            axis.plot([x for x, _ in points], [y for _, y in points], marker=marker, label=label)
        if offline is not None:
            axis.axvline(offline, color="grey", linestyle="--", label="offline, the same requests")
        axis.set_xlabel("output tokens per second")
        axis.set_ylabel(f"{name} (ms)")
        axis.set_yscale("log")
        axis.set_xlim(left=0)
        axis.grid(visible=True, which="both", alpha=0.3)
        for place in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            place(ticker.LogFormatter(minor_thresholds=(2, 0.5)))
    # One legend for both panels, below them: within a panel it would lie over a line sooner or later.
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
