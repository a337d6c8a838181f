"""Parses what a body constrains its output to: OpenAI's `response_format` and vLLM's fields."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.config.shown import shown
from jaxserve.frontend.openai_checks import check_text, checked_object, hint
from jaxserve.structured_outputs import StructuredOutputs, StructuredOutputsParams

_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""vLLM's older fields, each with its name in `structured_outputs`."""
_GUIDED_OPTIONS = {"guided_whitespace_pattern": "whitespace_pattern"}

FORMAT_FIELDS = ("response_format", *_GUIDED, *_GUIDED_OPTIONS)
"""Fields beside `structured_outputs`."""

_FORMATS = ("text", "json_object", "json_schema", "structural_tag", "grammar")
_SCHEMA_FIELDS = ("name", "description", "schema", "strict")


def parse_structured_outputs(fields: Mapping[str, Any]) -> StructuredOutputsParams | None:
    """Returns what a body constrains its output to; None where it does not. Raises ValueError naming the field."""
    found: dict[str, StructuredOutputsParams] = {}
    if "structured_outputs" in fields:
        found["structured_outputs"] = StructuredOutputs().checked("structured_outputs", fields["structured_outputs"])
    if (of_format := _of_format(fields.get("response_format"))) is not None:
        found["response_format"] = of_format
    options = {name: fields[old] for old, name in _GUIDED_OPTIONS.items() if old in fields}
    for old, name in _GUIDED.items():
        if old in fields:
            found[old] = StructuredOutputsParams(**{name: fields[old], **(options if name == "json" else {})})
    if len(found) > 1:
        raise ValueError(f"{' and '.join(found)} both constrain the output; give one of them")
    if options and "guided_json" not in found:
        raise ValueError(f"{next(iter(_GUIDED_OPTIONS))} is of guided_json; give both, or neither")
    return next(iter(found.values()), None)


def _of_format(value: Any) -> StructuredOutputsParams | None:
    """Parses a `response_format`."""
    if value is None:
        return None
    kind = checked_object("response_format", value).get("type")
    if kind not in _FORMATS:
        raise ValueError(f"response_format.type is {shown(kind)}; it must be one of {', '.join(_FORMATS)}")
    if kind == "structural_tag":  # the whole of it is the tag
        return StructuredOutputsParams(structural_tag=value)
    known = {"type"} | ({kind} if kind in ("json_schema", "grammar") else set())
    for name, part in value.items():
        if name not in known and part is not None:
            raise ValueError(f"response_format has the unknown field {shown(name)}; {hint(name, known)}")
    if kind == "text":
        return None
    if kind == "json_object":
        return StructuredOutputsParams(json_object=True)
    if kind == "grammar":
        return StructuredOutputsParams(grammar=value.get("grammar"))
    return StructuredOutputsParams(json=_schema(value.get("json_schema")))


def _schema(value: Any) -> Any:
    """Returns the schema of a `json_schema`. `strict` says nothing that does not hold anyway."""
    checked_object("response_format.json_schema", value)
    for name, part in value.items():
        if name not in _SCHEMA_FIELDS and part is not None:
            where = "response_format.json_schema"
            raise ValueError(f"{where} has the unknown field {shown(name)}; {hint(name, set(_SCHEMA_FIELDS))}")
    check_text("response_format.json_schema.name", value.get("name", ""))
    if "schema" not in value:
        raise ValueError("response_format.json_schema has no schema; give one, or type json_object for any object")
    return checked_object("response_format.json_schema.schema", value["schema"])
