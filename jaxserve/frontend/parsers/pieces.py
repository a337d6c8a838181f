"""Defines what the parsers of replies take and give."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol


@dataclasses.dataclass(frozen=True, slots=True)
class Content:
    """Carries text that the user sees."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Reasoning:
    """Carries text that the model wrote for itself before it answers."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallStart:
    """Begins a tool call, whose arguments follow."""

    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class CallArguments:
    """Carries JSON text of the arguments of the call that was begun last."""

    text: str


Piece = Content | Reasoning | CallStart | CallArguments

ToolSchemas = Mapping[str, Mapping[str, Any]]
"""The JSON schema of each declared tool's arguments, by the tool's name."""


class Machine(Protocol):
    """Parses one reply, in pieces of text as they arrive. What it gives does not depend on how the text is divided.

    Neither method raises an error, whatever the text: a malformed call is content, as it was written.
    """

    def feed(self, text: str) -> list[Piece]:
        """Takes the next text and returns what is certain now."""
        ...

    def finish(self) -> list[Piece]:
        """Returns the rest, when no more text follows."""
        ...


NewMachine = Callable[[ToolSchemas | None], Machine]
"""Makes a machine for one reply. Its argument: the declared tools; None where any name may be called."""


@dataclasses.dataclass(frozen=True, slots=True)
class Call:
    """Holds a whole call; arguments: a JSON object as text."""

    name: str
    arguments: str

    def pieces(self) -> list[Piece]:
        """Returns the call as pieces."""
        return [CallStart(self.name), CallArguments(self.arguments)]


def add_content(pieces: list[Piece], text: str) -> None:
    """Appends content, unless it is empty."""
    if text:
        pieces.append(Content(text))
