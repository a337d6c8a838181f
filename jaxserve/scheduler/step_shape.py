"""Describes what of a step determines its time."""

from __future__ import annotations

from typing import NamedTuple

from jaxserve.scheduler.plan import StepPlan


class StepShape(NamedTuple):
    """Holds the properties of a plan that determine its cost.

    Attributes:
        token_bucket: size of its forward program, padding included.
        row_bucket: size of its sample program, padding included.
        decode_rows: rows of one token.
        decode_context: positions that they attend to, in all.
        prefill_tokens: of prompts.
        prefill_pairs: (token, position) pairs of their attention.
        prefill_context: positions that the chunks read.
        longest: context of the longest row.
        swapped_pages: pages copied, usually to or from host memory.
    """

    token_bucket: int
    row_bucket: int
    decode_rows: int
    decode_context: float
    prefill_tokens: int
    prefill_pairs: float
    prefill_context: float
    longest: float
    swapped_pages: int = 0


def shape_of(plan: StepPlan) -> StepShape:
    """Returns the shape of a plan."""
    decodes = plan.decodes
    rows = len(decodes)
    tokens, pairs, context = 0, 0.0, 0.0
    longest = int(decodes.starts.max()) + 1 if rows else 0
    for chunk in plan.chunks:
        count, end = chunk.num_tokens, chunk.start + chunk.num_tokens
        tokens += count
        pairs += count * chunk.start + count * (count + 1) / 2
        context += end
        longest = max(longest, end)
    return StepShape(
        token_bucket=plan.token_bucket,
        row_bucket=plan.row_bucket,
        decode_rows=rows,
        decode_context=float(decodes.starts.sum()) + rows if rows else 0.0,
        prefill_tokens=tokens,
        prefill_pairs=pairs,
        prefill_context=context,
        longest=longest,
        swapped_pages=len(plan.copies),
    )
