"""Parses calls that are written as a Python list: `[get_weather(city="Paris"), get_time()]`.

Such a list is the whole reply, and is held back to its end.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

from jaxserve.frontend.parsers.pieces import Call, Machine, Piece, ToolSchemas, add_content

PYTHON_START, PYTHON_END = "<|python_start|>", "<|python_end|>"
MARKERS = (PYTHON_START, PYTHON_END)

_MAX_LENGTH = 64 * 1024
"""Characters of a list at most: parsing takes a hundred times as many bytes."""
_MAX_HEAD = 256
_BEGINNING = re.compile(r"\[\s*(?:[A-Za-z_][\w.-]*\(?)?")


class _Pythonic:
    """Implements `Machine`."""

    def __init__(self, tools: ToolSchemas | None):
        self._tools = tools
        self._held: list[str] | None = []
        self._head = ""

    def feed(self, text: str) -> list[Piece]:
        pieces: list[Piece] = []
        if self._held is None:
            add_content(pieces, text)
            return pieces
        self._held.append(text)
        self._head += text[: _MAX_HEAD - len(self._head)]
        if not _may_be_calls(self._head):
            add_content(pieces, "".join(self._held))
            self._held = None
        return pieces

    def finish(self) -> list[Piece]:
        pieces: list[Piece] = []
        text = "".join(self._held or ())
        calls = _parse(text)
        if calls and (self._tools is None or all(call.name in self._tools for call in calls)):
            pieces += [piece for call in calls for piece in call.pieces()]
        else:
            add_content(pieces, text)
        return pieces


def new_machine(tools: ToolSchemas | None = None) -> Machine:
    """Makes a machine for one reply."""
    return _Pythonic(tools)


def _may_be_calls(head: str) -> bool:
    """Returns whether a reply with this beginning may be a list of calls."""
    text = head.lstrip()
    if PYTHON_START.startswith(text):
        return len(head) < _MAX_HEAD
    text = text.removeprefix(PYTHON_START).lstrip()
    if not text:
        return len(head) < _MAX_HEAD
    match = _BEGINNING.match(text)
    return match is not None and (match[0].endswith("(") or (match.end() == len(text) and len(head) < _MAX_HEAD))


def _parse(text: str) -> list[Call] | None:
    text = text.strip().removeprefix(PYTHON_START).removesuffix(PYTHON_END).strip()
    if len(text) > _MAX_LENGTH:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's, of what looks wrong in a program
            tree = ast.parse(text, mode="eval").body
        if not isinstance(tree, ast.List):
            return None
        return [_call(item) for item in tree.elts]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _call(tree: ast.expr) -> Call:
    """Returns one call. Raises ValueError for anything but a name with literals as keywords."""
    if not isinstance(tree, ast.Call) or tree.args or any(keyword.arg is None for keyword in tree.keywords):
        raise ValueError("no call with keywords")
    if not isinstance(tree.func, ast.Name | ast.Attribute):
        raise ValueError("no call of a name")
    arguments: dict[str, Any] = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in tree.keywords}
    text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    text.encode()  # a lone surrogate, which an escape may spell, is no text
    return Call(ast.unparse(tree.func), text)
