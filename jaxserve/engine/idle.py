"""Measures how long the device waits for the host between two steps."""

from __future__ import annotations


class IdleMeter:
    """Bounds the time in which the device had no work, from looks at whether the step under way is done.

    A look costs a fraction of a microsecond and never waits. The device has ended a step somewhere between the last
    look that found it busy and the first that did not; the bound counts all of that as idle, so the true time is lower.
    Times are seconds of one clock.
    """

    def __init__(self) -> None:
        self._busy_at: float | None = None
        self._emptied_at: float | None = None
        self._began_at: float | None = None
        self._in_flight = False
        self._without_work = 0.0  # seconds, since the first step was dispatched

    def dispatched(self, now: float, without_work: float = 0.0) -> None:
        """Records that a step was dispatched to the device. without_work: what `idle` or `unused` said of it."""
        self._busy_at = now
        self._in_flight = True
        if self._began_at is None:
            self._began_at = now
        self._without_work += without_work

    def emptied(self, now: float) -> None:
        """Records that the last step in flight was collected, or lost."""
        self._emptied_at = now
        self._in_flight = False

    def busy_seconds(self, now: float) -> float:
        """Returns a lower bound of the seconds in which the device has had a step to compute."""
        end = now if self._in_flight else self._emptied_at
        return 0.0 if self._began_at is None or end is None else end - self._began_at - self._without_work

    def unused(self, now: float) -> float:
        """Returns the seconds since the last step in flight was collected, if none has been dispatched since."""
        return 0.0 if self._emptied_at is None else now - self._emptied_at

    def look(self, done: bool, now: float) -> None:
        """Records whether the step in flight was found done."""
        if not done:
            self._busy_at = now

    def idle(self, done: bool, now: float) -> float:
        """Returns an upper bound of the seconds that the device has been without work.

        Args:
            done: whether the step in flight is done.
            now: the current time.
        """
        return now - self._busy_at if done and self._busy_at is not None else 0.0
