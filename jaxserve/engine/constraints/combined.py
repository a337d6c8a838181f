"""Combines everything that constrains the tokens of requests: grammars, and any others of the protocol."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence as List
from concurrent.futures import Future
from typing import Any

import numpy as np

from jaxserve.engine.constraints.grammar_constraints import GrammarConstraints, Row
from jaxserve.engine.constraints.masks import ALL, Constraints, masks_of
from jaxserve.request import EngineRequest
from jaxserve.scheduler import Sequence

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class StepMasks:
    """Holds the masks of a step, uint32 [M, words], one for each of its samples that want one.

    failed: requests whose mask cannot be made, each with a line that says why. complete: requests whose output is
    complete, so that no token can follow. Both must end; their masks allow every token.
    """

    masks: np.ndarray
    failed: list[tuple[str, str]]
    complete: list[str]


class CombinedConstraints:
    """Allows a token where all of a request's constraints do. For the engine's thread.

    Args:
        others: constraints that are asked for one mask at a time.
        grammars: of requests that have one; None refuses those.
    """

    def __init__(self, others: List[Constraints] = (), grammars: GrammarConstraints | None = None):
        self._others = others
        self._grammars = grammars
        self._of: dict[str, list[Constraints]] = {}  # the others that constrain a request

    def constrains(self, request: EngineRequest) -> bool:
        """Tells whether a request is constrained at all; called once, when it arrives. Raises ValueError."""
        if request.grammar and self._grammars is None:
            raise ValueError("structured_outputs need a tokenizer, and this engine has none; leave them out")
        others = [other for other in self._others if other.constrains(request)]
        if others:
            self._of[request.request_id] = others
        return bool(others or request.grammar)

    def compiled(self, request: EngineRequest) -> Future[Any] | None:
        """Returns what is done when the request's grammar is compiled; None where it has none."""
        if not request.grammar:
            return None
        assert self._grammars is not None
        return self._grammars.compiled(request)

    def forget(self, request_id: str) -> None:
        """Drops what is kept of a request that has ended."""
        self._of.pop(request_id, None)
        if self._grammars is not None:
            self._grammars.forget(request_id)

    def masks(self, sequences: List[Sequence | None], vocab_size: int) -> StepMasks:
        """Makes the masks of a step's samples. A sequence that has ended (None) gets one that allows every token, since
        its sample is discarded."""
        masks = np.full((len(sequences), -(-vocab_size // 32)), ALL, np.uint32)
        failed, complete = self._fill(sequences, masks)
        ended = {request_id for request_id, _ in failed} | set(complete)
        for other in self._others:
            asked = [
                (place, sequence)
                for place, sequence in enumerate(sequences)
                if sequence is not None and sequence.request_id not in ended and self._has(sequence, other)
            ]
            if asked:
                more, failures = masks_of(other, [sequence for _, sequence in asked], vocab_size)
                masks[[place for place, _ in asked]] &= more
                failed += failures
                ended |= {request_id for request_id, _ in failures}
        return StepMasks(masks, failed, complete)

    def _has(self, sequence: Sequence, other: Constraints) -> bool:
        return any(one is other for one in self._of.get(sequence.request_id, ()))

    def _fill(self, sequences: List[Sequence | None], masks: np.ndarray) -> tuple[list[tuple[str, str]], list[str]]:
        """Fills the masks of requests with a grammar; returns which failed and which are complete."""
        rows = [
            Row(place, sequence.request, sequence.output_token_ids)
            for place, sequence in enumerate(sequences)
            if sequence is not None and sequence.request.grammar
        ]
        if not rows:
            return [], []
        assert self._grammars is not None
        complete, failed = self._grammars.fill(rows, masks)
        for row, line in failed:
            _log.error("the mask of request %r cannot be made: %s", row.request.request_id, line)
        return [(row.request.request_id, line) for row, line in failed], [row.request.request_id for row in complete]
