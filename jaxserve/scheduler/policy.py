"""Who goes first: a policy maps a sequence to its standing; the smallest is served first and preempted last."""

from __future__ import annotations

from collections.abc import Callable

from jaxserve.scheduler.sequence import Sequence

Standing = tuple[float, ...]
Policy = Callable[[Sequence], Standing]


def fcfs(sequence: Sequence) -> Standing:
    """First come, first served."""
    return (sequence.order,)


POLICIES: dict[str, Policy] = {"fcfs": fcfs}
