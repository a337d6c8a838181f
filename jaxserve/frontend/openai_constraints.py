"""Builds what constrains an output to calls, as keywords of `StructuredOutputsParams`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.frontend.openai_checks import check_depth
from jaxserve.frontend.openai_tools import Tool, Tools

Constraint = Mapping[str, Any]
"""Keywords of `StructuredOutputsParams`."""

_WHITESPACE = r"( |\r?\n[ \t]{0,40})"
"""White space between two parts of JSON, as where JSON is all of the output: never without end."""

_MAX_TEXT = 64 * 1024
"""Characters of a schema that is text, up to which it is read on the event loop."""

_VALUES = frozenset({"const", "default", "enum", "examples"})
"""Keywords of JSON schemas whose values are no schemas."""


def forced_calls(tools: Tools) -> Constraint | None:
    """Returns what makes the output a call: the arguments of one that is asked for by name, or a list of calls of the
    declared tools; None where a call is the model's choice.
    """
    forced = tools.forced
    if not forced:
        return None
    if tools.choice == "named":
        (tool,) = forced
        return {"json": dict(tool.parameters)}
    definitions = {f"tool{index}": _moved(tool.parameters, f"#/$defs/tool{index}") for index, tool in enumerate(forced)}
    return {
        "json": {
            "type": "array",
            "minItems": 1,
            **({} if tools.parallel else {"maxItems": 1}),
            "items": {"anyOf": [_call(tool, f"#/$defs/tool{index}") for index, tool in enumerate(forced)]},
            "$defs": definitions,
        }
    }


def behind(lead: str, constraint: Constraint) -> Constraint | None:
    """Returns a constraint for an output that begins with something else; None where the constraint is not one that can
    be divided so.

    lead: what it begins with, in Lark: lines of which the first defines `lead`.
    """
    if len(constraint) != 1:
        return None
    ((kind, value),) = constraint.items()
    match kind:
        case "json":
            schema = _schema(value)
            if schema is None:
                return None
            answer = f"%json {json.dumps(schema)}"
        case "json_object":
            answer = f"%json {json.dumps(_schema({'type': 'object'}))}"
        case "choice":
            answer = " | ".join(json.dumps(text) for text in value)
        case _:
            return None
    return {"grammar": f"start: lead answer\n{lead}\nanswer: {answer}\n"}


def _schema(value: Any) -> dict[str, Any] | None:
    """Returns a schema that says how JSON may be spaced; None for what is none, or too large to be read here."""
    if isinstance(value, str):
        if len(value) > _MAX_TEXT:
            return None
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if not isinstance(value, Mapping):
        return None
    try:
        check_depth("json", value)
    except ValueError:
        return None
    return {**value, "x-guidance": value.get("x-guidance", {"whitespace_pattern": _WHITESPACE})}


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
