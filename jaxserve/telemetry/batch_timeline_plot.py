"""Plots a batch timeline: sequences, tokens, pages and queues over time, one panel each."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_MAX_DRAWN = 600
"""Number of points beyond which neighbors are drawn as one: a plot has no more pixels to show them."""

_PREFILL, _DECODE, _PADDING, _OTHER, _LATE = "#d95f02", "#1b9e77", "#bbbbbb", "#7570b3", "#e7298a"


def draw(composition: Mapping[str, Any], path: str | os.PathLike[str], title: str = "") -> None:
    """Plots the output of `BatchTimelineTracker.to_dict`, with at least one point, to a file.

    Raises ImportError without matplotlib, which serving itself does not need.
    """
    from matplotlib.figure import Figure

    times, means, sums = _steps_over_time(composition["points"])
    figure = Figure(figsize=(10, 9), layout="constrained")
    size, tokens, pages, queues = figure.subplots(4, 1, sharex=True)

    _line(size, times, means["rows"], "sequences in the step", _DECODE)
    size.set_ylabel("sequences")

    _stack(tokens, times, means, (("decode_tokens", _DECODE), ("prefill_tokens", _PREFILL), ("padding", _PADDING)))
    tokens.set_ylabel("tokens per step")

    total = max(composition["pages"], 1)
    share = {name: 100 * means[name] / total for name in ("pages_used", "pages_cached")}
    _stack(pages, times, share, (("pages_used", _OTHER), ("pages_cached", _PADDING)))
    pages.set_ylabel(f"% of {composition['pages']:,} pages")
    pages.set_ylim(0, 102)

    for name, color in (("running", _DECODE), ("waiting", _PREFILL), ("swapped", _OTHER)):
        if name != "swapped" or means[name].any():
            _line(queues, times, means[name], name, color)
    for name, label, marker in (
        ("preempted_recompute", "preempted, recompute", "v"),
        ("preempted_swap", "preempted, swap", "^"),
    ):
        hit = np.flatnonzero(sums[name])
        if len(hit):
            queues.plot(times[hit], np.zeros(len(hit)), marker, color=_LATE, markersize=5, label=label, clip_on=False)
    queues.set_ylabel("requests")
    queues.set_xlabel("seconds since the first step")
    queues.set_xlim(0, times[-1] if times[-1] > 0 else 1)

    for axis in (size, tokens, pages, queues):
        axis.grid(visible=True, alpha=0.3)
        if axis is not pages:
            axis.set_ylim(bottom=0)
        axis.legend(loc="upper left", bbox_to_anchor=(1.005, 1.0), borderaxespad=0.0)  # beside: inside it hides lines
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _steps_over_time(
    points: Mapping[str, Sequence[float]],
) -> tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns times, and for each column the mean over the steps from that time on, and the sum; zero where none
    ran.
    """
    columns = {name: np.asarray(values, dtype=np.float64) for name, values in points.items()}
    begin = columns.pop("begin")
    end = begin + columns["seconds"]
    # Seams between steps, which the loop spends outside of their timed parts, are not worth a gap in a plot.
    pauses = np.flatnonzero(begin[1:] - end[:-1] > 0.005 * (end[-1] - begin[0])) + 1
    group = -(-len(begin) // _MAX_DRAWN)
    edges = [0, *pauses.tolist(), len(begin)]  # what is drawn as one never lies on both sides of a pause
    starts = np.concatenate([np.arange(first, last, group) for first, last in itertools.pairwise(edges)])
    sums = {name: np.add.reduceat(values, starts) for name, values in columns.items()}
    at = np.searchsorted(starts, edges[1:])
    times = np.insert(begin[starts], at, end[np.array(edges[1:]) - 1])
    sums = {name: np.insert(values, at, 0.0) for name, values in sums.items()}
    steps = np.maximum(sums["steps"], 1)
    return times, {name: values / steps for name, values in sums.items()}, sums


def _line(axis: Any, times: np.ndarray, values: np.ndarray, label: str, color: str) -> None:
    axis.plot(times, values, drawstyle="steps-post", color=color, linewidth=1.2, label=label)


def _stack(axis: Any, times: np.ndarray, values: Mapping[str, np.ndarray], layers: Sequence[tuple[str, str]]) -> None:
    bottom = np.zeros(len(times))
    for name, color in layers:
        if not values[name].any():
            continue
        top = bottom + values[name]
        label = name.replace("_tokens", "").replace("pages_", "")
        axis.fill_between(times, bottom, top, step="post", color=color, linewidth=0, label=label)
        bottom = top
