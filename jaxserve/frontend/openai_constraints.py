"""Builds what constrains an output, as keywords of `StructuredOutputsParams`: by `response_format`, or by tools of
which one must be called.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.config.shown import shown
from jaxserve.frontend.openai_checks import check_depth, check_text, checked_flag, checked_object, hint
from jaxserve.frontend.openai_tools import Tool, Tools

Constraint = Mapping[str, Any]
"""Keywords of `StructuredOutputsParams`."""

_FORMATS = ("text", "json_object", "json_schema", "structural_tag")
_SCHEMA_FIELDS = frozenset({"name", "description", "schema", "strict"})
_VALUES = frozenset({"const", "default", "enum", "examples"})
"""Keywords of JSON schemas whose values are no schemas."""


def response_format(value: Any) -> Constraint | None:
    """Returns what a body's `response_format` asks for; None for text. Raises ValueError naming the field.

    A structural tag is vLLM's addition, and given to the grammar as it is.
    """
    kind = checked_object("response_format", value).get("type")
    if kind not in _FORMATS:
        raise ValueError(f"response_format.type is {shown(kind)}; it must be one of {', '.join(_FORMATS)}")
    if kind == "structural_tag":
        check_depth("response_format", value)
        return {"structural_tag": json.dumps(value)}
    for name, field in value.items():
        if field is not None and name != "type" and (name, kind) != ("json_schema", "json_schema"):
            raise ValueError(f"response_format has the field {shown(name)}, which type {kind} does not have")
    if kind != "json_schema":
        return {"json_object": True} if kind == "json_object" else None
    where = "response_format.json_schema"
    fields = checked_object(where, value.get("json_schema"))
    for name in fields:
        if name not in _SCHEMA_FIELDS:
            raise ValueError(f"{where} has the unknown field {shown(name)}; {hint(name, _SCHEMA_FIELDS)}")
    for name in ("name", "description"):
        check_text(f"{where}.{name}", "" if fields.get(name) is None else fields[name])
    checked_flag(f"{where}.strict", bool(fields.get("strict") or False))
    schema = checked_object(f"{where}.schema", fields.get("schema"))
    check_depth(f"{where}.schema", schema)
    return {"json": schema}


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
            answer = f"%json {value if isinstance(value, str) else json.dumps(value)}"
        case "json_object":
            answer = '%json {"type": "object"}'
        case "choice":
            answer = " | ".join(json.dumps(text) for text in value)
        case _:
            return None
    return {"grammar": f"start: lead answer\n{lead}\nanswer: {answer}\n"}


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
