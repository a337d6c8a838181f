"""Runs one unfinished beam search on the engine: the requests of each step, and what the engine answers to them.

Each beam of a step is a request of its own for one token, whose prompt is that of the search and the beam's tokens. It
extends the prompt of its parent and has the same options, so that cached pages of the parent serve it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxserve.frontend.beams import Beam, BeamSearch, SearchRules, num_candidates, stop_tokens
from jaxserve.logprob_columns import LogprobColumns
from jaxserve.request import EngineRequest
from jaxserve.request_checks import ModelLimits
from jaxserve.sampling_params import SamplingParams


class OpenSearch:
    """Tracks the steps of a beam search.

    Args:
        params: of the request.
        request: to the engine, as if it were to be drawn: with its prompt, options and max_tokens.
        limits: of the engine.
    """

    def __init__(self, params: SamplingParams, request: EngineRequest, limits: ModelLimits):
        stops = stop_tokens(params, limits)
        self._search = BeamSearch(
            SearchRules(
                width=params.n,
                max_tokens=request.max_tokens,
                stop_token_ids=stops,
                prompt_tokens=len(request.prompt_token_ids),
                length_penalty=params.length_penalty,
                early_stopping=params.early_stopping,
                logprobs=request.logprobs,
            )
        )
        # The token that the engine draws is of no use. Only processed log-probabilities depend on the temperature.
        tempered = limits.logprobs_mode == "processed_logprobs"
        self._request = dataclasses.replace(
            request,
            max_tokens=1,
            needed_tokens=1,
            stop_token_ids=(),
            temperature=request.temperature if tempered else 0.0,
            logprobs=max(num_candidates(params.n, len(stops)), request.logprobs or 0),
        )
        self._in_flight: dict[str, int] = {}  # engine's name of a request -> index of its beam
        self._answers: dict[int, LogprobColumns] = {}

    @property
    def length(self) -> int:
        """Tokens of each beam."""
        return self._search.length

    @property
    def done(self) -> bool:
        """Whether no further step is needed."""
        return self._search.done

    def best(self) -> list[Beam]:
        """Returns the outputs, or before the end what there is of them, the best first."""
        return self._search.best()

    @property
    def in_flight(self) -> list[str]:
        """The engine's names of the requests that it has not answered."""
        return list(self._in_flight)

    def step(self, new_name: Callable[[str], str], arrival_time: float | None = None) -> list[EngineRequest]:
        """Returns the requests of the next step, which the engine is to be sent.

        Args:
            new_name: returns a name that the engine does not know, given the one that is wished for.
            arrival_time: of the requests; None leaves that of the search, so that policies take them for as old as it
                is.
        """
        assert not self._in_flight, "a step is under way"
        request, prefix = self._request, f"{self._request.request_id}/{self._search.length}"
        if self._search.length:
            request = dataclasses.replace(request, prompt_logprobs=None)  # the first step has those of the prompt
        if arrival_time is not None:
            request = dataclasses.replace(request, arrival_time=arrival_time)
        found = []
        for index, beam in enumerate(self._search.beams):
            name = new_name(f"{prefix}.{index}")
            self._in_flight[name] = index
            prompt = request.prompt_token_ids + beam.token_ids
            found.append(dataclasses.replace(request, request_id=name, prompt_token_ids=prompt))
        return found

    def answer(self, name: str, continuations: LogprobColumns) -> bool:
        """Takes the engine's answer to a request: one row, the likeliest tokens that may follow its prompt. Returns
        whether the step is complete; the search has then advanced.
        """
        assert self._request.logprobs is not None
        self._answers[self._in_flight.pop(name)] = continuations.narrowed(self._request.logprobs)
        if self._in_flight:
            return False
        answers, self._answers = self._answers, {}
        self._search.advance([answers[index] for index in range(len(answers))])
        return True

    def failed(self, name: str) -> None:
        """Forgets a request that the engine has ended without an answer; the search cannot go on."""
        del self._in_flight[name]
