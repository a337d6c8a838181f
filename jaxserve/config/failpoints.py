"""Injects faults into an engine and its front end for tests and drills, by name: `EngineConfig.failpoints`.

A failpoint is POINT=ACTION[,times=N][,after=N][,every=N][,apart=SECONDS][,request=ID]:

    pack=raise,times=1            packing fails once, before anything was enqueued
    execute=raise,after=20        from the 21st step on, a program fails in execution and takes its donated arrays along
    collect=sleep(10),times=1     the ids of one step come 10 seconds late
    detokenize=raise,every=500    every 500th piece of output cannot be turned into text
    collect=raise,apart=90        the ids of a step cannot be read, at most once in 90 seconds

POINT is one of `POINTS`; ACTION is `raise`, or `sleep(SECONDS)`. after: passes that go well first. every: of the others
it acts on each Nth. apart: it acts again only after so many seconds. times: how often it acts; without it, always.
request: only passes that concern this request count. Several failpoints act independently of each other.

Whoever has such a point asks once, when it is made, whether there are failpoints at it (`Failpoints.at`): without any
it does what it would do if they did not exist.
"""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Callable, Collection, Sequence

POINTS = {
    "allocate": "a request's pages cannot be allocated while a step is planned",
    "pack": "before a step's first program is enqueued",
    "enqueue": "a program is refused, as for want of memory, and its arguments stay",
    "execute": "a program fails in execution, and its donated arguments are gone",
    "collect": "a step's ids cannot be read, since one of its programs failed",
    "detokenize": "a request's output cannot be turned into text",
    "send": "a request's output cannot be sent to its client",
}
"""Points where a server can be made to fail, each with the failure that a `raise` there simulates. All but the last two
are the engine's."""

_FORM = re.compile(r"(?P<point>\w+)=(?P<action>raise|sleep\((?P<seconds>\d+(\.\d+)?)\))(?P<options>(,\w+=[^,]+)*)")

Hit = Callable[[Collection[str]], None]
"""Passes a point with these requests; raises InjectedFaultError or sleeps if a failpoint says so."""


class InjectedFaultError(RuntimeError):
    """Signals that a failpoint raised."""


@dataclasses.dataclass(frozen=True)
class Failpoint:
    """Holds one parsed failpoint; seconds: None raises."""

    point: str
    seconds: float | None = None
    times: int | None = None
    after: int = 0
    every: int = 1
    apart: int = 0
    request: str | None = None

    @classmethod
    def parse(cls, text: str) -> Failpoint:
        """Parses the form in the module's docstring. Raises ValueError naming the text and what it should be."""
        form = (
            "POINT=raise or POINT=sleep(SECONDS), then any of ,times=N ,after=N ,every=N (from 1) ,apart=SECONDS "
            ",request=ID"
        )
        match = _FORM.fullmatch(text)
        if match is None:
            raise ValueError(f"failpoint {text!r} is malformed; it must be {form}")
        if match["point"] not in POINTS:
            raise ValueError(f"failpoint {text!r} names no point; known points are {', '.join(POINTS)}")
        options = dict(option.split("=", 1) for option in match["options"].split(",") if option)
        request = options.pop("request", None)
        numbers = {name: int(value) for name, value in options.items() if value.isdecimal()}
        known = {"times", "after", "every", "apart"}
        if set(options) - known or len(numbers) < len(options) or numbers.get("every") == 0:
            raise ValueError(
                f"failpoint {text!r} has an unknown option, or one that is no whole number; it must be {form}"
            )
        seconds = None if match["seconds"] is None else float(match["seconds"])
        return cls(match["point"], seconds, request=request, **numbers)


@dataclasses.dataclass
class _Armed:
    """Counts one failpoint's passes and acts."""

    failpoint: Failpoint
    passed: int = 0
    acted: int = 0
    acted_at: float = -math.inf

    def acts(self, clock: Callable[[], float]) -> bool:
        """Counts a pass; tells whether the failpoint acts on it."""
        failpoint = self.failpoint
        self.passed += 1
        number = self.passed - failpoint.after
        if number <= 0 or number % failpoint.every or (failpoint.times is not None and self.acted >= failpoint.times):
            return False
        if failpoint.apart:
            now = clock()
            if now - self.acted_at < failpoint.apart:
                return False
            self.acted_at = now
        self.acted += 1
        return True


class Failpoints:
    """Holds failpoints, and counts how often each was passed. clock: monotonic, in seconds."""

    def __init__(
        self,
        failpoints: Sequence[str],
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._armed = [_Armed(Failpoint.parse(text)) for text in failpoints]
        self._sleep = sleep
        self._clock = clock

    def __bool__(self) -> bool:
        return bool(self._armed)

    def at(self, point: str) -> Hit | None:
        """Returns what passes a point of `POINTS`; None where no failpoint is."""
        if not any(armed.failpoint.point == point for armed in self._armed):
            return None
        return lambda request_ids: self.hit(point, request_ids)

    def hit(self, point: str, request_ids: Collection[str]) -> None:
        """Passes a point with these requests; raises InjectedFaultError or sleeps if a failpoint says so."""
        for armed in self._armed:
            failpoint = armed.failpoint
            if failpoint.point != point or (failpoint.request is not None and failpoint.request not in request_ids):
                continue
            if not armed.acts(self._clock):
                continue
            if failpoint.seconds is None:
                raise InjectedFaultError(f"failpoint {point}: {POINTS[point]}")
            self._sleep(failpoint.seconds)
