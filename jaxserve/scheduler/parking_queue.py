"""Sets aside sequences that lack a penalty row, so that they hold up none of those behind them.

A queue offers its best member alone. One that needs a penalty row while none is free is parked when it is offered, and
comes back to its place when a row is free again (`SequenceQueues.start_step`).
"""

from __future__ import annotations

from collections.abc import Callable

from jaxserve.scheduler.keyed_queue import Queue
from jaxserve.scheduler.sequence import Sequence


class ParkingQueue:
    """Orders sequences as the queues that `make` returns do. Members that are parked are not offered."""

    def __init__(self, make: Callable[[], Queue]):
        self._offered = make()
        self._parked = make()

    def __len__(self) -> int:
        """Counts all members, those that are parked included."""
        return len(self._offered) + len(self._parked)

    def push(self, sequence: Sequence) -> None:
        self._offered.push(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Removes a member, parked or not."""
        (self._parked if sequence.parked else self._offered).remove(sequence)
        sequence.parked = False

    def peek(self) -> Sequence | None:
        """Returns the best member that is not parked, or None."""
        return self._offered.peek()

    def peek_parked(self) -> Sequence | None:
        """Returns the best parked member, or None."""
        return self._parked.peek()

    def park(self, sequence: Sequence) -> None:
        """Sets a member aside."""
        self._offered.remove(sequence)
        self._parked.push(sequence)
        sequence.parked = True

    def unpark(self) -> bool:
        """Offers the best parked member again; returns whether there was one."""
        sequence = self._parked.peek()
        if sequence is None:
            return False
        self.remove(sequence)
        self.push(sequence)
        return True
