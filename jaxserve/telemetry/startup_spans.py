"""Measures startup spans: named phases of a process's start, some of them concurrent."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import threading
import time
from collections.abc import Iterator, Sequence

StartupSpan = tuple[str, float, float]
"""Name, begin (seconds since its process started), and duration in seconds."""

_imported = time.monotonic()  # a fallback where the system does not say when the process started


def seconds_since_start() -> float:
    """Returns seconds since this process started, including the interpreter's start where /proc is available."""
    try:
        after_name = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic() - _imported


class StartupSpans:
    """Collects the startup spans of this process, in the order of their beginnings. Thread-safe."""

    def __init__(self) -> None:
        self._origin = time.perf_counter() - seconds_since_start()
        self._lock = threading.Lock()
        self._phases: list[StartupSpan] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures the enclosed block; a phase that fails is not kept."""
        begin = time.perf_counter()
        yield
        self._add(name, begin, time.perf_counter())

    def until_now(self, name: str) -> None:
        """Adds a phase from the start of the process until now."""
        self._add(name, self._origin, time.perf_counter())

    def all(self) -> tuple[StartupSpan, ...]:
        """Returns the phases that have ended."""
        with self._lock:
            return tuple(sorted(self._phases, key=lambda phase: phase[1]))

    def _add(self, name: str, begin: float, end: float) -> None:
        with self._lock:
            self._phases.append((name, begin - self._origin, end - begin))


def phase_lines(title: str, phases: Sequence[StartupSpan]) -> list[str]:
    """Formats the phases for a log: a title and one line each."""
    width = max((len(name) for name, _, _ in phases), default=0)
    return [
        f"{title}, seconds (begin, duration):",
        *(f"  {name.ljust(width)} {begin:7.2f} {seconds:7.2f}" for name, begin, seconds in phases),
    ]


def phases_json(**parts: Sequence[StartupSpan]) -> str:
    """Formats the phases of several processes as one line of JSON: lists of {name, begin, seconds} by process."""
    return json.dumps(
        {
            part: [
                {"name": name, "begin": round(begin, 4), "seconds": round(seconds, 4)}
                for name, begin, seconds in phases
            ]
            for part, phases in parts.items()
        }
    )
