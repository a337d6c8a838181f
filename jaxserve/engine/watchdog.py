"""Tells an engine that is at work from one that hangs, by what it says of its progress.

The engine is asked again and again how far its loop is (`EngineClient.progress`). Two things must not last: that it
does not answer, as a process that is stopped does not; and that one turn of its loop, a step, is under way. Both are
timed by the looks of the watchdog, and between two looks at most twice their interval counts: when the front end itself
was stopped, or busy, the time in which it did not look does not count against the engine.
"""

from __future__ import annotations

from jaxserve.engine.messages import Progress

SHORTEST_LIMIT = 60.0
"""Seconds of the limit that is not configured, at least."""

LARGEST_STEPS = 20.0
"""The same, in largest steps as predicted."""

_LONGEST_INTERVAL = 1.0
_LOOKS = 8
"""Looks within the limit, at least."""


class Watchdog:
    """step_timeout: seconds, as `ServerConfig.step_timeout`; None follows the engine's prediction."""

    def __init__(self, step_timeout: float | None = None):
        self._step_timeout = step_timeout
        self._last = Progress(0, 0, False)
        self._looked_at: float | None = None
        self._silent = 0.0
        self._in_turn = 0.0

    @property
    def limit(self) -> float:
        """Seconds that a step, or silence, may last."""
        if self._step_timeout is not None:
            return self._step_timeout
        return max(SHORTEST_LIMIT, LARGEST_STEPS * self._last.largest_step_seconds)

    @property
    def interval(self) -> float:
        """Seconds between two looks."""
        return min(_LONGEST_INTERVAL, self.limit / _LOOKS)

    def look(self, now: float, progress: Progress) -> str | None:
        """Takes the engine's latest answer. Returns one line on what is wrong, or None. now: of a monotonic clock."""
        passed = 0.0 if self._looked_at is None else min(now - self._looked_at, 2 * self.interval)
        self._looked_at = now
        answered = progress.beat != self._last.beat
        same_turn = progress.in_turn and self._last.in_turn and progress.turns == self._last.turns
        self._silent = 0.0 if answered else self._silent + passed
        self._in_turn = self._in_turn + passed if same_turn else 0.0
        self._last = progress
        if self._silent > self.limit:
            return (
                f"the engine has not answered for {self._silent:.1f} s (step_timeout {self.limit:g} s): its process is "
                "stopped, or hangs"
            )
        if self._in_turn > self.limit:
            return f"a step has not ended for {self._in_turn:.1f} s (step_timeout {self.limit:g} s)"
        return None
