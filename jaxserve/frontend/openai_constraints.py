"""Builds the JSON schemas that constrain an output to calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.frontend.openai_tools import Tool, Tools

_VALUES = frozenset({"const", "default", "enum", "examples"})
"""Keywords of JSON schemas whose values are no schemas."""


def forced_calls(tools: Tools) -> dict[str, Any] | None:
    """Returns the schema of an output that must be calls: the arguments of one that is asked for by name, or a list of
    calls of the declared tools; None where a call is the model's choice.
    """
    forced = tools.forced
    if not forced:
        return None
    if tools.choice == "named":
        (tool,) = forced
        return dict(tool.parameters)
    definitions = {f"tool{index}": _moved(tool.parameters, f"#/$defs/tool{index}") for index, tool in enumerate(forced)}
    return {
        "type": "array",
        "minItems": 1,
        **({} if tools.parallel else {"maxItems": 1}),
        "items": {"anyOf": [_call(tool, f"#/$defs/tool{index}") for index, tool in enumerate(forced)]},
        "$defs": definitions,
    }


def _call(tool: Tool, parameters: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "parameters": {"$ref": parameters}},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _moved(schema: Any, base: str) -> Any:
    """Returns a schema that stands at `base` of another one, with its references to its own parts going there."""
    if isinstance(schema, Sequence) and not isinstance(schema, str):
        return [_moved(item, base) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    moved = {}
    for name, value in schema.items():
        if name == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            moved[name] = base + value[1:]
        else:
            moved[name] = value if name in _VALUES else _moved(value, base)
    return moved
