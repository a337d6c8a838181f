"""Which requests run, how many tokens each computes, and on which pages: plain Python, no device.

`Scheduler.schedule` makes a `StepPlan`, the runner carries it out, `Scheduler.update` takes the sampled ids.
"""

from jaxserve.scheduler.plan import DecodeRows, FastForward, RowPlan, Samples, StepPlan, StepResult, Wants
from jaxserve.scheduler.scheduler import Scheduler
from jaxserve.scheduler.sequence import Sequence
from jaxserve.scheduler.update import SequenceUpdate, StepUpdate

__all__ = [
    "DecodeRows",
    "FastForward",
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
