"""Tracks batch size, tokens, pages, queues and preemptions of steps over time, in bounded memory.

    with contextlib.closing(BatchTimelineFile(recorder, "directory")):
        ...                                             writes composition.json, and composition.png with matplotlib

A `BatchTimelineTracker` subscribes to a recorder of the engine or of the simulator alike: it reads events and no clock.
"""

from __future__ import annotations

import json
import logging
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxserve.telemetry import batch_timeline_plot as composition_plot
from jaxserve.telemetry.recorder import Event, Recorder, RequestPreempted, StepRecorded

SUMMED = (
    "steps",
    "seconds",
    "rows",
    "prefill_tokens",
    "decode_tokens",
    "padding",
    "running",
    "waiting",
    "swapped",
    "pages_used",
    "pages_cached",
    "pages_swapped",
    "idle_seconds",
    "preempted_recompute",
    "preempted_swap",
)
"""Columns of a timeline that are sums over the steps of a point: a mean is one of them over its `steps`."""

MAX_POINTS = 8192
"""Maximum number of points of a timeline."""

_log = logging.getLogger(__name__)


class BatchTimelineTracker:
    """Accumulates sums over runs of consecutive steps, one step a point as long as there are few.

    Args:
        max_points: when that many are full, neighbors are joined in pairs, and each point holds twice as many steps
            from then on; memory and the size of the output do not grow with the run.
    """

    def __init__(self, max_points: int = MAX_POINTS) -> None:
        if max_points < 2:
            raise ValueError(f"max_points is {max_points}; it must be at least 2")
        self._max_points = max_points
        self._steps_of_a_point = 1
        self._columns: dict[str, list[float]] = {name: [] for name in ("begin", *SUMMED)}
        self._preempted: Counter[str] = Counter()  # since the last step
        self._pages = 0

    def __call__(self, event: Event) -> None:
        """Processes one event: the listener for `Recorder.subscribe`."""
        if isinstance(event, StepRecorded):
            self.add(event)
        elif isinstance(event, RequestPreempted):
            self._preempted[event.kind] += 1

    def add(self, step: StepRecorded, count: int = 1, seconds: float | None = None) -> None:
        """Adds `count` steps like `step`, the first of which began then, and which took `seconds` together.

        seconds: None is the host time of `step`, times count.
        """
        columns = self._columns
        steps = columns["steps"]
        values = {name: count * getattr(step, name, 0) for name in SUMMED}
        values |= {
            "steps": count,
            "seconds": count * step.seconds if seconds is None else seconds,
            "preempted_recompute": self._preempted["recompute"],
            "preempted_swap": self._preempted["swap"],
        }
        self._preempted.clear()
        self._pages = step.pages_used + step.pages_free + step.pages_cached
        if steps and steps[-1] < self._steps_of_a_point:
            for name, value in values.items():
                columns[name][-1] += value
            return
        if len(steps) == self._max_points:
            self._join_neighbors()
        columns["begin"].append(step.time)
        for name, value in values.items():
            columns[name].append(value)

    def to_dict(self) -> dict[str, Any]:
        """Returns {"pages": usable pages, "points": {"begin": seconds since the first step, and each of SUMMED: a
        sum}}.
        """
        points: dict[str, list[float]] = {name: list(values) for name, values in self._columns.items()}
        points["begin"] = [time - points["begin"][0] for time in points["begin"]]
        return {"pages": self._pages, "points": points}

    def _join_neighbors(self) -> None:
        self._steps_of_a_point *= 2
        for name, values in self._columns.items():
            first, second = values[::2], values[1::2]
            if name != "begin":
                first[: len(second)] = [one + other for one, other in zip(first, second, strict=False)]
            self._columns[name] = first


def of_steps(
    pages: int, begin: np.ndarray, seconds: np.ndarray, columns: Mapping[str, np.ndarray], max_points: int = MAX_POINTS
) -> dict[str, Any]:
    """Returns the same as `BatchTimelineTracker.to_dict`, for steps given as columns: float64 [steps] each, in order.

    Args:
        pages: usable ones.
        begin: of each step.
        seconds: of each step.
        columns: of SUMMED; missing ones are 0.
    """
    count = len(begin)
    starts = np.arange(0, count, max(1, -(-count // max_points)))

    def joined(values: np.ndarray) -> list[float]:
        return np.add.reduceat(values, starts).tolist() if count else []

    zeros = np.zeros(count)
    found = {name: joined(columns.get(name, zeros)) for name in SUMMED}
    found |= {"steps": joined(np.ones(count)), "seconds": joined(seconds)}
    return {"pages": pages, "points": {"begin": (begin[starts] - begin[:1]).tolist(), **found}}


def write(found: Mapping[str, Any], directory: pathlib.Path, title: str = "", stem: str = "composition") -> None:
    """Writes STEM.json, and STEM.png where matplotlib is installed, into the directory, over existing files.

    The directory is created where it is missing; without steps there is no plot.

    Args:
        found: from `BatchTimelineTracker.to_dict` or `of_steps`.
        directory: takes the files.
        title: of the plot.
        stem: of the files' names.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{stem}.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    if not found["points"]["begin"]:
        return
    try:
        composition_plot.draw(found, directory / f"{stem}.png", title)
    except ImportError:
        _log.warning("matplotlib is not installed, so that %s has no plot: pip install 'jaxserve[plot]'", directory)


class BatchTimelineFile:
    """Tracks a recorder's events until `close`, which writes the timeline; does nothing without a directory.

    Raises OSError at once, not after the run, where the directory cannot be created.
    """

    def __init__(self, recorder: Recorder, directory: str | os.PathLike[str] | None, title: str = "") -> None:
        self._directory = directory
        self._title = title
        self._tracker = BatchTimelineTracker()
        self._unsubscribe: Callable[[], None] | None = None
        if directory is not None:
            pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
            self._unsubscribe = recorder.subscribe(self._tracker)

    def close(self) -> None:
        """Ends the tracking and writes; a second call does nothing."""
        if self._unsubscribe is not None and self._directory is not None:
            self._unsubscribe()
            self._unsubscribe = None
            write(self._tracker.to_dict(), pathlib.Path(self._directory), self._title)
