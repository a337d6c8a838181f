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

    def dispatched(self, now: float) -> None:
        """Records that a step was dispatched to the device."""
        self._busy_at = now

    def emptied(self, now: float) -> None:
        """Records that the last step in flight was collected."""
        self._emptied_at = now

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
