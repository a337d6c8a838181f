"""Reads the sampled tokens of a step: whose they are, and what each means for its sequence."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from jaxserve.request import NO_TOKEN_LEFT, FinishReason
from jaxserve.scheduler.plan import NOTHING_ALLOWED, StepPlan
from jaxserve.scheduler.sequence import Sequence


def one_by_one(plan: StepPlan, token_ids: np.ndarray, special: np.ndarray) -> Iterator[tuple[str, int, int, int]]:
    """Yields request id, order, place among the samples and sampled id of the `special` decodes, bool [R], and of the
    chunks and forks that sample."""
    for row in special.nonzero()[0].tolist():
        yield plan.decodes.request_ids[row], int(plan.decodes.orders[row]), row, int(token_ids[row])
    if plan.chunks:
        by_slot, first = {row.slot: row for row in (*plan.chunks, *plan.forks)}, len(plan.decodes)
        for place, slot in enumerate(plan.samples.slots[first:].tolist(), start=first):
            yield by_slot[slot].request_id, by_slot[slot].order, place, int(token_ids[place])


def several(
    plan: StepPlan, token_ids: np.ndarray, counts: np.ndarray
) -> Iterator[tuple[str, int, int, int, tuple[int, ...]]]:
    """Yields request id, order, place of the first sample, planned samples and accepted ids of the decoding rows and of
    the chunks and forks that sample."""
    decodes, place = plan.decodes, 0
    assert decodes.counts is not None
    columns = zip(decodes.request_ids, decodes.orders.tolist(), decodes.counts.tolist(), counts.tolist(), strict=True)
    for request_id, order, planned, count in columns:
        if not 1 <= count <= planned:
            raise ValueError(f"count of {request_id!r} is {count}; its row has {planned} tokens: it must be 1 to that")
        yield request_id, order, place, planned, tuple(token_ids[place : place + count].tolist())
        place += planned
    by_slot = {row.slot: row for row in (*plan.chunks, *plan.forks)}
    for chunk_place, slot in enumerate(plan.samples.slots[place:].tolist(), start=place):
        yield by_slot[slot].request_id, by_slot[slot].order, chunk_place, 1, (int(token_ids[chunk_place]),)


def no_token(token_id: int) -> str:
    """Returns the error line for a request whose token could not be sampled."""
    return NO_TOKEN_LEFT if token_id == NOTHING_ALLOWED else "the model's logits are not finite"


def finish_reason(sequence: Sequence, token_id: int) -> FinishReason | None:
    """Returns why a sequence ends with this token, its last one; None while it goes on."""
    if token_id in sequence.request.stop_token_ids and len(sequence.output_token_ids) > sequence.request.min_tokens:
        return FinishReason.STOP
    if len(sequence.output_token_ids) >= sequence.request.max_tokens:
        return FinishReason.LENGTH
    return None
