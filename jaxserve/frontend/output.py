"""Converts one request's output from token ids to released token ids and text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from jaxserve.frontend.detokenizer import Detokenizer
from jaxserve.frontend.stop import StopStrings
from jaxserve.request import FinishReason


class OutputState:
    """Combines detokenizers, stop strings and held-back tokens of one request.

    Args:
        shown: produces the text that is shown; None produces no text.
        generated: produces the text in which stop strings are searched, with special tokens; needed with stop strings
            where `shown` leaves special tokens out, else None: they are searched in what is shown.
        stop_token_ids: ids whose text is left out when one of them ends the output.
        include_stop: the text includes the stop string, or the text of the stop token, that ends the output.
    """

    def __init__(
        self,
        shown: Detokenizer | None,
        generated: Detokenizer | None,
        stop: Sequence[str],
        min_tokens: int,
        stop_token_ids: Iterable[int],
        include_stop: bool = False,
    ):
        self._shown = shown
        # None while it would give the same as `shown`, which spares nearly every token a second detokenizer.
        self._generated = None if shown is None or generated is None or generated.goes_on_like(shown) else generated
        self._waiting = ""  # shown text that is certain before the generated text of the same tokens is
        self._has_stop = bool(stop)
        self._stop = StopStrings(stop, min_tokens, include_stop)
        self._stop_token_ids = frozenset(() if include_stop else stop_token_ids)
        self._token_ids: list[int] = []  # not yet taken
        self._taken = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the output."""
        return self._stop.stopped

    @property
    def stop_string(self) -> str | None:
        """The stop string that has ended the output; None while none has."""
        return self._stop.found

    @property
    def num_tokens(self) -> int:
        """Number of tokens known to belong to the output."""
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
        shown = self._shown
        if shown is None:
            return self._stop.add("")
        if textless:
            return self._add_textless(shown, token_id) if self._has_stop else self._stop.add("")
        text = shown.add_token(token_id)
        if not self._has_stop:
            return self._stop.add(text)
        if not text and shown.leaves_out(token_id):
            return self._add_textless(shown, token_id)
        if self._generated is None:
            return self._stop.add(text)
        return self._add_differing(shown, self._generated, token_id, text)

    def _add_textless(self, shown: Detokenizer, token_id: int) -> str:
        """Adds a token that has a text in the generated text alone."""
        generated = self._generated or shown.copy(skip_special_tokens=False)
        before = generated.peek()
        text = generated.add_token(token_id)
        length = len(before) if text.startswith(before) else 0
        self._compare(shown, generated)
        return self._stop.add_special(text[:length], text[length:], self._waiting + shown.peek())

    def _add_differing(self, shown: Detokenizer, generated: Detokenizer, token_id: int, text: str) -> str:
        """Adds a token that makes `text` of the shown text final, and may make a different part of the generated text
        final.
        """
        self._waiting += text
        text = generated.add_token(token_id)
        if not text and not generated.goes_on_like(shown):
            return self._stop.add("")
        waiting, self._waiting = self._waiting, ""
        self._compare(shown, generated)
        return self._stop.add(text, waiting)

    def _compare(self, shown: Detokenizer, generated: Detokenizer) -> None:
        self._generated = None if not self._waiting and generated.goes_on_like(shown) else generated

    def finish(self) -> str:
        """Returns the text still held back, when no more tokens follow. Without a token there is no text."""
        if self._shown is None or not self.num_tokens:
            return self._stop.finish()
        rest = self._shown.finish()
        if self._generated is None:
            return self._stop.finish(rest)
        return self._stop.finish(self._generated.finish(), self._waiting + rest)

    def take_token_ids(self) -> tuple[int, ...]:
        """Returns the token ids that are now known to belong to the output and were not returned before."""
        count = self._stop.num_tokens - self._taken
        taken = tuple(self._token_ids[:count])
        del self._token_ids[:count]
        self._taken += count
        return taken


class FaultyOutput(OutputState):
    """Passes the failpoint "detokenize" before tokens are turned into text. hit: passes it for this request."""

    def __init__(
        self,
        shown: Detokenizer | None,
        generated: Detokenizer | None,
        stop: Sequence[str],
        min_tokens: int,
        stop_token_ids: Iterable[int],
        include_stop: bool,
        hit: Callable[[], None],
    ):
        super().__init__(shown, generated, stop, min_tokens, stop_token_ids, include_stop)
        self._hit = hit

    def add(self, token_ids: Sequence[int], reason: FinishReason | None) -> str:
        self._hit()
        return super().add(token_ids, reason)
