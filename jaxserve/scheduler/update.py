"""What a step or an abort changed, as the engine is told."""

from __future__ import annotations

import dataclasses

from jaxserve.request import FinishReason
from jaxserve.scheduler.sequence import Sequence


@dataclasses.dataclass(frozen=True)
class SequenceUpdate:
    """What a step or an abort changed for one sequence: its new token ids and, at its end, the reason."""

    sequence: Sequence
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    error: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class StepUpdate:
    """What a step changed.

    request_ids, token_ids: requests that decode on, and the one new token of each. others: every other sequence that
    the step changed: it has its first token since it was admitted, or has ended.
    """

    request_ids: tuple[str, ...]
    token_ids: list[int]
    others: list[SequenceUpdate]
