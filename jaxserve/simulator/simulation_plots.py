"""Plots simulations. matplotlib is imported when one is drawn; nothing else here needs it."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxserve.simulator.simulation import SimulationResult
from jaxserve.telemetry import batch_timeline

_MOST_POINTS = 4000
_FEW_DECADES = 300
_LETTER, _HANDLE = 0.085, 0.6
"""Width of a letter in a legend in inches, and of the line and space beside a label."""


def draw_all(results: Mapping[str, SimulationResult], directory: pathlib.Path) -> list[pathlib.Path]:
    """Plots latency.png, over_time.png and, with two tenants or more, tenants.png; with prompts that were found in the
    prefix cache, cached.png. Returns the paths written.

    Raises ImportError without matplotlib.
    """
    directory.mkdir(parents=True, exist_ok=True)
    made = [latencies(results, directory / "latency.png"), over_time(results, directory / "over_time.png")]
    if any(len(set(result.trace.tenants)) > 1 for result in results.values()):
        made.append(by_tenant(results, directory / "tenants.png"))
    if any(result.cached_tokens.any() for result in results.values()):
        made.append(cached(results, directory / "cached.png"))
    return made


def latencies(results: Mapping[str, SimulationResult], path: pathlib.Path) -> pathlib.Path:
    """Plots the cumulative share of requests by time to first token, time per token, and end-to-end latency."""
    figure, axes = _figure(1, 3, (13, 4.4))
    panels = (("ttft", "time to first token (s)"), ("tpot", "time per output token (s)"), ("e2e", "end to end (s)"))
    for axis, (name, label) in zip(axes, panels, strict=True):
        for run, result in results.items():
            values = np.sort(getattr(result, name)[result.completed])
            values = values[~np.isnan(values)]
            if len(values):
                share = np.arange(1, len(values) + 1) / len(values)
                keep = np.unique(np.linspace(0, len(values) - 1, _MOST_POINTS).astype(int))
                axis.plot(np.maximum(values[keep], 1e-6), 100 * share[keep], label=run)
        axis.set_xscale("log")
        _plain_numbers(axis.xaxis)
        axis.set_xlabel(label)
        axis.set_ylabel("requests with at most that (%)")
        axis.set_ylim(0, 101)
        axis.grid(visible=True, which="major", alpha=0.3)
    return _save(figure, axes[0], len(results), path)


def over_time(results: Mapping[str, SimulationResult], path: pathlib.Path) -> pathlib.Path:
    """Plots running and waiting requests, and pages in use, of all replicas together over time."""
    figure, axes = _figure(3, 1, (11, 8))
    panels = (("running", "requests running"), ("waiting", "requests waiting"), ("pages_used", "pages in use"))
    for run, result in results.items():
        grid = np.linspace(0, max(result.seconds, 1e-9), 600)
        for axis, (name, _) in zip(axes, panels, strict=True):
            axis.plot(grid, sum(_sampled(steps, name, grid) for steps in result.steps), label=run, linewidth=1.0)
    for axis, (_, label) in zip(axes, panels, strict=True):
        axis.set_ylabel(label)
        axis.set_ylim(0, max(1.0, axis.get_ylim()[1]))
        axis.grid(visible=True, alpha=0.3)
    axes[-1].set_xlabel("time since the first arrival (s)")
    return _save(figure, axes[0], len(results), path)


def compositions(result: SimulationResult, pages: int, directory: pathlib.Path) -> list[pathlib.Path]:
    """Plots the batch timeline of each replica: composition.png and .json, or composition_1, composition_2, ...

    of several.

    pages: usable ones of a replica. Returns the plots that were written.
    """
    made = []
    for number, steps in enumerate(result.steps, start=1):
        several = len(result.steps) > 1
        stem = f"composition_{number}" if several else "composition"
        batch_timeline.write(_composition(steps, pages), directory, f"replica {number}" if several else "", stem)
        made += [directory / f"{stem}.png"] * bool(len(steps["begin"]))
    return made


def cached(results: Mapping[str, SimulationResult], path: pathlib.Path) -> pathlib.Path:
    """Plots the share of prompt tokens that were found in the prefix cache, of all requests up to each arrival, and
    the pages whose content is kept."""
    figure, axes = _figure(2, 1, (11, 6))
    for run, result in results.items():
        order = np.argsort(result.arrived)
        share = np.cumsum(result.cached_tokens[order]) / np.cumsum(result.trace.prompt_tokens[order])
        axes[0].plot(result.arrived[order], 100 * share, label=run)
        grid = np.linspace(0, max(result.seconds, 1e-9), 600)
        pages = sum(_sampled(steps, "pages_cached", grid) for steps in result.steps)
        axes[1].plot(grid, pages, label=run, linewidth=1.0)
    axes[0].set_ylabel("prompt tokens cached, so far (%)")
    axes[1].set_ylabel("pages cached, not in use")
    axes[-1].set_xlabel("time since the first arrival (s)")
    for axis in axes:
        axis.set_ylim(0, max(1.0, axis.get_ylim()[1]))
        axis.grid(visible=True, alpha=0.3)
    return _save(figure, axes[0], len(results), path)


def by_tenant(results: Mapping[str, SimulationResult], path: pathlib.Path) -> pathlib.Path:
    """Plots mean and 99th percentile of the time to first token of each tenant."""
    tenants = sorted({tenant for result in results.values() for tenant in result.trace.tenants})
    figure, axes = _figure(1, 2, (max(8.0, 2 + 1.6 * len(tenants)), 4.4))
    width = 0.8 / len(results)
    for axis, (title, figure_of) in zip(axes, (("mean", np.mean), ("99th percentile", _p99)), strict=True):
        for place, (run, result) in enumerate(results.items()):
            heights = []
            for tenant in tenants:
                mine = result.completed & np.array([each == tenant for each in result.trace.tenants], bool)
                heights.append(float(figure_of(result.ttft[mine])) if mine.any() else 0.0)
            offsets = np.arange(len(tenants)) + (place - (len(results) - 1) / 2) * width
            axis.bar(offsets, heights, width, label=run)
        axis.set_xticks(range(len(tenants)), [tenant or "no tenant" for tenant in tenants])
        axis.set_xlabel("tenant")
        axis.set_yscale("log")
        _plain_numbers(axis.yaxis)
        axis.set_ylabel(f"time to first token, {title} (s)")
        axis.grid(visible=True, axis="y", alpha=0.3)
    return _save(figure, axes[0], len(results), path)


def capacity(points: Mapping[str, list[tuple[float, float]]], target: float, path: pathlib.Path) -> pathlib.Path:
    """Plots goodput by rate. points: for each run (rate in requests a second, share of requests within the targets)."""
    figure, (axis,) = _figure(1, 1, (7.5, 4.8))
    for run, found in points.items():
        ordered = sorted(found)
        rates, shares = [rate for rate, _ in ordered], [100 * share for _, share in ordered]
        axis.plot(rates, shares, "o", alpha=0.7, label=run)  # of several rounds: no line joins them
    axis.axhline(100 * target, color="grey", linestyle="--", label=f"target {100 * target:g} %")
    axis.set_xlabel("arrival rate (requests/s)")
    axis.set_ylabel("requests within the targets (%)")
    axis.set_ylim(0, 102)
    axis.grid(visible=True, alpha=0.3)
    return _save(figure, axis, len(points) + 1, path)


def replicas(changes: Mapping[str, list[tuple[float, int]]], rates: Any, path: pathlib.Path) -> pathlib.Path:
    """Plots replicas over time.

    changes: for each run (time, replicas from then on). rates: (times, arrivals a second) of the trace.
    """
    figure, axes = _figure(2, 1, (11, 6))
    times, values = rates
    axes[0].step(times, values, where="post", color="grey", label="arrivals")
    axes[0].set_ylabel("arrivals (requests/s)")
    for run, steps in changes.items():
        ends = [*(time for time, _ in steps), max(times[-1], steps[-1][0])]
        counts = [*(count for _, count in steps), steps[-1][1]]
        axes[1].step(ends, counts, where="post", label=run)
    axes[1].set_ylabel("replicas up")
    axes[1].set_xlabel("time since the first arrival (s)")
    last = max(times[-1], *(steps[-1][0] for steps in changes.values()))
    for axis in axes:
        axis.set_xlim(-0.02 * last, 1.02 * last)
        axis.set_ylim(bottom=0)
        axis.grid(visible=True, alpha=0.3)
    return _save(figure, axes[1], len(changes), path)


def _composition(steps: Mapping[str, np.ndarray], pages: int) -> dict[str, Any]:
    """Returns the batch timeline on the device's clock: a step lasts from its start to its end."""
    padding = steps["token_bucket"] - steps["prefill_tokens"] - steps["decode_tokens"]
    idle = np.maximum(steps["start"][1:] - steps["end"][:-1], 0.0)
    columns = {**steps, "padding": padding, "idle_seconds": np.append(np.zeros(min(1, len(padding))), idle)}
    return batch_timeline.of_steps(pages, steps["start"], steps["end"] - steps["start"], columns)


def _p99(values: np.ndarray) -> float:
    return float(np.percentile(values, 99))


def _sampled(steps: Mapping[str, np.ndarray], name: str, grid: np.ndarray) -> np.ndarray:
    """Samples a column at times of a grid: the value of the step in flight, 0 without one."""
    if not len(steps["begin"]):
        return np.zeros(len(grid))
    place = np.searchsorted(steps["begin"], grid, side="right") - 1
    found = steps[name][np.maximum(place, 0)]
    return np.where((place >= 0) & (grid <= steps["end"][np.maximum(place, 0)]), found, 0.0)


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, np.atleast_1d(figure.subplots(rows, columns)).ravel()


def _plain_numbers(axis: Any) -> None:
    """Sets ticks of a logarithmic axis at 1, 2 and 5 times the powers of ten, or at the powers alone if those are
    many.
    """
    from matplotlib import ticker

    low, high = axis.get_view_interval()
    narrow = high / max(low, 1e-12) < _FEW_DECADES
    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _save(figure: Any, axis: Any, entries: int, path: pathlib.Path) -> pathlib.Path:
    """Saves the figure with one legend below all panels: within a panel it could cover a line."""
    handles, labels = axis.get_legend_handles_labels()
    width = max((len(label) for label in labels), default=1) * _LETTER + _HANDLE
    columns = max(1, min(entries, int(figure.get_figwidth() / width)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)
    figure.savefig(path, dpi=120)
    return path
