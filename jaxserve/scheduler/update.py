"""Defines the changes that a step or an abort reports to the engine."""

from __future__ import annotations

import dataclasses

from jaxserve.logprob_columns import LogprobColumns
from jaxserve.request import FinishReason
from jaxserve.scheduler.gap_monitor import GapExceeded
from jaxserve.scheduler.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class SequenceUpdate:
    """Reports the change to one sequence: its new token ids and, at its end, the reason.

    logprobs: of the token ids, where the request wants them. prompt_logprobs: of its prompt, with its first token.
    """

    sequence: Sequence
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    error: str = ""
    logprobs: LogprobColumns | None = None
    prompt_logprobs: LogprobColumns | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class ScoredTokens:
    """Reports one new token each of requests that go on decoding and want log-probabilities, with these."""

    request_ids: tuple[str, ...]
    token_ids: list[int]
    logprobs: LogprobColumns


@dataclasses.dataclass(frozen=True, eq=False)
class StepUpdate:
    """Reports the changes that a step made.

    request_ids, token_ids: requests that go on decoding, and the one new token of each. scored: the same of those that
    want log-probabilities. others: every other sequence that the step changed: it got its first token since admission,
    or has ended.
    gaps: between tokens of one request, which exceeded max_decode_gap.
    """

    request_ids: tuple[str, ...]
    token_ids: list[int]
    others: list[SequenceUpdate]
    gaps: tuple[GapExceeded, ...] = ()
    scored: ScoredTokens | None = None
