"""Shows log-probabilities as vLLM's Python API does: for each position a dict from token id to `Logprob`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jaxserve.frontend.delta import PromptLogprobs
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.logprob_columns import LogprobColumns

PositionLogprobs = dict[int, "Logprob"]
"""The position's own token first, then the likeliest ones, by their ids."""


@dataclasses.dataclass(frozen=True)
class Logprob:
    """Holds what is known of one token id at one position.

    rank: 1 is the likeliest. decoded_token: its text on its own; None without a tokenizer.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None


def position_logprobs(
    columns: LogprobColumns, token_ids: Sequence[int], tokenizer: Tokenizer | None
) -> list[PositionLogprobs]:
    """Returns the dict of each token.

    Args:
        columns: of N tokens.
        token_ids: N of them.
        tokenizer: gives the texts.
    """

    def text(token_id: int) -> str | None:
        return None if tokenizer is None else tokenizer.token_text(token_id)

    found: list[PositionLogprobs] = []
    rows = zip(
        token_ids,
        columns.values.tolist(),
        columns.ranks.tolist(),
        columns.top_ids.tolist(),
        columns.top_values.tolist(),
        strict=True,
    )
    for own, value, rank, top_ids, top_values in rows:
        position = {own: Logprob(value, rank, text(own))}
        for place, (token_id, top_value) in enumerate(zip(top_ids, top_values, strict=True), start=1):
            position[token_id] = Logprob(top_value, place, text(token_id))
        found.append(position)
    return found


def prompt_positions(logprobs: PromptLogprobs, tokenizer: Tokenizer | None) -> list[PositionLogprobs | None]:
    """Returns the dict of each token of a prompt; None for those that have no log-probability, as the first."""
    start = logprobs.start
    return [None] * start + position_logprobs(logprobs.columns, logprobs.token_ids[start:], tokenizer)
