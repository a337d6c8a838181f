"""Where the time of a start goes: named phases of a process, some of them side by side."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import threading
import time
from collections.abc import Iterator, Sequence

StartupSpan = tuple[str, float, float]
"""Name, when it began (seconds since its process started), and how many seconds it took."""

_imported = time.monotonic()  # a fallback where the system does not say when the process started


def seconds_since_start() -> float:
    """Seconds since this process started, the interpreter's own start included where /proc tells."""
    try:
        after_name = pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        started = int(after_name[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    except (OSError, ValueError, IndexError, AttributeError):
        return time.monotonic() - _imported


class StartupSpans:
    """The phases of this process's start, in the order of their beginnings. Safe for several threads."""

    def __init__(self) -> None:
        self._origin = time.perf_counter() - seconds_since_start()
        self._lock = threading.Lock()
        self._phases: list[StartupSpan] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures what happens within; a phase that fails is not kept."""
        begin = time.perf_counter()
        yield
        self._add(name, begin, time.perf_counter())

    def until_now(self, name: str) -> None:
        """A phase from the start of the process until now."""
        self._add(name, self._origin, time.perf_counter())

    def all(self) -> tuple[StartupSpan, ...]:
        """The phases that have ended."""
        with self._lock:
            return tuple(sorted(self._phases, key=lambda phase: phase[1]))

    def _add(self, name: str, begin: float, end: float) -> None:
        with self._lock:
            self._phases.append((name, begin - self._origin, end - begin))


def phase_lines(title: str, phases: Sequence[StartupSpan]) -> list[str]:
    """One line for each phase and one before them, for a log."""
    width = max((len(name) for name, _, _ in phases), default=0)
    return [
        f"{title}, seconds (begin, duration):",
        *(f"  {name.ljust(width)} {begin:7.2f} {seconds:7.2f}" for name, begin, seconds in phases),
    ]


def phases_json(**parts: Sequence[StartupSpan]) -> str:
    """The phases of several processes as one line of JSON: lists of {name, begin, seconds} by process."""
    return json.dumps(
        {
            part: [
                {"name": name, "begin": round(begin, 4), "seconds": round(seconds, 4)}
                for name, begin, seconds in phases
            ]
            for part, phases in parts.items()
        }
    )
