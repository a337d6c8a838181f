"""Searches for the likeliest outputs of a prompt, a token of every beam at a time. No input or output, no clock.

Two rules are known. vLLM's, where `early_stopping` is none: every likely end of a beam is an output, the search goes on
to max_tokens, and lengths count the prompt and not the token that ends. transformers', where it is true, false or
"never": an output must be among the likeliest continuations to be kept, as many as the width are kept, the search ends
when these are good enough, and lengths are those of outputs, the token that ends included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxserve.config.beam_fields import EarlyStopping
from jaxserve.logprob_columns import LogprobColumns
from jaxserve.request_checks import ModelLimits
from jaxserve.sampling_params import SamplingParams


def num_candidates(width: int, num_stops: int) -> int:
    """Returns how many of a beam's likeliest tokens a search of this width looks at: twice its width, as vLLM, and at
    least so many that `width` of them end no output, whatever the `num_stops` tokens that do."""
    return max(2 * width, width + num_stops)


def check_search(params: SamplingParams, limits: ModelLimits, name_of_width: str = "n") -> None:
    """Checks, in constant time, that the server can serve a beam search of the parameters. Raises ValueError.

    name_of_width: the field that the client gave for `n`.
    """
    if not params.use_beam_search:
        return
    wanted = num_candidates(params.n, len(stop_tokens(params, limits)))
    if wanted > limits.max_logprobs:
        raise ValueError(
            f"{name_of_width} is {params.n}; a beam search of this width needs the {wanted} likeliest ids of each "
            f"position, and this server returns at most max_logprobs {limits.max_logprobs}: lower it, or raise "
            "LogprobsConfig.max_logprobs"
        )
    if not limits.logprobs_mode.endswith("logprobs"):
        raise ValueError(
            f"use_beam_search is true; this server has logprobs_mode {limits.logprobs_mode}, and logits cannot be "
            "summed as log-probabilities: leave it out, or set LogprobsConfig.logprobs_mode to raw_logprobs"
        )


def check_search_length(length: int, params: SamplingParams, max_tokens: int, limits: ModelLimits) -> None:
    """Checks that the longest prompt of a beam search's steps can be computed. Raises ValueError.

    Args:
        length: tokens of the prompt.
        params: of the request.
        max_tokens: output tokens, resolved.
        limits: of the engine.
    """
    longest = length + max_tokens - 1
    if params.use_beam_search and longest > limits.max_prompt_len:
        raise ValueError(
            f"max_tokens is {max_tokens}; the last step of a beam search computes {longest} tokens anew, and without "
            f"chunked prefill at most max_num_batched_tokens {limits.max_prompt_len} are allowed: lower it or enable "
            "chunked prefill"
        )


def stop_tokens(params: SamplingParams, limits: ModelLimits) -> tuple[int, ...]:
    """Returns the token ids that end an output: the model's own unless they are ignored, and the request's."""
    own = () if params.ignore_eos else limits.eos_token_ids
    return tuple(dict.fromkeys(own + params.stop_token_ids))


@dataclasses.dataclass(frozen=True)
class SearchRules:
    """Holds what a search goes by.

    width: beams of a step, and outputs. max_tokens: of an output. stop_token_ids: tokens that end an output.
    prompt_tokens: length of the prompt, in tokens. length_penalty, early_stopping: as in `SamplingParams`.
    logprobs: outputs have the log-probabilities of so many of the likeliest tokens at each position, and of their own;
    None: of none.
    """

    width: int
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    prompt_tokens: int
    length_penalty: float = 1.0
    early_stopping: EarlyStopping | None = None
    logprobs: int | None = None

    @property
    def candidates(self) -> int:
        """Returns the likeliest tokens of each beam that a step looks at."""
        return num_candidates(self.width, len(self.stop_token_ids))

    def score(self, cum_logprob: float, length: int, stopped: bool) -> float:
        """Returns what outputs are ordered by, the best highest.

        Args:
            cum_logprob: the sum of the log-probabilities.
            length: output tokens, from 1.
            stopped: whether the last one ends the output.
        """
        if self.early_stopping is None:
            length += self.prompt_tokens - stopped
        return cum_logprob / length**self.length_penalty


@dataclasses.dataclass(frozen=True, eq=False)
class Beam:
    """Holds an output, or what may become one.

    token_ids: without the prompt. cum_logprob: the sum of their log-probabilities. stopped: the last token ends it.
    positions: int32 [2 + 2 K] of each token, as `LogprobColumns` has them; none where they are not kept.
    """

    token_ids: tuple[int, ...] = ()
    cum_logprob: float = 0.0
    stopped: bool = False
    positions: tuple[np.ndarray, ...] = ()

    def logprobs(self, width: int) -> LogprobColumns:
        """Returns the log-probabilities that are kept. width: the likeliest ids at each position."""
        return LogprobColumns(np.stack(self.positions)) if self.positions else LogprobColumns.unknown(0, width)


@dataclasses.dataclass(frozen=True, eq=False, slots=True)
class _Candidate:
    """Holds a token that may follow a beam: number `place` among the likeliest of `columns`."""

    parent: Beam
    columns: LogprobColumns
    place: int
    token_id: int
    cum_logprob: float
    stopped: bool

    def beam(self, logprobs: int | None) -> Beam:
        """Returns the beam with the token. logprobs: as in `SearchRules`."""
        position = () if logprobs is None else (_position(self.columns, self.place, logprobs),)
        token_ids = (*self.parent.token_ids, self.token_id)
        return Beam(token_ids, self.cum_logprob, self.stopped, self.parent.positions + position)


class BeamSearch:
    """Searches by some rules. Each step wants the likeliest continuations of every beam in `beams`."""

    def __init__(self, rules: SearchRules):
        self._rules = rules
        self._length = 0
        self._beams: list[Beam] = [Beam()]
        self._kept: list[tuple[float, Beam]] = []  # outputs with their scores, the best first
        self._done = False

    @property
    def beams(self) -> Sequence[Beam]:
        """The beams to be continued."""
        return self._beams

    @property
    def length(self) -> int:
        """Tokens of every beam."""
        return self._length

    @property
    def done(self) -> bool:
        """Whether `best` will not change any more."""
        return self._done

    def advance(self, continuations: Sequence[LogprobColumns]) -> None:
        """Takes one step.

        Args:
            continuations: of each beam one row: the likeliest tokens that may follow it, at least
                `SearchRules.candidates` of them.
        """
        assert not self._done, "the search has ended"
        rules = self._rules
        self._length += 1
        found = [one for pair in zip(self._beams, continuations, strict=True) for one in self._candidates(*pair)]
        found.sort(key=lambda one: one.cum_logprob, reverse=True)  # stable: of equal ones the better beam's is first
        going_on = [one for one in found if not one.stopped][: rules.width]
        at_end = self._length == rules.max_tokens
        if rules.early_stopping is None:
            self._keep([one for one in found if one.stopped] + (going_on if at_end else []))
        else:
            self._keep([one for one in found[: rules.width] if one.stopped or at_end])
        self._beams = [] if at_end else [one.beam(rules.logprobs) for one in going_on]
        self._done = not self._beams or (len(self._kept) == rules.width and not self._can_improve())

    def best(self) -> list[Beam]:
        """Returns the outputs, the best first, at most as many as the width; before the search is done, beams are among
        them.
        """
        beams = (
            [] if self._done or not self._length else [(self._score(one, stopped=False), one) for one in self._beams]
        )
        scored = sorted([*self._kept, *beams], key=lambda pair: pair[0], reverse=True)
        return [one for _, one in scored[: self._rules.width]]

    def _candidates(self, beam: Beam, columns: LogprobColumns) -> list[_Candidate]:
        """Returns the beam's likeliest next tokens, the likeliest first."""
        count, stops = self._rules.candidates, self._rules.stop_token_ids
        ids, values = columns.top_ids[0, :count].tolist(), columns.top_values[0, :count].tolist()
        assert len(ids) == count, f"{len(ids)} likeliest tokens are known, and {count} are needed"
        return [
            _Candidate(beam, columns, place, token_id, beam.cum_logprob + value, token_id in stops)
            for place, (token_id, value) in enumerate(zip(ids, values, strict=True))
        ]

    def _score(self, one: Beam | _Candidate, stopped: bool) -> float:
        return self._rules.score(one.cum_logprob, self._length, stopped)

    def _keep(self, ended: Sequence[_Candidate]) -> None:
        """Keeps the best outputs, as many as the width; of equal ones the earlier."""
        scored = sorted(
            (*self._kept, *((self._score(one, one.stopped), one) for one in ended)),
            key=lambda pair: pair[0],
            reverse=True,
        )
        self._kept = [
            (score, one if isinstance(one, Beam) else one.beam(self._rules.logprobs))
            for score, one in scored[: self._rules.width]
        ]

    def _can_improve(self) -> bool:
        """Tells whether a continuation of the likeliest beam may yet be better than the worst output.

        Log-probabilities are not positive, so that the sum of a beam bounds that of its continuations. Under vLLM's
        rule the answer is exact: outputs are those of a search that goes on to max_tokens. transformers' false takes
        the present length instead of the one that suits a continuation best.
        """
        rules, length = self._rules, self._length
        if rules.early_stopping is EarlyStopping.TRUE:
            return False
        if rules.early_stopping is not EarlyStopping.FALSE and rules.length_penalty > 0:
            length = rules.max_tokens
        return rules.score(self._beams[0].cum_logprob, length, stopped=False) > self._kept[-1][0]


def _position(columns: LogprobColumns, place: int, width: int) -> np.ndarray:
    """Returns a position's row, with `width` of the likeliest ids, as if number `place` of them had been drawn."""
    value = columns.top_values[0, place]
    own = LogprobColumns(columns.packed[:1].copy())
    own.values[0] = value
    own.ranks[0] = np.count_nonzero(columns.top_values[0] >= value)
    return own.narrowed(width).packed[0]
