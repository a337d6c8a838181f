"""Measures rates of events and limits them, on whatever clock the caller has. No input or output."""

from __future__ import annotations

import math

_FADE_SECONDS = 30.0
"""Seconds after which a measurement weighs 1/e of a new one."""

_FEW = 4.0
"""Minimum weight of events from which a rate is told."""


class RateMeter:
    """Measures events per second of the time that counts, which the caller decides; older ones fade.

    fade_seconds: of counted time, after which an event weighs 1/e.
    """

    def __init__(self, fade_seconds: float = _FADE_SECONDS):
        self._fade = fade_seconds
        self._events = 0.0
        self._seconds = 0.0

    def passed(self, seconds: float) -> None:
        """Counts time."""
        if seconds > 0:
            kept = math.exp(-seconds / self._fade)
            self._events *= kept
            self._seconds = self._seconds * kept + self._fade * (1 - kept)

    def happened(self, events: float = 1.0) -> None:
        """Counts events at the present time."""
        self._events += events

    @property
    def rate(self) -> float | None:
        """Events per second; None while too few were seen."""
        return self._events / self._seconds if self._events >= _FEW and self._seconds > 0 else None


class Average:
    """Keeps a moving average of a figure; None while there is none. weight: of a new value, once there are many."""

    def __init__(self, weight: float = 0.05):
        self._weight = weight
        self._count = 0
        self.value: float | None = None

    def add(self, value: float) -> None:
        """Adds a value: the first ones weigh alike."""
        self._count += 1
        old = self.value or 0.0
        self.value = old + max(self._weight, 1 / self._count) * (value - old)


class Allowance:
    """Limits a rate as a token bucket does: what a minute allows may come at once, and is then refilled evenly.

    per_minute: the rate, and what the allowance holds. A withdrawal of more than it holds takes all of a full one, and
    leaves it in debt. now: of the clock that later calls use.
    """

    def __init__(self, per_minute: float, now: float):
        self.per_minute = per_minute
        self._per_second = per_minute / 60.0
        self._level = per_minute
        self._since = now

    def level(self, now: float) -> float:
        """Returns what is left; below 0 in debt."""
        return min(self.per_minute, self._level + self._per_second * max(now - self._since, 0.0))

    def seconds_until(self, amount: float, now: float) -> float:
        """Returns the seconds until so much can be taken; 0 when it can be now."""
        lacking = min(amount, self.per_minute) - self.level(now)
        return max(lacking / self._per_second, 0.0)

    def take(self, amount: float, now: float) -> None:
        """Takes an amount; a negative one is put back."""
        self._level = min(self.level(now) - amount, self.per_minute)
        self._since = max(now, self._since)

    def is_full(self, now: float) -> bool:
        """Whether nothing is missing."""
        return self.level(now) >= self.per_minute
