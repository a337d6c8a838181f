"""Decides which requests run, how many tokens each computes, and on which pages, in plain Python without a device.

`Scheduler.schedule` makes a `StepPlan`, the runner executes it, and `Scheduler.update` takes the sampled ids.
"""

from jaxserve.scheduler.plan import DecodeRows, FastForward, RowPlan, Samples, StepPlan, StepResult, Wants
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.sequence_pages import PageAllocationError
from jaxserve.scheduler.update import SequenceUpdate, StepUpdate

__all__ = [
    "DecodeRows",
    "FastForward",
    "PageAllocationError",
    "RowPlan",
    "Samples",
    "Scheduler",
    "Sequence",
    "SequenceUpdate",
    "StepPlan",
    "StepResult",
    "StepUpdate",
    "Wants",
]
