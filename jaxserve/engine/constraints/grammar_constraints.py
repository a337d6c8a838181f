"""Masks the tokens of requests whose output must follow a grammar.

Each request has a matcher, which has consumed the tokens of its output that a mask was asked for. A step hands over the
tokens that are new and computes all masks in two calls of llguidance, which run in threads of their own and let go of
the interpreter lock. State is a function of the output's ids alone, so nothing that happens to a sequence (chunks,
preemption, a fault) changes it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as List
from concurrent.futures import Future
from typing import NamedTuple

import llguidance
import numpy as np

from jaxserve.engine.constraints.compiled_grammars import CompiledGrammars
from jaxserve.engine.constraints.limits import first_line
from jaxserve.request import EngineRequest
from jaxserve.structured_outputs import GRAMMAR_FAILED


class Row(NamedTuple):
    """Names a mask to fill: its place, whose it is, and all of its output so far."""

    place: int
    request: EngineRequest
    output_token_ids: List[int]


@dataclasses.dataclass
class _State:
    """Follows the output of one request.

    consumed: number of its output tokens that the matcher has taken. ends: ids that end this output and that the
    grammar allows where it may end. barred: those of them that are text to the grammar, and must not be taken for it.
    """

    grammar: str
    matcher: llguidance.LLMatcher
    consumed: int
    ends: np.ndarray
    barred: np.ndarray


class GrammarConstraints:
    """Fills the masks of all requests with a grammar. For the engine's thread.

    Args:
        grammars: compiles them.
        eos_token_ids: the model's own.
        mask_threads: threads that compute masks; None lets llguidance choose.
    """

    def __init__(self, grammars: CompiledGrammars, eos_token_ids: List[int], mask_threads: int | None = None):
        self._grammars = grammars
        self._eos = frozenset(eos_token_ids)
        self._executor = llguidance.LLExecutor(mask_threads)
        self._compiled: dict[str, Future[llguidance.LLMatcher]] = {}  # of every open request, whatever the cache drops
        self._states: dict[str, _State] = {}
        self._idle: llguidance.LLMatcher | None = None  # one in an error state

    @property
    def num_open(self) -> int:
        """Returns the number of requests of which anything is known."""
        return len(self._compiled)

    def compiled(self, request: EngineRequest) -> Future[llguidance.LLMatcher]:
        """Begins to compile the request's grammar unless it is compiled; `fill` may be called when that is done."""
        return self._compiled.setdefault(request.request_id, self._grammars.get(request.grammar))

    def forget(self, request_id: str) -> None:
        """Drops what is known of a request that has ended."""
        self._compiled.pop(request_id, None)
        self._states.pop(request_id, None)

    def fill(self, rows: List[Row], masks: np.ndarray) -> tuple[list[Row], list[tuple[Row, str]]]:
        """Writes the packed masks of `rows` into `masks`, uint32 [M, words], at their places.

        Returns the rows whose grammar is complete, so that no token can follow, and those whose mask cannot be made,
        each with a line that says why. Their masks stay as they are.
        """
        failed: dict[int, str] = {}
        states: list[_State | None] = []
        for index, row in enumerate(rows):
            try:
                states.append(self._state(row))
            except ValueError as error:
                states.append(None)
                failed[index] = str(error)
        self._consume(rows, states, failed)
        computed = [index for index, state in enumerate(states) if state is not None and index not in failed]
        if not computed:
            return [], [(rows[index], line) for index, line in failed.items()]
        filled, may_end = self._masks([states[index] for index in computed])
        width = min(filled.shape[1], masks.shape[1])
        anything = np.any(filled[:, :width], axis=1).tolist()
        complete: list[Row] = []
        for place, index in enumerate(computed):
            row, state = rows[index], states[index]
            assert state is not None
            if not anything[place]:
                if state.matcher.is_error():
                    self._grammars.drop(state.grammar)  # others share its lexer
                    line = first_line(state.matcher.get_error())
                    failed[index] = f"{GRAMMAR_FAILED}{line}"
                elif may_end[place]:
                    complete.append(row)
                else:
                    failed[index] = f"{GRAMMAR_FAILED}no token of the model's vocabulary continues it"
                continue
            mask = masks[row.place]
            mask[:width], mask[width:] = filled[place, :width], 0
            if may_end[place]:
                _set(mask, state.ends)
            elif len(state.barred):
                _clear(mask, state.barred)
        return complete, [(rows[index], line) for index, line in failed.items()]

    def _state(self, row: Row) -> _State:
        """Returns what is known of a request: anew where its matcher has taken more than its output has, or none."""
        request = row.request
        known = self._states.get(request.request_id)
        if known is None or known.consumed > len(row.output_token_ids):
            known = self._states[request.request_id] = self._new_state(request)
        return known

    def _new_state(self, request: EngineRequest) -> _State:
        matcher = self.compiled(request).result().deep_copy()
        special = self._grammars.vocabulary.special_ids
        # Other stop ids of a client are text like any other: the grammar decides where they may be.
        ends = [number for number in request.stop_token_ids if number in self._eos or number in special]
        barred = [number for number in ends if number not in special]
        return _State(request.grammar, matcher, 0, np.array(ends, np.int64), np.array(barred, np.int64))

    def _consume(self, rows: List[Row], states: List[_State | None], failed: dict[int, str]) -> None:
        """Hands the new tokens of each row to its matcher, one of each row at a time: mostly there is one."""
        while True:
            waiting = [
                (index, state)
                for index, state in enumerate(states)
                if state is not None and index not in failed and state.consumed < len(rows[index].output_token_ids)
            ]
            if not waiting:
                return
            taken = [(state.matcher, rows[index].output_token_ids[state.consumed]) for index, state in waiting]
            if len(taken) == 1:  # a single one would be taken with the interpreter lock held
                taken.append((self._idle_matcher(), 0))
            for (index, state), accepted in zip(waiting, self._executor.consume_token_par(taken), strict=False):
                state.consumed += 1
                if not accepted:
                    self._grammars.drop(state.grammar)
                    line = first_line(state.matcher.get_error())
                    failed[index] = f"{GRAMMAR_FAILED}{line}"

    def _masks(self, states: List[_State | None]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the masks of the vocabulary's tokens, uint32 [M, its words], and whether the outputs may end, bool
        [M]."""
        vocabulary = self._grammars.vocabulary
        filled = np.empty((len(states), vocabulary.words), np.uint32)
        matchers = [(state.matcher, place) for place, state in enumerate(states) if state is not None]
        self._executor.unsafe_compute_mask_ptr(matchers, filled.ctypes.data, 4 * vocabulary.words, len(filled))
        word, bit = divmod(vocabulary.end_id, 32)
        may_end = (filled[:, word] >> np.uint32(bit) & np.uint32(1)).astype(bool)
        filled[:, word] &= ~np.uint32(1 << bit)
        return filled, may_end

    def _idle_matcher(self) -> llguidance.LLMatcher:
        if self._idle is None:
            self._idle = llguidance.LLMatcher(self._grammars.vocabulary.tokenizer, "", log_level=0)
        return self._idle


def _set(mask: np.ndarray, token_ids: np.ndarray) -> None:
    np.bitwise_or.at(mask, token_ids // 32, np.uint32(1) << (token_ids % 32).astype(np.uint32))


def _clear(mask: np.ndarray, token_ids: np.ndarray) -> None:
    np.bitwise_and.at(mask, token_ids // 32, ~(np.uint32(1) << (token_ids % 32).astype(np.uint32)))
