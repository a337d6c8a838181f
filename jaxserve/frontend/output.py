"""One request's output on its way from token ids to released token ids and text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxserve.frontend.detokenizer import Detokenizer
from jaxserve.frontend.stop import StopStrings
from jaxserve.request import FinishReason


class OutputState:
    """Detokeniser, stop strings and held-back tokens of one request.

    detokenizer: None gives no text. stop_token_ids: ids whose text is left out when one of them ends the output.
    """

    def __init__(
        self, detokenizer: Detokenizer | None, stop: Sequence[str], min_tokens: int, stop_token_ids: Iterable[int]
    ):
        self._detokenizer = detokenizer
        self._stop = StopStrings(stop, min_tokens)
        self._stop_token_ids = frozenset(stop_token_ids)
        self._token_ids: list[int] = []  # not yet taken
        self._taken = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the output."""
        return self._stop.stopped

    @property
    def num_tokens(self) -> int:
        """Tokens that belong to the output, as far as is known."""
        return self._stop.num_tokens

    def add(self, token_ids: Sequence[int], reason: FinishReason | None) -> str:
        """Takes the engine's next tokens and returns the text released. reason: set with the last ones.

        Tokens behind a stop string are dropped.
        """
        if reason is None and len(token_ids) == 1:  # what nearly every call brings
            return self._add(token_ids[0])
        text = []
        for index, token_id in enumerate(token_ids):
            ends = reason is FinishReason.STOP and index == len(token_ids) - 1 and token_id in self._stop_token_ids
            text.append(self._add(token_id, textless=ends))
            if self._stop.stopped:
                return "".join(text)
        if reason is not None:
            text.append(self.finish())
        return "".join(text)

    def _add(self, token_id: int, textless: bool = False) -> str:
        self._token_ids.append(token_id)
        return self._stop.add("" if self._detokenizer is None or textless else self._detokenizer.add((token_id,)))

    def finish(self) -> str:
        """The text still held back, when no more tokens follow."""
        return self._stop.finish("" if self._detokenizer is None else self._detokenizer.finish())

    def take_token_ids(self) -> tuple[int, ...]:
        """The token ids that are now known to belong to the output and were not taken before."""
        count = self._stop.num_tokens - self._taken
        taken = tuple(self._token_ids[:count])
        del self._token_ids[:count]
        self._taken += count
        return taken
