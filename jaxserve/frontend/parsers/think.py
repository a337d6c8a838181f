"""Parses reasoning between two tags at the beginning of a reply: `<think>...</think>`."""

from __future__ import annotations

from jaxserve.frontend.parsers.pieces import Content, Piece, Reasoning, add_content
from jaxserve.frontend.parsers.scanning import MAX_SPACE, MarkerReader, may_begin


class Think:
    """Implements `Machine`.

    Args:
        begin, end: the tags.
        is_open: the reply begins inside of the reasoning, because its prompt ends with the opening tag, or because the
            model is known to begin so. An opening tag is then taken, and not asked for.
    """

    def __init__(self, begin: str = "<think>", end: str = "</think>", *, is_open: bool = False):
        self._begin = begin
        self._reasoning = MarkerReader(end)
        self._is_open = is_open
        self._start: str | None = ""  # what has come so far, until the state is known
        self._is_reasoning = False

    def feed(self, text: str) -> list[Piece]:
        if self._start is None:
            return self._go_on(text)
        self._start += text
        start = self._start.lstrip()
        if may_begin(start, self._begin) and len(self._start) - len(start) <= MAX_SPACE:
            if not start.startswith(self._begin):
                return []
            self._is_reasoning, text = True, start.removeprefix(self._begin)
        else:
            self._is_reasoning, text = self._is_open, self._start
        self._start = None
        return self._go_on(text)

    def finish(self) -> list[Piece]:
        text = self._reasoning.rest() if self._start is None else self._start
        is_reasoning = self._is_reasoning if self._start is None else self._is_open
        if not text:
            return []
        return [Reasoning(text) if is_reasoning else Content(text)]

    def _go_on(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        if self._is_reasoning:
            before, end, text = self._reasoning.read(text)
            pieces.append(Reasoning(before))  # also an empty one: there was reasoning
            self._is_reasoning = end is None
        if not self._is_reasoning:
            add_content(pieces, text)
        return pieces
