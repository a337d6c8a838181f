"""Measures an engine's steps and the phases of its requests, from the events that its recorder passes on.

The engine sends what is measured of steps to the front end with its counts, several times a second, and what is
measured of a request with its first token.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxserve.telemetry.histograms import Histogram, HistogramCounts, decades, powers_of_two
from jaxserve.telemetry.recorder import Event, RequestArrived, RequestFinished, RequestScheduled, StepRecorded

_TOKENS = powers_of_two(14)

STEP_HISTOGRAMS: Mapping[str, tuple[float, ...]] = {
    "step_time_seconds": decades(-4, 1),
    "step_host_overhead_seconds": decades(-5, 0),
    "step_gap_seconds": decades(-6, 0),
    "iteration_tokens": _TOKENS,
    "prefill_tokens": _TOKENS,
    "decode_tokens": _TOKENS,
    "mask_seconds": decades(-5, 0),
}
"""Histograms of steps: the bounds of their buckets, in seconds or tokens. mask_seconds: of steps with masks alone."""


_OF_ALL_STEPS = tuple(name for name in STEP_HISTOGRAMS if name != "mask_seconds")

_VALUES = operator.attrgetter(
    "schedule_seconds",
    "dispatch_seconds",
    "update_seconds",
    "collect_seconds",
    "idle_seconds",
    "prefill_tokens",
    "decode_tokens",
)
_MAX_STEPS = 4096
"""Maximum number of steps that wait to be counted."""


class EngineMeter:
    """Listens to a recorder: subscribe it. Steps are only kept there, and counted together when somebody asks, which
    takes about a microsecond for each.
    """

    def __init__(self) -> None:
        self._histograms = {name: Histogram(bounds) for name, bounds in STEP_HISTOGRAMS.items()}
        self._steps: list[StepRecorded] = []
        self._arrived: dict[str, float] = {}
        self._scheduled: dict[str, float] = {}
        self._handlers: dict[type, Callable[[Any], None]] = {
            RequestArrived: self._arrive,
            RequestScheduled: self._schedule,
            RequestFinished: self._finish,
        }

    def __call__(self, event: Event) -> None:
        """Processes one event."""
        if type(event) is StepRecorded:
            self._steps.append(event)
            if len(self._steps) >= _MAX_STEPS:
                self._count()
            return
        handler = self._handlers.get(type(event))
        if handler is not None:
            handler(event)

    def masked(self, seconds: float) -> None:
        """Counts the time that a step waited for its masks."""
        self._histograms["mask_seconds"].observe_all(np.array([seconds]))

    def step_histograms(self) -> dict[str, HistogramCounts]:
        """Returns what is counted so far, by the names of STEP_HISTOGRAMS."""
        self._count()
        return {name: histogram.read() for name, histogram in self._histograms.items()}

    def phases(self, request_id: str, first_token: float) -> tuple[float, float]:
        """Returns the seconds that an unfinished request waited for its first step, and those from there to its first
        token, which the host has at `first_token`.
        """
        scheduled = self._scheduled.get(request_id, first_token)
        return scheduled - self._arrived.get(request_id, scheduled), first_token - scheduled

    def _count(self) -> None:
        """Counts the steps that are kept."""
        if not self._steps:
            return
        columns = np.array(list(map(_VALUES, self._steps)), np.float64).T
        self._steps.clear()
        host, (collect, gap, prefill, decode) = columns[:3].sum(0), columns[3:]
        values = (host + collect, host, gap, prefill + decode, prefill, decode)
        for name, column in zip(_OF_ALL_STEPS, values, strict=True):
            self._histograms[name].observe_all(column)

    def _arrive(self, event: RequestArrived) -> None:
        self._arrived[event.request_id] = event.time

    def _schedule(self, event: RequestScheduled) -> None:
        self._scheduled[event.request_id] = event.time

    def _finish(self, event: RequestFinished) -> None:
        self._arrived.pop(event.request_id, None)
        self._scheduled.pop(event.request_id, None)
