"""Draws the rows of an experiment: lines over a number, or bars, one panel a figure."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.experiments.cases import Experiment, Panel

Row = Mapping[str, Any]
_WITH_COMMAS = "{x:,.10g}"
_COLOURS = ("#1b9e77", "#d95f02", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d", "#666666")


def draw(experiment: Experiment, rows: Sequence[Row], title: str, path: pathlib.Path) -> None:
    """Writes the plot; ImportError without matplotlib."""
    from matplotlib.figure import Figure

    panels = [panel for panel in experiment.panels if any(row.get(panel.key) is not None for row in rows)]
    lines = bool(experiment.xlabel)
    columns = _columns(len(panels), lines)
    height = 3.4 if lines else 1.1 + 0.3 * len(rows)
    vertical = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns + (0 if lines else 1.5), height * vertical + 0.8), layout="constrained")
    axes = list(figure.subplots(vertical, columns, squeeze=False).flat)
    for axis, panel in zip(axes, panels, strict=False):
        (_lines if lines else _bars)(axis, panel, rows, experiment)
        axis.grid(visible=True, axis="both" if lines else "x", alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.remove()
    if not lines:
        for place, axis in enumerate(figure.axes):
            if place % columns:
                axis.set_yticklabels([])
    names = _series(rows)
    if len(names) > 1:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(names), 4), frameon=False)
    figure.suptitle(title, fontsize=11)
    figure.get_layout_engine().set(w_pad=0.12)  # pyright: ignore[reportCallIssue, reportOptionalMemberAccess]
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def _columns(panels: int, lines: bool) -> int:
    if lines and panels == 4:
        return 2
    return min(panels, 3 if lines or panels in (5, 6, 9) else 4)


def _series(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row["series"] for row in rows))


def _lines(axis: Any, panel: Panel, rows: Sequence[Row], experiment: Experiment) -> None:
    for color, name in zip(_COLOURS, _series(rows), strict=False):
        points = [row for row in rows if row["series"] == name and row.get(panel.key) is not None]
        if points and points[0]["x"] is None:
            axis.axhline(points[0][panel.key] * panel.factor, color=color, linestyle="--", label=name)
            continue
        values = [row[panel.key] * panel.factor for row in points]
        axis.plot([row["x"] for row in points], values, "o-", markersize=4, color=color, label=name)
    if experiment.log_x:
        ticks = sorted({row["x"] for row in rows if row["x"] is not None})
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=45 if len(ticks) > 6 else 0)
        axis.minorticks_off()
    if panel.log:
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(_WITH_COMMAS)
        axis.yaxis.set_minor_formatter("")
    else:
        shown = [row[panel.key] * panel.factor for row in rows if row.get(panel.key) is not None]
        axis.set_ylim(0, 1.06 * max(shown, default=1.0) or 1.0)  # lines across and markers clear of the frame
        axis.yaxis.set_major_formatter(_WITH_COMMAS)
    axis.set_xlabel(experiment.xlabel)
    axis.set_ylabel(panel.label)


def _bars(axis: Any, panel: Panel, rows: Sequence[Row], experiment: Experiment) -> None:
    colors = dict(zip(_series(rows), _COLOURS, strict=False))
    seen: set[str] = set()
    for place, row in enumerate(rows):
        value = row.get(panel.key)
        if value is None:
            continue
        name = row["series"]
        axis.barh(place, value * panel.factor, color=colors[name], label=None if name in seen else name)
        axis.annotate(
            _short(value * panel.factor), (value * panel.factor, place), (3, 0), textcoords="offset points",
            va="center", fontsize=8,
        )  # fmt: skip
        seen.add(name)
    axis.set_yticks(range(len(rows)), [row["case"] for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    if panel.log:
        axis.set_xscale("log")
    else:
        axis.locator_params(axis="x", nbins=5)
        axis.xaxis.set_major_formatter(_WITH_COMMAS)
    axis.margins(x=0.2)
    if not panel.log:
        axis.set_xlim(left=0)
    axis.set_xlabel(panel.label)


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
