"""The one meter of the host's time in a step of the engine: which part of the loop took how long.

    schedule   expire deadlines, decide the step
    pack       the vectors of the forward and the sample program
    dispatch   enqueue the programs (with a runner that computes nothing: what it does instead)
    collect    wait for the ids of the step before
    update     take them: append, finish, free pages
    outputs    the rest: messages, events, statistics, encoding and framing, up to the call that would send them

A part is timed where the engine itself calls it, less what it calls that is a part of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxserve.engine.core import EngineCore
from jaxserve.engine.framing import frames
from jaxserve.engine.messages import FromEngine, encode
from jaxserve.engine.step_executor import StepExecutor
from jaxserve.runner.packing import ForwardPacker, SamplePacker
from jaxserve.scheduler import Scheduler

PARTS: tuple[str, ...] = ("schedule", "pack", "dispatch", "collect", "update", "outputs")

_PLACES: tuple[tuple[type, str, str], ...] = (
    (Scheduler, "expire", "schedule"),
    (Scheduler, "schedule", "schedule"),
    (ForwardPacker, "pack", "pack"),
    (SamplePacker, "pack", "pack"),
    (StepExecutor, "dispatch_forward", "dispatch"),
    (StepExecutor, "dispatch_sample", "dispatch"),
    (StepExecutor, "collect", "collect"),
    (Scheduler, "update", "update"),
)


class HostMeter:
    """Within its `with`, `step` turns the engine's loop and returns the seconds of each part."""

    def __init__(self) -> None:
        self._spent = dict.fromkeys(PARTS, 0.0)
        self._inner = [0.0]  # of every call under way the time of the parts that it called
        self._before: list[Any] = []

    def __enter__(self) -> HostMeter:
        self._before = [kind.__dict__[name] for kind, name, _ in _PLACES]
        for kind, name, part in _PLACES:
            setattr(kind, name, self._timed(kind.__dict__[name], part))
        return self

    def __exit__(self, *error: object) -> None:
        for (kind, name, _), function in zip(_PLACES, self._before, strict=True):
            setattr(kind, name, function)

    def step(self, core: EngineCore) -> tuple[dict[str, float], list[FromEngine]]:
        """Seconds of each part of one turn, and the messages that it made."""
        self._spent, self._inner = dict.fromkeys(PARTS, 0.0), [0.0]
        begin = time.perf_counter()
        messages = core.step()
        send(messages)
        self._spent["outputs"] = time.perf_counter() - begin - self._inner[0]
        return self._spent, messages

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            begin = time.perf_counter()
            inner = self._inner
            inner.append(0.0)
            result = function(*arguments)
            whole = time.perf_counter() - begin
            self._spent[part] += whole - inner.pop()
            inner[-1] += whole
            return result

        return call


def send(messages: list[FromEngine]) -> bytes:
    """What the engine's process does with messages, short of the system call."""
    return frames(map(encode, messages))


def microseconds(seconds: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Mean, median and 99th percentile."""
    values = np.asarray(seconds) * 1e6
    return {
        "mean": float(values.mean()),
        "p50": float(np.percentile(values, 50)),
        "p99": float(np.percentile(values, 99)),
    }


def by_part(steps: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """`microseconds` of each part over several steps, and of all together."""
    columns = {part: np.array([step[part] for step in steps]) for part in PARTS}
    columns["all"] = sum(columns.values(), np.zeros(len(steps)))
    return {name: microseconds(values) for name, values in columns.items()}
