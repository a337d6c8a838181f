"""Fast-forwards decode steps of the same rows: computes their times and pages as if they had been run one by one."""

from __future__ import annotations

import numpy as np

from jaxserve.scheduler import StepPlan


def stretch_times(
    now: float, end: float, seconds: np.ndarray, before: float, after: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns when the iterations of a fast-forward begin, and when their steps start and end on the device: float64
    each.

    A step starts when it is dispatched and the previous one has ended; then that one's ids are processed.

    Args:
        now: when the first iteration begins.
        end: of the step in flight.
        seconds: of the steps.
        before: of the host, see `HostCosts`.
        after: of the host, see `HostCosts`.
    """
    ends = np.cumsum(np.concatenate([[end], seconds]))
    starts, ends = ends[:-1], ends[1:]
    begins = np.concatenate([[now], starts[:-1] + after])
    if (begins + before <= starts).all():
        return begins, starts, ends
    # The host is slower than the device in some iterations: one by one.
    begins, starts, ends = (np.empty(len(seconds)) for _ in range(3))
    for turn, each in enumerate(seconds.tolist()):
        start = max(now + before, end)
        begins[turn], starts[turn] = now, start
        end = ends[turn] = start + each
        now = start + after
    return begins, starts, ends


def pages_over(plan: StepPlan, turns: int, before: int, after: int) -> np.ndarray:
    """Returns the pages in use at each step after `plan`: a row takes one when its position is a multiple of the page
    size.
    """
    size = plan.decodes.page_size
    needed = np.bincount(-(plan.decodes.starts + 1) % size, minlength=size)
    taken = np.cumsum(needed[np.arange(turns) % size])
    # Rows whose pages were all reserved take none.
    return before + taken if before + taken[-1] == after else np.full(turns, after)
