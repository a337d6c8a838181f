"""Parses OpenAI's harmony format, which gpt-oss writes: messages of several channels, each with a header.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.NAME
    <|constrain|>json<|message|>{...}<|call|>

Analysis is reasoning; what is final, or commentary to nobody, is content. A reply continues `<|start|>assistant`, and
its last marker ends it without being part of it.
"""

from __future__ import annotations

import re

from jaxserve.frontend.parsers.json_calls import object_text
from jaxserve.frontend.parsers.pieces import Call, Content, Machine, Piece, Reasoning, ToolSchemas, add_content
from jaxserve.frontend.parsers.scanning import MAX_SPACE, MarkerReader, may_begin

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
END, RETURN, CALL = "<|end|>", "<|return|>", "<|call|>"
MARKERS = (START, CHANNEL, MESSAGE, CONSTRAIN, END, RETURN, CALL)
STOPS = (RETURN, CALL)

_MAX_HEADER = 1024
_CHANNEL = re.compile(rf"{re.escape(CHANNEL)}\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_FUNCTIONS = "functions."


class _Harmony:
    """Implements `Machine`."""

    def __init__(self, tools: ToolSchemas | None):
        self._tools = tools
        self._state = self._read_start
        self._start = ""
        self._header = MarkerReader(MESSAGE)
        self._head = ""
        self._body = MarkerReader(END, RETURN, CALL, START, CHANNEL)
        self._kind: type[Content | Reasoning] | None = Content  # of the body; None for a call's
        self._name = ""
        self._arguments: list[str] = []
        self._seen: set[type] = set()  # of which there was text
        self._fresh = False  # the body has had no text yet

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        while text:
            text = self._state(pieces, text)
        return pieces

    def finish(self) -> list[Piece]:
        pieces: list[Piece] = []
        if self._state == self._read_start:
            add_content(pieces, self._start)
        elif self._state == self._read_header:
            # A header that is cut off is no text of the model's, but the call that it begins is.
            head = self._head + self._header.rest()
            add_content(pieces, head if _RECIPIENT.search(head) else "")
        else:
            self._add_text(pieces, self._body.rest())
            self._end_body(pieces)
        return pieces

    def _read_start(self, pieces: list[Piece], text: str) -> str:
        self._start += text
        start = self._start.lstrip()
        space = len(self._start) - len(start)
        if space > MAX_SPACE or not may_begin(start, CHANNEL, START, MESSAGE, "to="):  # no harmony: all is content
            self._begin_body(Content)
        elif start.startswith((CHANNEL, START, MESSAGE, "to=")):
            self._state, self._head = self._read_header, ""
        else:
            return ""
        text, self._start = self._start, ""
        return text

    def _read_header(self, pieces: list[Piece], text: str) -> str:
        before, marker, rest = self._header.read(text)
        room = _MAX_HEADER - len(self._head)
        if len(before) > room:
            rest = before[room:] + (marker or "") + self._header.rest() + rest
            self._begin_body(Content)
            self._add_text(pieces, self._head + before[:room])
            return rest
        self._head += before
        if marker is None:
            return rest
        channel, recipient = _CHANNEL.search(self._head), _RECIPIENT.search(self._head)
        name = recipient[1] if recipient else ""
        # Without tools nothing can be called: what is for somebody else is not for the user.
        may_call = self._tools is None or len(self._tools) > 0
        if may_call and (name.startswith(_FUNCTIONS) or name in (self._tools or ())):
            self._name = name.removeprefix(_FUNCTIONS)
            self._begin_body(None)
        else:
            self._begin_body(Reasoning if name or (channel and channel[1] == "analysis") else Content)
        return rest

    def _read_body(self, pieces: list[Piece], text: str) -> str:
        before, marker, rest = self._body.read(text)
        self._add_text(pieces, before)
        if marker is None:
            return rest
        self._end_body(pieces)
        self._state = self._read_start
        return marker + rest if marker in (START, CHANNEL) else rest

    def _begin_body(self, kind: type[Content | Reasoning] | None) -> None:
        self._state, self._kind, self._arguments, self._fresh = self._read_body, kind, [], True

    def _add_text(self, pieces: list[Piece], text: str) -> None:
        if not text:
            return
        if self._kind is None:
            self._arguments.append(text)
            return
        if self._fresh and self._kind in self._seen:  # messages of one kind are lines of one text
            pieces.append(self._kind("\n"))
        self._fresh = False
        self._seen.add(self._kind)
        pieces.append(self._kind(text))

    def _end_body(self, pieces: list[Piece]) -> None:
        """Ends a call's body: what is no JSON object is content, as it was written."""
        if self._kind is not None:
            return
        body = "".join(self._arguments)
        arguments = object_text(body if body.strip() else "{}")
        if arguments is not None and self._name:
            pieces += Call(self._name, arguments).pieces()
        else:
            self._begin_body(Content)
            self._add_text(pieces, self._head + MESSAGE + body)


def new_machine(tools: ToolSchemas | None = None) -> Machine:
    """Makes a machine for one reply."""
    return _Harmony(tools)
