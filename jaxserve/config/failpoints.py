"""Injects faults into an engine for tests and drills, by name: `EngineConfig.failpoints`.

A failpoint is POINT=ACTION[,times=N][,after=N][,request=ID]:

    pack=raise,times=1            packing fails once, before anything was enqueued
    execute=raise,after=20        from the 21st step on, a program fails in execution and takes its donated arrays along
    collect=sleep(10),times=1     the ids of one step come 10 seconds late

POINT is one of `POINTS`; ACTION is `raise`, or `sleep(SECONDS)`. after: passes that go well first. times: how often it
acts; without it, always. request: only steps that compute a token of this request count. Several failpoints act
independently of each other.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Collection, Sequence

POINTS = {
    "pack": "before a step's first program is enqueued",
    "enqueue": "a program is refused, as for want of memory, and its arguments stay",
    "execute": "a program fails in execution, and its donated arguments are gone",
    "collect": "a step's ids cannot be read, since one of its programs failed",
}
"""Points where an engine can be made to fail, each with the failure that a `raise` there simulates."""

_FORM = re.compile(r"(?P<point>\w+)=(?P<action>raise|sleep\((?P<seconds>\d+(\.\d+)?)\))(?P<options>(,\w+=[^,]+)*)")


class InjectedFaultError(RuntimeError):
    """Signals that a failpoint raised."""


@dataclasses.dataclass(frozen=True)
class Failpoint:
    """Holds one parsed failpoint; seconds: None raises."""

    point: str
    seconds: float | None = None
    times: int | None = None
    after: int = 0
    request: str | None = None

    @classmethod
    def parse(cls, text: str) -> Failpoint:
        """Parses the form in the module's docstring. Raises ValueError naming the text and what it should be."""
        form = "POINT=raise or POINT=sleep(SECONDS), then any of ,times=N ,after=N ,request=ID"
        match = _FORM.fullmatch(text)
        if match is None:
            raise ValueError(f"failpoint {text!r} is malformed; it must be {form}")
        if match["point"] not in POINTS:
            raise ValueError(f"failpoint {text!r} names no point; known points are {', '.join(POINTS)}")
        options = dict(option.split("=", 1) for option in match["options"].split(",") if option)
        request = options.pop("request", None)
        numbers = {name: int(value) for name, value in options.items() if value.isdecimal()}
        if set(options) - {"times", "after"} or len(numbers) < len(options):
            raise ValueError(
                f"failpoint {text!r} has an unknown option, or one that is no whole number; it must be {form}"
            )
        seconds = None if match["seconds"] is None else float(match["seconds"])
        return cls(match["point"], seconds, numbers.get("times"), numbers.get("after", 0), request)


class Failpoints:
    """Holds the failpoints of one engine, and counts how often each was passed."""

    def __init__(self, failpoints: Sequence[str], sleep: Callable[[float], None] = time.sleep):
        self._armed = [Failpoint.parse(text) for text in failpoints]
        self._passed = [0] * len(self._armed)
        self._sleep = sleep

    def __bool__(self) -> bool:
        return bool(self._armed)

    def hit(self, point: str, request_ids: Collection[str]) -> None:
        """Passes a point with a step of these requests; raises InjectedFaultError or sleeps if a failpoint says so."""
        for index, failpoint in enumerate(self._armed):
            if failpoint.point != point or (failpoint.request is not None and failpoint.request not in request_ids):
                continue
            self._passed[index] += 1
            number = self._passed[index] - failpoint.after
            if number <= 0 or (failpoint.times is not None and number > failpoint.times):
                continue
            if failpoint.seconds is None:
                raise InjectedFaultError(f"failpoint {point}: {POINTS[point]}")
            self._sleep(failpoint.seconds)
