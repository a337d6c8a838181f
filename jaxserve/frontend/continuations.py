"""Scores continuations of a prompt: the sum of their tokens' log-probabilities."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from jaxserve.frontend.offline import FinishedRequest
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.sampling_params import SamplingParams

SCORING = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
"""Parameters of a request whose prompt ends with a continuation; the token that it draws is of no use."""


@dataclasses.dataclass(frozen=True)
class ScoreOutput:
    """Holds the score of one continuation, which `float` gives too.

    score: the sum of token_logprobs; not a number where there is an error. token_ids: those of the continuation.
    token_logprobs: of each of them, given the prompt and those before it. ranks: 1 where it was the likeliest token.
    error: one line when the request failed in the engine, or its deadline passed.
    """

    score: float
    token_ids: tuple[int, ...]
    token_logprobs: tuple[float, ...]
    ranks: tuple[int, ...]
    error: str = ""

    def __float__(self) -> float:
        return self.score

    @classmethod
    def of(cls, finished: FinishedRequest, start: int) -> ScoreOutput:
        """Reads the score of a finished request whose continuation begins at token `start`."""
        token_ids = finished.prompt_token_ids[start:]
        if finished.prompt_logprobs is None:
            return cls(math.nan, token_ids, (), (), finished.error)
        columns = finished.prompt_logprobs.columns
        values = tuple(columns.values.tolist())
        return cls(math.fsum(values), token_ids, values, tuple(columns.ranks.tolist()))


def continued(
    prompt: str | Sequence[int], continuation: str | Sequence[int], tokenizer: Tokenizer | None
) -> tuple[Sequence[int], int]:
    """Returns the token ids of a prompt and its continuation, and how many of them are the prompt's.

    Two texts are encoded as one, and the prompt has as many tokens of it as it has alone, as lm-eval counts them: a
    token that reaches over the boundary belongs to the prompt, so the two should meet where a token ends.

    Raises ValueError where either has no token.
    """
    for name, value in (("prompt", prompt), ("continuation", continuation)):
        if not value:
            raise ValueError(f"{name} is empty; at least one token is needed")
        if isinstance(value, str) and tokenizer is None:
            raise ValueError(f"{name} is text, and this engine has no tokenizer; give prompt_token_ids")
    alone = _encoded(prompt, tokenizer)
    if isinstance(prompt, str) and isinstance(continuation, str):
        whole: Sequence[int] = _encoded(prompt + continuation, tokenizer)
    else:
        whole = [*alone, *_encoded(continuation, tokenizer, add_special_tokens=False)]
    if len(whole) <= len(alone):
        raise ValueError(
            f"continuation {continuation!r} adds no token to those of the prompt: let the two meet where a token ends"
        )
    return whole, len(alone)


def _encoded(
    content: str | Sequence[int], tokenizer: Tokenizer | None, add_special_tokens: bool = True
) -> Sequence[int]:
    if not isinstance(content, str):
        return content
    assert tokenizer is not None
    return tokenizer.encode(content, add_special_tokens)
