"""Parses the formats of Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]` and `[TOOL_CALLS]NAME[ARGS]{}`."""

from __future__ import annotations

from jaxserve.frontend.parsers.json_calls import object_text, parse_calls
from jaxserve.frontend.parsers.pieces import Call, Machine, Piece, ToolSchemas, add_content
from jaxserve.frontend.parsers.scanning import JsonScanner, MarkerReader

TOOL_CALLS, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
MARKERS = (TOOL_CALLS, CALL_ID, ARGS)

_MAX_NAME = 256
"""Characters up to which what stands between the marker and a bracket is a name."""


class _Mistral:
    """Implements `Machine`."""

    def __init__(self) -> None:
        self._outside = MarkerReader(TOOL_CALLS)
        self._name = MarkerReader(TOOL_CALLS, "{")
        self._called = False  # behind the marker
        self._head = ""  # what has come behind it, up to the arguments
        self._scanner: JsonScanner | None = None
        self._body: list[str] = []

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        while text:
            if self._scanner is not None:
                text = self._read_json(pieces, text)
            elif self._called:
                text = self._read_head(pieces, text)
            else:
                before, marker, text = self._outside.read(text)
                add_content(pieces, before)
                self._called = marker is not None
                self._head = ""
        return pieces

    def finish(self) -> list[Piece]:
        pieces: list[Piece] = []
        if self._called:
            add_content(pieces, TOOL_CALLS + self._head + "".join(self._body) + self._name.rest())
        else:
            add_content(pieces, self._outside.rest())
        return pieces

    def _read_head(self, pieces: list[Piece], text: str) -> str:
        before, marker, rest = self._name.read(text)
        room = _MAX_NAME - len(self._head)
        if len(before) > room:
            before, rest = before[:room], before[room:] + (marker or "") + self._name.rest() + rest
            marker = TOOL_CALLS  # it is malformed, as where another call begins
        elif marker == TOOL_CALLS:
            rest = marker + rest
        self._head += before
        if marker == TOOL_CALLS:
            add_content(pieces, TOOL_CALLS + self._head)
            self._called = False
        elif marker is not None:
            self._scanner, self._body = JsonScanner(), []
            if self._head.strip() == "[":  # a list of calls
                rest, self._head = self._head + marker + rest, ""
            else:
                rest = marker + rest
        return rest

    def _read_json(self, pieces: list[Piece], text: str) -> str:
        assert self._scanner is not None
        end = self._scanner.end_in(text)
        self._body.append(text[:end])
        if end is None:
            return ""
        body, self._scanner, self._called, self._body = "".join(self._body), None, False, []
        calls = _calls(self._head, body)
        if calls is None:
            add_content(pieces, TOOL_CALLS + self._head + body)
        else:
            pieces += [piece for call in calls for piece in call.pieces()]
        return text[end:]


def new_machine(tools: ToolSchemas | None = None) -> Machine:
    """Makes a machine for one reply."""
    return _Mistral()


def _calls(head: str, body: str) -> list[Call] | None:
    """Returns the calls of a body in JSON behind a head, which is empty or has a name."""
    if not head.strip():
        return parse_calls(body)
    name = head.partition(ARGS)[0].partition(CALL_ID)[0].strip()
    arguments = object_text(body)
    if not name or "[" in name or arguments is None:
        return None
    return [Call(name, arguments)]
