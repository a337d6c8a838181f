"""Parses the format of Hermes and Qwen: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.frontend.parsers.json_calls import parse_calls
from jaxserve.frontend.parsers.pieces import Call, Machine, ToolSchemas
from jaxserve.frontend.parsers.scanning import JsonScanner
from jaxserve.frontend.parsers.tagged import TaggedCalls

TAGS = {"<tool_call>": "</tool_call>"}


class _JsonString:
    """Tells whether JSON text ends inside a string."""

    def __init__(self) -> None:
        self._scanner = JsonScanner()

    def feed(self, text: str) -> None:
        while (end := self._scanner.end_in(text)) is not None:
            text = text[end:]

    @property
    def is_open(self) -> bool:
        return self._scanner.in_string


def new_machine(tools: ToolSchemas | None = None) -> Machine:
    """Makes a machine for one reply."""
    return TaggedCalls(TAGS, _parse, lambda opened: _JsonString())


def _parse(opened: str, body: str, closing: str) -> Sequence[Call] | None:
    return parse_calls(body)
