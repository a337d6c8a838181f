"""Configures chats, as a frozen dataclass that validates itself. Standard library only."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """Configures how conversations become prompts, and outputs replies. Names are vLLM's.

    chat_template: file of the chat template; None is the checkpoint's own.
    tool_call_parser, reasoning_parser: the format in which the model calls tools, and writes what it thinks; "auto"
    tells it by the chat template, None has no such format. docs/tools.md lists the names.
    enable_auto_tool_choice: `tool_choice` "auto", the default of requests with tools, is accepted.
    exclude_tools_when_tool_choice_none: with `tool_choice` "none" the chat template is given no tools.
    """

    chat_template: str | None = None
    tool_call_parser: str | None = "auto"
    reasoning_parser: str | None = "auto"
    enable_auto_tool_choice: bool = True
    exclude_tools_when_tool_choice_none: bool = True

    def __post_init__(self) -> None:
        for name in ("chat_template", "tool_call_parser", "reasoning_parser"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{name} is {value!r}; it must be text of at least one character, or None")
        for name in ("enable_auto_tool_choice", "exclude_tools_when_tool_choice_none"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be True or False")
