"""Defines what sampling parameters say of beam search, and which of them do not go with it. Standard library only."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any

from jaxserve.config.sampling_fields import OneOf, SamplingField
from jaxserve.config.shown import shown

MOST_PENALTY = 10.0
"""Greatest length penalty, in either direction: lengths to this power are still numbers."""


class EarlyStopping(enum.Enum):
    """Enumerates transformers' values of `early_stopping`: true, false and "never"."""

    TRUE = "true"
    FALSE = "false"
    NEVER = "never"


@dataclasses.dataclass(frozen=True)
class FlagOrWord(OneOf):
    """Accepts what `OneOf` does, of an enumeration with the members TRUE and FALSE, and true and false themselves."""

    def checked(self, name: str, value: Any) -> enum.Enum:
        return super().checked(name, str(value) if isinstance(value, bool) else value)


_OF_SEARCH = ("length_penalty", "early_stopping")
"""Parameters that say something of a beam search alone."""

_NOT_OF_SEARCH = (
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "allowed_token_ids",
    "min_tokens",
    "stop",
    "bad_words",
    "structured_outputs",
)
"""Parameters that change which tokens can be drawn, or when an output ends: a search knows the model's own tokens and
their log-probabilities alone."""


def check_beam_fields(params: Any, rows: Mapping[str, SamplingField]) -> None:
    """Refuses parameters beside which a beam search would not do what they say, or that need one. Raises ValueError.

    Args:
        params: checked `SamplingParams`.
        rows: of their table.
    """
    names = _NOT_OF_SEARCH if params.use_beam_search else _OF_SEARCH
    for name in names:
        row, value = rows[name], getattr(params, name)
        if row.resolved(value) == row.resolved(row.default):
            continue
        if params.use_beam_search:
            raise ValueError(
                f"{name} is {shown(value)} and use_beam_search is true; a beam search goes by the model's own "
                "log-probabilities: leave one of them out"
            )
        value = value.value if isinstance(value, EarlyStopping) else shown(value)
        raise ValueError(f"{name} is {value}; it needs a beam search: set use_beam_search to true, or leave it out")
