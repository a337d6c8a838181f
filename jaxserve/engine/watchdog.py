"""Distinguishes a working engine from one that hangs, by its reported progress.

The watchdog polls the engine's progress (`EngineClient.progress`). Two conditions must not last: that the engine does
not answer, as a stopped process does not; and that one iteration of its loop, a step, is in progress. Both are timed by
the polls, and between two polls at most twice their interval counts: time in which the front end itself was stopped or
busy does not count against the engine.
"""

from __future__ import annotations

from jaxserve.engine.messages import Progress

SHORTEST_LIMIT = 60.0
"""Minimum limit in seconds when none is configured."""

LARGEST_STEPS = 20.0
"""Minimum limit in predicted times of the largest step when none is configured."""

_LONGEST_INTERVAL = 1.0
_LOOKS = 8
"""Minimum number of polls within the limit."""


class Watchdog:
    """Times the engine's silence and steps.

    step_timeout: seconds, as `ServerConfig.step_timeout`; None follows the engine's prediction.
    """

    def __init__(self, step_timeout: float | None = None):
        self._step_timeout = step_timeout
        self._last = Progress(0, 0, False)
        self._looked_at: float | None = None
        self._silent = 0.0
        self._in_turn = 0.0

    @property
    def limit(self) -> float:
        """Returns the maximum seconds of a step, or of silence."""
        if self._step_timeout is not None:
            return self._step_timeout
        return max(SHORTEST_LIMIT, LARGEST_STEPS * self._last.largest_step_seconds)

    @property
    def interval(self) -> float:
        """Returns the seconds between two polls."""
        return min(_LONGEST_INTERVAL, self.limit / _LOOKS)

    def look(self, now: float, progress: Progress) -> str | None:
        """Checks the engine's latest answer.

        Args:
            now: seconds of a monotonic clock.
            progress: the answer.

        Returns:
            One line on what is wrong, or None.
        """
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
