"""Finds stop strings: text is released only when no stop string can begin in it, however tokens and chunks divide it.

Stop strings are searched in the generated text, which includes special tokens, and cut the shown text, which does not.
As long as both are equal, they are stored as one string.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class _Gap:
    """Records a range where the texts differ: positions [start, end) of the generated text, `shown` characters of the
    other.

    Those characters count as in front of all of the generated ones but the first. tail: text that is shown when the
    output ends within the gap, but not (yet) when it continues. pending: the same where it ends behind the gap, and a
    character of it for each of the gap where it ends within.
    """

    start: int
    end: int
    shown: int
    tail: str = ""
    pending: str = ""


@dataclasses.dataclass(frozen=True)
class _Match:
    """Records an occurrence of the stop string `text`: positions [start, end), completed by token `num_tokens` (from
    1).
    """

    text: str
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
        """Returns whether the stop string ends with this character."""
        length = self.length
        while length and (length == len(self.text) or self.text[length] != character):
            length = self._shorter[length]
        self.length = length + 1 if self.text[length] == character else 0
        return self.length == len(self.text)

    def open_length(self) -> int:
        """Number of characters at the end of the stream that may become a further occurrence."""
        return self._shorter[self.length] if self.length == len(self.text) else self.length


class StopStrings:
    """Cuts one request's shown text at the first stop string in its generated text.

    A match counts when the token that completes it is number min_tokens or later. Of the matches that count, the one
    that starts earliest in the text wins; of those that start together, the one that is complete first. So a longer
    stop string beats a later one inside it although that one is complete first: a match is not decided while text
    before it may still become an earlier one. The text ends where the winning match starts, or with include where it
    ends; the output's tokens end with the token that completes it.
    """

    def __init__(self, stop: Sequence[str], min_tokens: int = 0, include: bool = False):
        self._matchers = [_Matcher(text) for text in stop]
        self._include = include
        self._min_tokens = min_tokens
        self._match: _Match | None = None
        self._held = ""  # of the shown text
        self._end = 0  # characters of the generated text taken so far
        self._gaps: list[_Gap] = []  # those that reach behind what is released
        self._num_tokens = 0
        self._decided = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been found: `num_tokens` is final, and no more may be added."""
        return self._decided

    @property
    def found(self) -> str | None:
        """The stop string that has ended the output; None while none has."""
        return self._match.text if self._decided and self._match is not None else None

    @property
    def num_tokens(self) -> int:
        """Number of tokens known to belong to the output: those up to a match that may win, else all."""
        return self._num_tokens if self._match is None else self._match.num_tokens

    def add(self, text: str, shown: str | None = None) -> str:
        """Takes the text that the next token makes final (often empty) and returns the text that is released.

        Args:
            text: of the generated text.
            shown: the same of the shown text; None when it equals that of the generated text.
        """
        self._num_tokens += 1
        if not self._matchers:
            return text  # nothing is ever held
        if shown is None:
            self._take(text, text)
        else:
            self._take_both(text, shown)
        return self._decide()

    def add_special(self, before: str, text: str, tail: str) -> str:
        """Does what `add` does for a token of which `text` is generated and nothing is shown.

        before: what it makes certain of the generated text in front of it. tail: what would be shown of the tokens
        before it if the output ended with them, and is not yet certain.
        """
        self._num_tokens += 1
        if before:
            self._gaps.append(_Gap(self._end, self._end + len(before), 0, pending=tail))
            self._take(before, "")
        if text:
            self._gaps.append(_Gap(self._end, self._end + len(text), 0, tail))
            self._take(text, "")
        return self._decide()

    def finish(self, text: str = "", shown: str | None = None) -> str:
        """Takes the text that was not final before, and returns the rest of the text.

        Nothing may be added afterwards.
        """
        if not self._matchers:
            return text
        self._take_both(text, text if shown is None else shown)
        released = self._decide()
        if self._decided:
            return released
        if self._match is not None:
            return released + self._cut(self._match)
        return released + self._release(self._end)

    def _take_both(self, text: str, shown: str) -> None:
        """Takes two texts that may differ in the middle."""
        if text != shown:
            shorter = min(len(text), len(shown))
            same = 0  # at the end
            while same < shorter and text[-1 - same] == shown[-1 - same]:
                same += 1
            first = 0  # that differs
            while first < shorter - same and text[first] == shown[first]:
                first += 1
            self._gaps.append(_Gap(self._end + first, self._end + len(text) - same, len(shown) - same - first))
        self._take(text, shown)

    def _take(self, text: str, shown: str) -> None:
        self._held += shown
        for character in text:
            self._end += 1
            for matcher in self._matchers:
                if matcher.feed(character) and self._num_tokens >= self._min_tokens:
                    self._note(_Match(matcher.text, self._end - len(matcher.text), self._end, self._num_tokens))

    def _decide(self) -> str:
        """Returns the text that no stop string can begin in; all of it, when a match is decided."""
        first_open = self._end - max(matcher.open_length() for matcher in self._matchers)
        if self._match is None:
            return self._release(first_open)
        if first_open >= self._match.start:
            return self._cut(self._match)
        return self._release(first_open)

    def _cut(self, match: _Match) -> str:
        """Decides on a match and returns the rest of the text."""
        self._decided = True
        end = match.end if self._include else match.start
        tail = ""
        for gap in self._gaps:
            if self._include and gap.start < end <= gap.end:
                tail += gap.tail or (gap.pending if end == gap.end else gap.pending[: end - gap.start])
            elif not self._include and gap.start <= end < gap.end:
                tail += gap.tail
        return self._release(end) + tail

    def _note(self, match: _Match) -> None:
        if self._match is None or match.start < self._match.start:
            self._match = match

    def _release(self, end: int) -> str:
        """Returns the shown text up to position `end` of the generated text, as far as it is not released."""
        behind = self._end - end
        if self._gaps:
            for gap in self._gaps:
                behind += (gap.shown if end <= gap.start and end < gap.end else 0) - max(
                    gap.end - max(end, gap.start), 0
                )
            self._gaps = [gap for gap in self._gaps if gap.end > end]
        length = len(self._held) - behind
        released, self._held = self._held[:length], self._held[length:]
        return released
