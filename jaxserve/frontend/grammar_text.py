"""Translates what a request's output is constrained to into a grammar of llguidance.

Its cost grows with what a client sends, so it runs in the process that checks grammars.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from llguidance.gbnf_to_lark import any_to_lark

from jaxserve.frontend.structural_tags import TagGrammar, lark_regex, quoted
from jaxserve.structured_outputs import StructuredOutputsParams

WHITESPACE = r"( |\r?\n[ \t]{0,40})"
"""Whitespace between two parts of JSON: one space, or the end of a line and an indentation. A model that cannot decide
what comes next is not left to write whitespace for ever."""


def grammar_of(params: StructuredOutputsParams, special: Mapping[str, int], most_depth: int) -> str:
    """Returns the grammar as llguidance takes it.

    Args:
        params: what to translate.
        special: ids of the vocabulary's special tokens by their text.
        most_depth: how deep brackets may nest.

    Raises:
        ValueError: it is malformed, or nested too deep; the line names the field.
    """
    match params.kind:
        case "json":
            check_depth("json", str(params.json), most_depth)
            return _json_grammar(_complete(_parsed("json", params.json), params))
        case "json_object":
            return _json_grammar(_complete({"type": "object"}, params))
        case "regex":
            assert params.regex is not None
            return f"%llguidance {{}}\nstart: /{lark_regex(params.regex)}/"
        case "choice":
            assert params.choice is not None
            return "%llguidance {}\nstart: " + " | ".join(quoted(text) for text in dict.fromkeys(params.choice))
        case "grammar":
            assert params.grammar is not None
            text = _lark(params.grammar)
            # A text that begins like JSON would be taken for llguidance's own form, whose limits are the client's.
            return text if text.startswith("%llguidance") else "%llguidance {}\n" + text
        case _:
            check_depth("structural_tag", str(params.structural_tag), most_depth)
            tag = _parsed("structural_tag", params.structural_tag)
            return TagGrammar(special, lambda schema: _complete(schema, params)).translate(tag)


def check_depth(name: str, text: str, most: int) -> None:
    """Raises ValueError where the objects and lists of a JSON text nest deeper than `most`, in one pass over it.

    What nests in regular expressions and grammars is for llguidance to bound, which reads them.
    """
    depth = 0
    for found in _BRACKETS.finditer(text):
        bracket = found.group()
        if bracket in "[{":
            depth += 1
            if depth > most:
                raise ValueError(f"{name} is nested more than {most} deep (max_grammar_depth): make it flatter")
        elif bracket in "]}":
            depth = max(0, depth - 1)


_BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]]', re.DOTALL)


def _parsed(name: str, text: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON: {error}") from error


def _json_grammar(schema: Any) -> str:
    return json.dumps({"grammars": [{"json_schema": schema}]}, ensure_ascii=False)


def _complete(schema: Any, params: StructuredOutputsParams) -> Any:
    """Adds to a schema how llguidance is to treat it; what the schema itself says of that goes first."""
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise ValueError("json must be a schema: an object")
    if params.disable_any_whitespace:
        options: dict[str, Any] = {"whitespace_flexible": False}
    else:
        options = {"whitespace_pattern": params.whitespace_pattern or WHITESPACE}
    if params.disable_additional_properties:
        schema = _closed(schema)
    given = schema.get("x-guidance")
    return schema | {"x-guidance": options | given if isinstance(given, dict) else options}


def _closed(value: Any) -> Any:
    """Returns a schema none of whose objects has other properties than those it names, unless it says so itself."""
    if isinstance(value, list):
        return [_closed(item) for item in value]
    if not isinstance(value, dict):
        return value
    closed = {name: _closed(item) for name, item in value.items()}
    if "additionalProperties" not in closed and ("properties" in closed or "patternProperties" in closed):
        closed["additionalProperties"] = False
    return closed


def _lark(text: str) -> str:
    try:
        return any_to_lark(text)
    except Exception as error:  # the conversion of GBNF raises what it stumbles over
        raise ValueError(f"grammar is refused: {next(iter(str(error).splitlines()), type(error).__name__)}") from error
