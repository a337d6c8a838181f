"""A stretch of decode steps of the same rows: its times and its pages, as if they had been taken one by one."""

from __future__ import annotations

import numpy as np

from jaxserve.scheduler import StepPlan


def stretch_times(
    now: float, end: float, seconds: np.ndarray, before: float, after: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """When the turns of a stretch begin, and when their steps start and end on the device: float64, one a step.

    now: when the first turn begins. end: of the step in flight. seconds: of the steps. before, after: of the host.
    A step starts when it is dispatched and the one before has ended; then that one's ids are taken in.
    """
    ends = np.cumsum(np.concatenate([[end], seconds]))
    starts, ends = ends[:-1], ends[1:]
    begins = np.concatenate([[now], starts[:-1] + after])
    if (begins + before <= starts).all():
        return begins, starts, ends
    # The host is slower than the device in places: turn by turn.
    begins, starts, ends = (np.empty(len(seconds)) for _ in range(3))
    for turn, each in enumerate(seconds.tolist()):
        start = max(now + before, end)
        begins[turn], starts[turn] = now, start
        end = ends[turn] = start + each
        now = start + after
    return begins, starts, ends


def pages_over(plan: StepPlan, turns: int, before: int, after: int) -> np.ndarray:
    """Pages in use at each of the steps after `plan`: a row takes one when its position is a multiple of the size."""
    size = plan.decodes.page_size
    needed = np.bincount(-(plan.decodes.starts + 1) % size, minlength=size)
    taken = np.cumsum(needed[np.arange(turns) % size])
    # Rows whose pages were all reserved take none.
    return before + taken if before + taken[-1] == after else np.full(turns, after)
