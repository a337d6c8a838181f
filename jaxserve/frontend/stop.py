"""Stop strings: text is released only when no stop string can begin in it, whatever tokens and chunks it came in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class _Match:
    """An occurrence of a stop string: text positions [start, end), completed by token number `num_tokens` (from 1)."""

    start: int
    end: int
    num_tokens: int


class _Matcher:
    """Finds one stop string in a stream of characters (Knuth, Morris and Pratt 1977): constant cost a character."""

    def __init__(self, text: str):
        self.text = text
        self.length = 0  # of the longest beginning of `text` that the stream ends with
        self._shorter = [0, 0]  # [n]: length of the longest proper beginning of text[:n] that also ends it
        for character in text[1:]:
            length = self._shorter[-1]
            while length and text[length] != character:
                length = self._shorter[length]
            self._shorter.append(length + 1 if text[length] == character else 0)

    def feed(self, character: str) -> bool:
        """Whether the stop string ends with this character."""
        length = self.length
        while length and (length == len(self.text) or self.text[length] != character):
            length = self._shorter[length]
        self.length = length + 1 if self.text[length] == character else 0
        return self.length == len(self.text)

    def open_length(self) -> int:
        """Characters at the end of the stream that may become a further occurrence."""
        return self._shorter[self.length] if self.length == len(self.text) else self.length


class StopStrings:
    """Cuts one request's text at the first stop string.

    A match counts when the token that completes it is number min_tokens or later. Of the matches that count, the one
    that starts earliest in the text wins; of those that start together, the one that is complete first. So a longer
    stop string beats a later one inside it although that one is complete first: a match is not decided while text
    before it may still become an earlier one. The text ends where the winning match starts; the output's tokens end
    with the token that completes it.
    """

    def __init__(self, stop: Sequence[str], min_tokens: int = 0):
        self._matchers = [_Matcher(text) for text in stop]
        self._min_tokens = min_tokens
        self._match: _Match | None = None
        self._held = ""
        self._end = 0  # characters taken so far, held ones included
        self._num_tokens = 0
        self._decided = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been found: `num_tokens` is final, and no more may be added."""
        return self._decided

    @property
    def num_tokens(self) -> int:
        """Tokens known to belong to the output, whatever follows: those up to a match that may win, else all."""
        return self._num_tokens if self._match is None else self._match.num_tokens

    def add(self, text: str) -> str:
        """Takes the text that the next token makes certain (often empty) and returns the text that is released."""
        self._num_tokens += 1
        return self._take(text)

    def finish(self, text: str = "") -> str:
        """Takes what the detokeniser still held, and returns the rest of the text. Nothing may be added afterwards."""
        released = self._take(text)
        if self._decided:
            return released
        if self._match is not None:
            self._decided = True
            return released + self._release(self._match.start)
        return released + self._release(self._end)

    def _take(self, text: str) -> str:
        if not self._matchers:
            return text  # nothing is ever held
        self._held += text
        for character in text:
            self._end += 1
            for matcher in self._matchers:
                if matcher.feed(character) and self._num_tokens >= self._min_tokens:
                    self._note(_Match(self._end - len(matcher.text), self._end, self._num_tokens))
        first_open = self._end - max(matcher.open_length() for matcher in self._matchers)
        if self._match is None:
            return self._release(first_open)
        if first_open >= self._match.start:
            self._decided = True
        return self._release(min(first_open, self._match.start))

    def _note(self, match: _Match) -> None:
        if self._match is None or match.start < self._match.start:
            self._match = match

    def _release(self, end: int) -> str:
        length = len(self._held) - (self._end - end)
        released, self._held = self._held[:length], self._held[length:]
        return released
