"""Parses calls that structured output makes the model write: JSON of a known shape (see `tool_schema`).

It is valid as far as it goes, so arguments are passed on as they arrive; only the end of the output can cut them off.
"""

from __future__ import annotations

import re

import msgspec

from jaxserve.frontend.parsers.pieces import CallArguments, CallStart, Content, Piece, add_content
from jaxserve.frontend.parsers.scanning import JsonScanner

_MAX_HEAD = 4096
_HEAD = re.compile(r'\s*[\[,]?\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"parameters"\s*:\s*(?=\{)')


class NamedCall:
    """Implements `Machine` for a reply that is the arguments of one call. name: the tool's."""

    def __init__(self, name: str):
        self._name = name
        self._scanner: JsonScanner | None = None
        self._ended = False

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        if self._scanner is None and not self._ended:
            text = text.lstrip()
            if not text:
                return pieces
            self._ended = text[0] != "{"
            if not self._ended:
                self._scanner = JsonScanner()
                pieces.append(CallStart(self._name))
        if self._scanner is not None:
            end = self._scanner.end_in(text)
            pieces.append(CallArguments(text[:end]))
            if end is None:
                return pieces
            self._scanner, self._ended, text = None, True, text[end:]
        add_content(pieces, text)
        return pieces

    def finish(self) -> list[Piece]:
        return []


class RequiredCalls:
    """Implements `Machine` for a reply that is a list of calls."""

    def __init__(self) -> None:
        self._head = ""
        self._scanner: JsonScanner | None = None
        self._is_text = False
        self._has_call = False

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        while text:
            if self._is_text:
                add_content(pieces, text)
                break
            text = self._read_head(pieces, text) if self._scanner is None else self._read_arguments(pieces, text)
        return pieces

    def finish(self) -> list[Piece]:
        closing = "".join(self._head.split())
        if not closing or (self._has_call and closing in ("}", "}]")):  # the brackets around calls are no text
            return []
        return [Content(self._head)]

    def _read_head(self, pieces: list[Piece], text: str) -> str:
        self._head += text
        head = self._head
        if self._has_call:
            head = head.lstrip().removeprefix("}")
        match = _HEAD.match(head[:_MAX_HEAD])
        name = None if match is None else _name(match[1])
        if match is None and len(head) < _MAX_HEAD:
            return ""
        if match is None or name is None:
            self._is_text = True
            text, self._head = self._head, ""
            return text
        pieces.append(CallStart(name))
        self._scanner, self._has_call, self._head = JsonScanner(), True, ""
        return head[match.end() :]

    def _read_arguments(self, pieces: list[Piece], text: str) -> str:
        assert self._scanner is not None
        end = self._scanner.end_in(text)
        pieces.append(CallArguments(text[:end]))
        if end is None:
            return ""
        self._scanner = None
        return text[end:]


def _name(written: str) -> str | None:
    try:
        return msgspec.json.decode(written, type=str) or None
    except (msgspec.DecodeError, ValueError):
        return None
