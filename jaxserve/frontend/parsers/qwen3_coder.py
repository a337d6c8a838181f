"""Parses the format of Qwen3-Coder, which has tags for functions and parameters.

    <tool_call><function=NAME><parameter=KEY>VALUE</parameter>...</function></tool_call>

Values are texts; which of them are numbers, lists and so on follows from the tool's schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from jaxserve.frontend.parsers.pieces import Call, Machine, ToolSchemas
from jaxserve.frontend.parsers.scanning import MarkerReader
from jaxserve.frontend.parsers.tagged import TaggedCalls

_FUNCTION, _END_FUNCTION = "<function=", "</function>"
_PARAMETER, _END_PARAMETER = "<parameter=", "</parameter>"

TAGS = {"<tool_call>": "</tool_call>", _FUNCTION: _END_FUNCTION}
"""Models leave out the outer tag now and then."""

_SPACE = re.compile(r"\s*")
_BEHIND_VALUE = re.compile(rf"\s*(?:{_PARAMETER}|{_END_FUNCTION})")
_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "null": type(None),
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "object": dict,
    "array": list,
}
_MAX_ALTERNATIVES = 64


class _Parameters:
    """Tells whether the text of a call ends inside a value, which may hold any of the tags: outside of one the last tag
    is that of what was closed last. opened: the call's opening tag.
    """

    def __init__(self, opened: str):
        self._last = _END_PARAMETER if opened == _FUNCTION else _END_FUNCTION
        self._first = MarkerReader(_PARAMETER)
        self._has_value = False
        self._tail = ""  # of the text, with one space for all that it ends with

    def feed(self, text: str) -> None:
        if not self._has_value:
            self._has_value = self._first.read(text)[1] is not None
        text = self._tail + text
        body = text.rstrip()
        self._tail = body[-len(_END_PARAMETER) :] + text[len(body) :][:1]

    @property
    def is_open(self) -> bool:
        return self._has_value and not self._tail.rstrip().endswith(self._last)


class _Reader:
    """Parses what is between the tags of calls to declared tools."""

    def __init__(self, tools: ToolSchemas | None):
        self._tools = tools or {}

    def parse(self, opened: str, body: str, closing: str) -> Sequence[Call] | None:
        if opened == _FUNCTION:
            body = opened + body + closing
        calls, position = [], _behind_space(body, 0)
        while position < len(body):
            read = self._function(body, position)
            if read is None:
                return None
            call, position = read
            calls.append(call)
            position = _behind_space(body, position)
        return calls or None

    def _function(self, body: str, start: int) -> tuple[Call, int] | None:
        """Parses the function at a position; returns its call and the position behind it."""
        head = _tag(body, start, _FUNCTION)
        if head is None:
            return None
        name, position = head
        schema = self._tools.get(name, {}).get("properties")
        properties = schema if isinstance(schema, Mapping) else {}
        members: dict[str, str] = {}
        while not body.startswith(_END_FUNCTION, position := _behind_space(body, position)):
            head = _tag(body, position, _PARAMETER)
            if head is None:
                return None
            key, begin = head
            end = body.find(_END_PARAMETER, begin)
            # The value may hold the tag, too: what is not followed by another tag is a part of it.
            while end >= 0 and not _BEHIND_VALUE.match(body, end + len(_END_PARAMETER)):
                end = body.find(_END_PARAMETER, end + 1)
            if end < 0:
                return None
            value = body[begin:end].removeprefix("\n").removesuffix("\n")
            members[json.dumps(key, ensure_ascii=False)] = _written(value, properties.get(key))
            position = end + len(_END_PARAMETER)
        arguments = ", ".join(f"{key}: {value}" for key, value in members.items())
        return Call(name, f"{{{arguments}}}"), position + len(_END_FUNCTION)


def new_machine(tools: ToolSchemas | None = None) -> Machine:
    """Makes a machine for one reply."""
    return TaggedCalls(TAGS, _Reader(tools).parse, _Parameters)


def _behind_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None  # it matches no space, too
    return match.end()


def _tag(text: str, position: int, begin: str) -> tuple[str, int] | None:
    """Returns the name in a tag at a position, and the position behind it."""
    end = text.find(">", position)
    if not text.startswith(begin, position) or end < 0:
        return None
    name = text[position + len(begin) : end].strip()
    return (name, end + 1) if name and "<" not in name else None


def _written(text: str, schema: Any) -> str:
    """Returns a value as JSON, of a type that its schema has, or else as a text."""
    kinds = set(_kinds(schema))
    plain = text.strip()
    # Python's words are written now and then.
    plain = {"True": "true", "False": "false", "None": "null"}.get(plain, plain)
    try:
        value = msgspec.json.decode(plain)
    except (msgspec.DecodeError, RecursionError, ValueError):
        return json.dumps(text, ensure_ascii=False)
    for kind in kinds - {"string"}:
        fits = isinstance(value, _KINDS.get(kind, ()))
        if fits and (kind == "boolean" or not isinstance(value, bool)):
            return plain
    return json.dumps(text, ensure_ascii=False)


def _kinds(schema: Any) -> Iterator[str]:
    """Yields the types that a schema allows. What it refers to elsewhere may be an object or a list."""
    found, count = [schema], 0
    while found and (count := count + 1) <= _MAX_ALTERNATIVES:
        one = found.pop()
        if not isinstance(one, Mapping):
            continue
        kind = one.get("type")
        if isinstance(kind, str):
            yield kind
        elif isinstance(kind, Sequence):
            yield from (each for each in kind if isinstance(each, str))
        elif "$ref" in one:
            yield from ("object", "array")
        for value in (*_listed(one.get("enum")), *((one["const"],) if "const" in one else ())):
            yield next((name for name, types in _KINDS.items() if isinstance(value, types)), "string")
        for alternatives in ("anyOf", "oneOf", "allOf"):
            found += _listed(one.get(alternatives))


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()
