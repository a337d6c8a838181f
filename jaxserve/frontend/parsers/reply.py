"""Parses one reply by the machines of its reasoning and its tool calls, and cleans the seams between them."""

from __future__ import annotations

from collections.abc import Iterable

from jaxserve.frontend.parsers.pieces import CallArguments, CallStart, Content, Machine, Piece, Reasoning
from jaxserve.frontend.parsers.scanning import MAX_PART


class ReplyParser:
    """Implements `Machine`: reasoning, where a machine is given for it, and calls in what is not reasoning.

    White space that only divides reasoning, calls and content is left out. A reply without any of the former is passed
    on to the letter.

    Args:
        reasoning, calls: the machines; None leaves all text to the other one.
        one_call: calls behind the first are left out.
    """

    def __init__(self, reasoning: Machine | None, calls: Machine | None, *, one_call: bool = False):
        self._reasoning = reasoning
        self._calls = calls
        self._seams = _Seams(one_call)

    @property
    def num_calls(self) -> int:
        """Number of calls so far."""
        return self._seams.num_calls

    def feed(self, text: str) -> list[Piece]:
        found: list[Piece] = []
        for start in range(0, len(text), MAX_PART):
            part = text[start : start + MAX_PART]
            pieces: list[Piece] = [Content(part)] if self._reasoning is None else self._reasoning.feed(part)
            found += self._seams.clean(self._with_calls(pieces))
        return found

    def finish(self) -> list[Piece]:
        pieces = self._with_calls([] if self._reasoning is None else self._reasoning.finish())
        if self._calls is not None:
            pieces += self._calls.finish()
        return self._seams.clean(pieces, last=True)

    def _with_calls(self, pieces: list[Piece]) -> list[Piece]:
        if self._calls is None:
            return pieces
        found: list[Piece] = []
        for piece in pieces:
            if isinstance(piece, Content):
                found += self._calls.feed(piece.text)
            else:
                found.append(piece)
        return found


class _Seams:
    """Holds back white space until it is known whether it divides words or only pieces of different kinds."""

    def __init__(self, one_call: bool):
        self._one_call = one_call
        self._space: list[str] = []  # of content
        self._reasoning_space: list[str] = []
        self._has_content = False
        self._has_reasoning = False  # with any text
        self._has_thought = False
        self._ends_with_call = False
        self.num_calls = 0

    def clean(self, pieces: Iterable[Piece], last: bool = False) -> list[Piece]:
        """Returns pieces without needless white space; neighbors of one kind are one piece."""
        found: list[Piece] = []
        for piece in pieces:
            match piece:
                case Content(text):
                    self._add_content(found, text)
                case Reasoning(text):
                    self._add_reasoning(found, text)
                case CallStart():
                    self.num_calls += 1
                    self._ends_with_call = True
                    if self._is_wanted:
                        found.append(piece)
                case CallArguments(text):
                    if self._is_wanted:
                        _add(found, piece)
        space = "".join(self._space) if last else ""
        if space and not (self._ends_with_call or (self._has_thought and not self._has_content)):
            _add(found, Content(space))
        return found

    @property
    def _is_wanted(self) -> bool:
        return self.num_calls == 1 or not self._one_call

    def _add_content(self, found: list[Piece], text: str) -> None:
        body = text.rstrip()
        if body:
            divides = self._has_content or not (self._has_thought or self.num_calls)
            _add(found, Content("".join([*self._space, body]) if divides else body.lstrip()))
            self._space, self._has_content, self._ends_with_call = [], True, False
        self._space.append(text[len(body) :])

    def _add_reasoning(self, found: list[Piece], text: str) -> None:
        self._has_thought = True
        body = text.rstrip()
        if body:
            _add(found, Reasoning("".join([*self._reasoning_space, body]) if self._has_reasoning else body.lstrip()))
            self._reasoning_space, self._has_reasoning = [], True
        self._reasoning_space.append(text[len(body) :])


def _add(found: list[Piece], piece: Content | Reasoning | CallArguments) -> None:
    """Appends a piece, or joins it to the last one of its kind."""
    if found and type(found[-1]) is type(piece):
        found[-1] = type(piece)(found[-1].text + piece.text)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        found.append(piece)
