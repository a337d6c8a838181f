"""Parses calls that stand between two tags; a base of several formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from jaxserve.frontend.parsers.pieces import Call, Piece, add_content
from jaxserve.frontend.parsers.scanning import MAX_PART, MarkerReader

ParseBody = Callable[[str, str, str], Sequence[Call] | None]
"""Parses what is between two tags. Arguments: the opening tag, the text, and the closing tag, which is "" where the
reply ends without one. None: it is malformed."""


class Value(Protocol):
    """Tells whether the text of a call ends inside a value, in which a closing tag is a part of the value."""

    def feed(self, text: str) -> None:
        """Takes the next text of the call."""
        ...

    @property
    def is_open(self) -> bool:
        """Whether a value is open at the end of the text."""
        ...


class TaggedCalls:
    """Implements `Machine` for calls between tags.

    Args:
        tags: the closing tag of each opening one.
        parse: parses what is between them.
        value: makes a `Value` for a call with this opening tag; None where the first closing tag ends a call, whatever
            stands before it.
    """

    def __init__(self, tags: Mapping[str, str], parse: ParseBody, value: Callable[[str], Value] | None = None):
        self._tags = tags
        self._parse = parse
        self._new_value = value
        # A closing tag right behind a call is left over from it.
        self._closing = set(tags.values())
        self._outside = MarkerReader(*tags, *self._closing)
        self._inside = MarkerReader(next(iter(self._closing)))
        self._opened: str | None = None
        self._body: list[str] = []
        self._value: Value | None = None
        self._behind_call = False

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        while text:
            text = self._read_outside(pieces, text) if self._opened is None else self._read_inside(pieces, text)
        return pieces

    def finish(self) -> list[Piece]:
        pieces: list[Piece] = []
        if self._opened is None:
            self._add_content(pieces, self._outside.rest())
            return pieces
        opened, body = self._opened, "".join([*self._body, self._inside.rest()])
        self._opened = None
        if calls := self._parse(opened, body, ""):  # complete but for its closing tag
            self._add_calls(pieces, calls)
        elif self._new_value is None:
            self._add_malformed(pieces, opened, body)
        else:
            # A value that is never closed has taken in all that followed it: other calls, perhaps.
            again, text = TaggedCalls(self._tags, self._parse), opened + body
            for start in range(0, len(text), MAX_PART):
                pieces += again.feed(text[start : start + MAX_PART])
            pieces += again.finish()
        return pieces

    def _read_outside(self, pieces: list[Piece], text: str) -> str:
        before, tag, rest = self._outside.read(text)
        self._add_content(pieces, before)
        if tag is not None and tag in self._tags:
            self._opened, self._body = tag, []
            self._inside = MarkerReader(self._tags[tag])
            self._value = None if self._new_value is None else self._new_value(tag)
        elif tag is not None and not self._behind_call:
            self._add_content(pieces, tag)
        return rest

    def _read_inside(self, pieces: list[Piece], text: str) -> str:
        assert self._opened is not None
        before, tag, rest = self._inside.read(text)
        self._take(before)
        if tag is None:
            return rest
        if self._value is not None and self._value.is_open:
            self._take(tag)
            return rest
        opened, body = self._opened, "".join(self._body)
        self._opened = None
        if calls := self._parse(opened, body, tag):
            self._add_calls(pieces, calls)
        else:
            self._add_malformed(pieces, opened, body, tag)
        return rest

    def _take(self, text: str) -> None:
        self._body.append(text)
        if self._value is not None:
            self._value.feed(text)

    def _add_malformed(self, pieces: list[Piece], opened: str, body: str, tag: str = "") -> None:
        """Adds a malformed call as text, and the one that begins in it, if it is not."""
        index = body.rfind(opened)
        calls = None if index < 0 else self._parse(opened, body[index + len(opened) :], tag)
        if calls:
            self._add_content(pieces, opened + body[:index])
            self._add_calls(pieces, calls)
        else:
            self._add_content(pieces, opened + body + tag)

    def _add_content(self, pieces: list[Piece], text: str) -> None:
        add_content(pieces, text)
        self._behind_call = self._behind_call and not text.strip()

    def _add_calls(self, pieces: list[Piece], calls: Sequence[Call]) -> None:
        pieces += [piece for call in calls for piece in call.pieces()]
        self._behind_call = True
