"""Hands the pooled hidden states of a step to the sequences whose prompts are embedded."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from jaxserve.scheduler.plan import StepPlan, StepResult
from jaxserve.scheduler.sequence import Sequence

NOT_POOLED = "the model's hidden states are not finite, or too large to be pooled"
"""Error line of a request whose prompt cannot be embedded."""


def take_pooled(
    plan: StepPlan, result: StepResult, owner: Callable[[str, int], Sequence | None]
) -> list[tuple[Sequence, bool]]:
    """Adds the pooled hidden states of a step to their sequences; returns those whose prompt is computed, each with
    whether it can be embedded.

    owner: returns the sequence of a request id and order, if it still needs them.
    """
    assert result.pooled is not None, "a step pools hidden states, and its result has none"
    computed = []
    for row, values in zip(plan.pooled_rows, result.pooled, strict=True):
        sequence = owner(row.request_id, row.order)
        if sequence is None:
            continue
        assert row.pooled is not None
        assert sequence.pooled is not None
        sequence.pooled.add(row, values)
        if row.pooled.last:
            finite = np.isfinite(sequence.pooled.vector(sequence.num_prompt_tokens)).all()
            computed.append((sequence, bool(finite)))
    return computed
