"""Parses the format of Llama 3: `{"name": ..., "parameters": {...}}`, bare or behind `<|python_tag|>`, divided by `;`.

An object that begins like a call is held back until it ends, and is content unless it names a declared tool.
"""

from __future__ import annotations

from jaxserve.frontend.parsers.json_calls import parse_call
from jaxserve.frontend.parsers.pieces import Machine, Piece, ToolSchemas, add_content
from jaxserve.frontend.parsers.scanning import JsonScanner, MarkerReader

PYTHON_TAG = "<|python_tag|>"
_KEYS = ("name", "type", "parameters", "arguments")
"""The members that a call begins with."""
_MAX_HEAD = 64


class _Llama3:
    """Implements `Machine`."""

    def __init__(self, tools: ToolSchemas | None):
        self._tools = tools
        self._outside = MarkerReader(PYTHON_TAG, "{")
        self._tag = ""  # the tag and what stands behind it, until a call follows or anything else does
        self._scanner: JsonScanner | None = None
        self._body: list[str] = []
        self._head = ""
        self._behind_call = False

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        while text:
            text = self._read_outside(pieces, text) if self._scanner is None else self._read_object(pieces, text)
        return pieces

    def finish(self) -> list[Piece]:
        pieces: list[Piece] = []
        if self._scanner is None:
            self._add_content(pieces, self._outside.rest())
        else:
            self._add_content(pieces, "".join(self._body) or self._head)
        add_content(pieces, self._tag)
        return pieces

    def _read_outside(self, pieces: list[Piece], text: str) -> str:
        before, marker, rest = self._outside.read(text)
        self._add_content(pieces, before)
        if marker == PYTHON_TAG:
            self._tag += PYTHON_TAG
        elif marker is not None:
            self._scanner, self._body, self._head = JsonScanner(), [], ""
            return marker + rest
        return rest

    def _read_object(self, pieces: list[Piece], text: str) -> str:
        assert self._scanner is not None
        if not self._body:
            room = _MAX_HEAD - len(self._head)
            self._head, text = self._head + text[:room], text[room:]
            may_be_call = _may_be_call(self._head)
            if may_be_call is None:
                return text
            text = self._head + text
            if not may_be_call:
                self._scanner = None
                self._add_content(pieces, text[0])
                return text[1:]
        end = self._scanner.end_in(text)
        self._body.append(text[:end])
        if end is None:
            return ""
        body, self._scanner = "".join(self._body), None
        call = parse_call(body, needs_arguments=True)
        if call is None or (self._tools is not None and call.name not in self._tools):
            self._add_content(pieces, body)
        else:
            pieces += call.pieces()
            self._tag, self._behind_call = "", True
        return text[end:]

    def _add_content(self, pieces: list[Piece], text: str) -> None:
        if not text:
            return
        if self._behind_call and text.strip():
            self._behind_call = False
            rest = text.lstrip()
            text = text[: len(text) - len(rest)] + rest.removeprefix(";")
        if self._tag and not text.strip():
            self._tag += text
            return
        if text.strip():
            text, self._tag = self._tag + text, ""
        add_content(pieces, text)


def new_machine(tools: ToolSchemas | None = None) -> Machine:
    """Makes a machine for one reply."""
    return _Llama3(tools)


def _may_be_call(head: str) -> bool | None:
    """Returns whether an object with this beginning may be a call; None where that is not certain yet."""
    rest = head[1:].lstrip()
    if not rest:
        return None if len(head) < _MAX_HEAD else False
    key, quote, _ = rest[1:].partition('"')
    if rest[0] != '"' or not any(known.startswith(key) for known in _KEYS):
        return False
    return key in _KEYS if quote else None
