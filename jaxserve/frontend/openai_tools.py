"""Parses the tools of a chat and what is to be done with them, in OpenAI's shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxserve.config.sampling_fields import check_count
from jaxserve.config.shown import shown
from jaxserve.frontend.openai_checks import check_depth, check_text, checked_flag, checked_object, checked_text, hint
from jaxserve.frontend.parsers.pieces import ToolSchemas

MAX_TOOLS = 128
MAX_NAME_LENGTH = 256

Choice = Literal["none", "auto", "required", "named"]

_FUNCTION_FIELDS = frozenset({"name", "description", "parameters", "strict"})


@dataclasses.dataclass(frozen=True)
class Tool:
    """Holds a declared tool. parameters: the JSON schema of its arguments. definition: what templates are given."""

    name: str
    parameters: Mapping[str, Any]
    definition: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Tools:
    """Holds the tools of a chat.

    Attributes:
        declared: all of them, in order.
        choice: what the model is to do: "named" is to call `name`.
        parallel: it may make several calls.
    """

    declared: Sequence[Tool] = ()
    choice: Choice = "none"
    name: str | None = None
    parallel: bool = True

    @property
    def schemas(self) -> ToolSchemas:
        """The schema of each tool's arguments, by its name."""
        return {tool.name: tool.parameters for tool in self.declared}

    @property
    def forced(self) -> Sequence[Tool]:
        """The tools of which one must be called; none where that is the model's choice."""
        if self.choice == "named":
            return [tool for tool in self.declared if tool.name == self.name]
        return self.declared if self.choice == "required" else ()


def parse_tools(fields: Mapping[str, Any]) -> Tools:
    """Parses `tools`, `tool_choice` and `parallel_tool_calls`. Raises ValueError naming the field."""
    given = fields.get("tools", [])
    if not isinstance(given, list):
        raise ValueError(f"tools is {shown(given)}; it must be a list of tools")
    check_count("tools", len(given), MAX_TOOLS, "tools")
    declared: dict[str, Tool] = {}
    for index, item in enumerate(given):
        tool = _parse_tool(f"tools[{index}]", item)
        if tool.name in declared:
            raise ValueError(f"tools[{index}].function.name is {shown(tool.name)}; another tool has this name")
        declared[tool.name] = tool
    parallel = checked_flag("parallel_tool_calls", fields.get("parallel_tool_calls", True))
    return _chosen(declared, fields.get("tool_choice", "auto" if declared else "none"), parallel)


def _parse_tool(where: str, item: Any) -> Tool:
    checked_object(where, item)
    if item.get("type", "function") != "function":
        raise ValueError(f"{where}.type is {shown(item['type'])}; only function is supported")
    for name in item:
        if name not in ("type", "function"):
            raise ValueError(f"{where} has the unknown field {shown(name)}; known are type, function")
    where = f"{where}.function"
    fields = {name: value for name, value in checked_object(where, item.get("function")).items() if value is not None}
    for name in fields:
        if name not in _FUNCTION_FIELDS:
            raise ValueError(f"{where} has the unknown field {shown(name)}; {hint(name, _FUNCTION_FIELDS)}")
    name = checked_text(f"{where}.name", fields.get("name"))
    if not 0 < len(name) <= MAX_NAME_LENGTH:
        raise ValueError(f"{where}.name has {len(name)} characters; it must have 1 to {MAX_NAME_LENGTH}")
    check_text(f"{where}.description", fields.get("description", ""))
    checked_flag(f"{where}.strict", fields.get("strict", False))
    parameters = checked_object(f"{where}.parameters", fields.get("parameters", {}))
    check_depth(f"{where}.parameters", parameters)
    # Templates ask for the type and the properties of every tool.
    parameters = {"type": "object", "properties": {}, **parameters}
    definition = {"name": name, "description": fields.get("description", ""), "parameters": parameters}
    return Tool(name, parameters, {"type": "function", "function": definition})


def _chosen(declared: Mapping[str, Tool], choice: Any, parallel: bool) -> Tools:
    tools = tuple(declared.values())
    if choice in ("none", "auto", "required"):
        if choice == "required" and not tools:
            raise ValueError("tool_choice is 'required'; it needs tools, and the request has none")
        return Tools(tools, choice if tools else "none", None, parallel)
    if not isinstance(choice, dict):
        words = "none, auto, required or an object that names a tool"
        raise ValueError(f"tool_choice is {shown(choice)}; it must be {words}")
    if choice.get("type") == "allowed_tools":
        return _allowed(declared, choice.get("allowed_tools"), parallel)
    return Tools(tools, "named", _named("tool_choice", choice, declared), parallel)


def _allowed(declared: Mapping[str, Tool], allowed: Any, parallel: bool) -> Tools:
    """Returns the tools that `tool_choice` of type allowed_tools leaves."""
    where = "tool_choice.allowed_tools"
    checked_object(where, allowed)
    mode, items = allowed.get("mode"), allowed.get("tools")
    if mode not in ("auto", "required"):
        raise ValueError(f"{where}.mode is {shown(mode)}; it must be auto or required")
    if not isinstance(items, list) or not items:
        raise ValueError(f"{where}.tools is {shown(items)}; it must be a list of at least one tool")
    check_count(f"{where}.tools", len(items), MAX_TOOLS, "tools")
    names = {_named(f"{where}.tools[{index}]", item, declared) for index, item in enumerate(items)}
    return Tools(tuple(tool for name, tool in declared.items() if name in names), mode, None, parallel)


def _named(where: str, item: Any, declared: Mapping[str, Tool]) -> str:
    """Returns the name in an object that names a declared tool."""
    checked_object(where, item)
    if item.get("type") != "function":
        raise ValueError(f"{where}.type is {shown(item.get('type'))}; only function is supported")
    name = checked_object(f"{where}.function", item.get("function")).get("name")
    if not isinstance(name, str) or name not in declared:
        raise ValueError(f"{where}.function.name is {shown(name)}; it must be the name of one of tools")
    return name
