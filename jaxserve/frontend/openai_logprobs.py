"""Log-probabilities in OpenAI's bodies and responses, with vLLM's additions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.frontend.delta import PromptLogprobs
from jaxserve.frontend.logprob_outputs import position_logprobs
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.logprob_columns import LogprobColumns
from jaxserve.sampling_params import SAMPLING_FIELDS

LEAST = -9999.0
"""What a log-probability of minus infinity, which JSON does not have, is shown as; vLLM's."""


def with_echo(fields: Mapping[str, Any], alone: bool) -> dict[str, Any]:
    """Returns the fields of a completion that shows its prompt, with what this asks for of sampling: log-probabilities
    are also the prompt's.

    alone: the prompt is all that it shows; what is drawn is left out.
    """
    asked = dict(fields)
    if fields.get("logprobs", False) is not False:
        asked.setdefault("prompt_logprobs", fields["logprobs"])
    return asked | ({"max_tokens": 1} if alone else {})


def check_prompt_logprobs(fields: Mapping[str, Any], stream: bool) -> None:
    """Refuses the prompt's log-probabilities in a stream, whose events have no place for them. Raises ValueError."""
    if stream and "prompt_logprobs" in fields:
        wanted = SAMPLING_FIELDS["prompt_logprobs"].checked(fields["prompt_logprobs"])
        raise ValueError(
            f"prompt_logprobs is {wanted}; a stream does not return them: set stream to false, or leave them out"
        )


class LogprobShapes:
    """Makes the objects of one response.

    Args:
        tokenizer: spells tokens.
        chat: the response is a chat completion's.
        as_ids: tokens are spelled `token_id:N`, as they are without a tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer | None, *, chat: bool, as_ids: bool = False):
        self._tokenizer = None if as_ids else tokenizer
        self._all_texts = tokenizer
        self._chat = chat

    def of(
        self, columns: LogprobColumns, token_ids: Sequence[int], offset: int = 0, prompt: PromptLogprobs | None = None
    ) -> dict[str, Any]:
        """Returns the object of output tokens, or of a prompt and the tokens behind it.

        Args:
            columns: of the output tokens.
            token_ids: of them.
            offset: length of the spelled tokens before.
            prompt: for a completion that shows its prompt.
        """
        if self._chat:
            return {"content": [self._entry(*row) for row in _rows(columns, token_ids)]}
        rows = [*(() if prompt is None else _prompt_rows(prompt)), *_rows(columns, token_ids)]
        tokens = [self._spelled(token_id) for token_id, _, _ in rows]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        return {
            "text_offset": offsets,
            "token_logprobs": [value for _, value, _ in rows],
            "tokens": tokens,
            "top_logprobs": [self._by_text(token_id, value, top) for token_id, value, top in rows],
        }

    def length(self, token_ids: Sequence[int]) -> int:
        """Returns the length of the spelled tokens."""
        return sum(len(self._spelled(token_id)) for token_id in token_ids)

    def of_prompt(self, prompt: PromptLogprobs) -> list[dict[int, dict[str, Any]] | None]:
        """Returns vLLM's `prompt_logprobs`: for each token of the prompt an object by token id, null for the first."""
        positions = position_logprobs(prompt.columns, prompt.token_ids[prompt.start :], self._all_texts)
        shown_positions = [
            {
                token_id: {"logprob": _shown(one.logprob), "rank": one.rank, "decoded_token": one.decoded_token}
                for token_id, one in position.items()
            }
            for position in positions
        ]
        return [None] * prompt.start + shown_positions

    def _spelled(self, token_id: int) -> str:
        return f"token_id:{token_id}" if self._tokenizer is None else self._tokenizer.token_text(token_id)

    def _entry(
        self, token_id: int, value: float | None, top: Sequence[tuple[int, float]] | None = None
    ) -> dict[str, Any]:
        token_bytes = None if self._tokenizer is None else list(self._tokenizer.token_bytes(token_id))
        entry = {"token": self._spelled(token_id), "logprob": value, "bytes": token_bytes}
        return entry if top is None else entry | {"top_logprobs": [self._entry(*one) for one in top]}

    def _by_text(self, token_id: int, value: float | None, top: Sequence[tuple[int, float]]) -> dict[str, float] | None:
        """Returns the values by the tokens' texts: of ids that have the same text the likeliest counts."""
        if value is None:
            return None
        found = {self._spelled(token_id): value}
        for other, other_value in top:
            text = self._spelled(other)
            found[text] = max(found.get(text, other_value), other_value)
        return found


_Row = tuple[int, float | None, list[tuple[int, float]]]
"""A token's id, its value, and the likeliest ids with theirs."""


def _rows(columns: LogprobColumns, token_ids: Sequence[int]) -> list[_Row]:
    values = [_shown(value) for value in columns.values.tolist()]
    tops = [
        list(zip(ids, map(_shown, top_values), strict=True))
        for ids, top_values in zip(columns.top_ids.tolist(), columns.top_values.tolist(), strict=True)
    ]
    return list(zip(token_ids, values, tops, strict=True))


def _prompt_rows(prompt: PromptLogprobs) -> list[_Row]:
    unknown: list[_Row] = [(token_id, None, []) for token_id in prompt.token_ids[: prompt.start]]
    return unknown + _rows(prompt.columns, prompt.token_ids[prompt.start :])


def _shown(value: float) -> float:
    return LEAST if math.isinf(value) or value < LEAST else value
