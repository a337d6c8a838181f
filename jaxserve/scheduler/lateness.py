"""What a request is told that was dropped since it was late. Standard library only."""

from __future__ import annotations

import dataclasses

from jaxserve.request import FinishReason
from jaxserve.scheduler.update import SequenceUpdate
from jaxserve.scheduler_config import PolicyConfig


def naming_targets(update: SequenceUpdate, config: PolicyConfig, now: float) -> SequenceUpdate:
    """An update of `Scheduler.expire`, whose error names targets and remedy where the request had no deadline of its
    own; now: as `expire` was given it."""
    sequence = update.sequence
    if update.finish_reason is not FinishReason.ABORT or sequence.request.deadline is not None:
        return update
    late = 0.0 if sequence.start_by is None else max(0.0, now - sequence.start_by)
    error = (
        f"dropped after {now - sequence.request.arrival_time:.3f} s in the queue: served now it would be {late:.3f} s "
        f"late for ttft_target {config.ttft_target:g} s and tpot_target {config.tpot_target:g} s; raise the targets, "
        "set drop_late to False (it is then served after those that can be in time), or send fewer requests"
    )
    return dataclasses.replace(update, error=error)
