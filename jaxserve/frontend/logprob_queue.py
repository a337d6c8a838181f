"""Keeps the log-probabilities of one request's tokens until the tokens are released."""

from __future__ import annotations

from jaxserve.frontend.delta import PromptLogprobs
from jaxserve.logprob_columns import LogprobColumns
from jaxserve.request import EngineRequest


class LogprobQueue:
    """Queues the log-probabilities of output tokens in their order, whatever stop strings hold back."""

    def __init__(self, request: EngineRequest):
        self._prompt_token_ids = request.prompt_token_ids
        self._width = request.logprobs
        self._waiting: list[LogprobColumns] = []
        self._prompt: PromptLogprobs | None = None
        if request.prompt_logprobs is not None and len(request.prompt_token_ids) <= request.prompt_logprobs_start:
            self._prompt = PromptLogprobs(request.prompt_token_ids, LogprobColumns.unknown(0, request.prompt_logprobs))

    @property
    def width(self) -> int:
        """The likeliest ids of each position that are wanted."""
        return self._width or 0

    @property
    def has_prompt(self) -> bool:
        """Whether the prompt's log-probabilities are there and not taken."""
        return self._prompt is not None

    def add(self, logprobs: LogprobColumns | None, prompt_logprobs: LogprobColumns | None) -> None:
        """Takes those of the engine's next tokens, and of the prompt when they are there."""
        if logprobs is not None and self._width is not None:
            self._waiting.append(logprobs.narrowed(self._width))
        if prompt_logprobs is not None:
            self._prompt = PromptLogprobs(self._prompt_token_ids, prompt_logprobs)

    def take(self, count: int) -> LogprobColumns | None:
        """Returns those of the next `count` output tokens, which are released; None where none are wanted."""
        if self._width is None:
            return None
        if len(self._waiting) == 1 and len(self._waiting[0]) == count:
            return self._waiting.pop()
        joined = LogprobColumns.joined(self._waiting or [LogprobColumns.unknown(0, self._width)])
        assert len(joined) >= count, "tokens are released whose log-probabilities have not come"
        self._waiting = [joined.part(count, len(joined))] if count < len(joined) else []
        return joined.part(0, count)

    def take_prompt(self) -> PromptLogprobs | None:
        """Returns the prompt's, once."""
        taken, self._prompt = self._prompt, None
        return taken
