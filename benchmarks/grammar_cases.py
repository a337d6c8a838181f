"""Random schemas, regular expressions and grammars whose outputs can end, each with an independent check of an output.

JSON is checked by jsonschema, regular expressions by Python's `re`, grammars by Python's own parsers.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import random
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from typing import Any

import jsonschema

from jaxserve.structured_outputs import StructuredOutputsParams

KINDS = ("schema", "regex", "choice", "grammar", "tag")
_WEIGHTS = (50, 25, 5, 15, 5)
_PATTERNS = ("^[A-Z]{2,4}-[0-9]{1,3}$", "^(ja|nein|vielleicht)$", "^[äöü]{1,5}$")
_PIECES = (
    *("[a-f]", "[0-9]", "[äöüß]", "[^x\\n]", "é", "日", "\\.", "\\+", "ab"),
    *("\\w", "\\W", "\\S", "[\\d\\s]", " ", "[\\-_]", "/", "#", "😀"),
)
_WORDS = ("name", "größe", "名前", "clé", "id", "note", "x-y", "a b", "Δ", "emoji😀", 'quo"te', "back\\slash")


@dataclasses.dataclass(frozen=True)
class GrammarCase:
    """A grammar, and what tells whether a text follows it."""

    kind: str
    params: StructuredOutputsParams
    holds: Callable[[str], bool]


def cases(count: int, seed: int) -> list[GrammarCase]:
    """Returns `count` cases, the same ones for a seed."""
    rng = random.Random(seed)
    made: dict[str, Callable[[random.Random], GrammarCase]] = {
        "schema": schema_case,
        "regex": regex_case,
        "choice": choice_case,
        "grammar": grammar_case,
        "tag": tag_case,
    }
    return [made[rng.choices(KINDS, _WEIGHTS)[0]](rng) for _ in range(count)]


def schema_case(rng: random.Random) -> GrammarCase:
    schema: dict[str, Any] = _object(rng, rng.randint(1, 3))
    if rng.random() < 0.2:
        node = {
            "type": "object",
            "properties": {"value": _leaf(rng), "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
            "required": ["value", "next"],
            "additionalProperties": False,
        }
        schema = {"$ref": "#/$defs/node", "$defs": {"node": node}}
    return GrammarCase("schema", StructuredOutputsParams(json=schema), lambda text: follows_schema(schema, text))


def follows_schema(schema: Any, text: str) -> bool:
    """Tells whether a text is JSON that follows a schema."""
    try:
        jsonschema.validate(json.loads(text), schema, cls=jsonschema.Draft202012Validator)
    except (ValueError, jsonschema.ValidationError):
        return False
    return True


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    names = rng.sample(_WORDS, rng.randint(1, 3))
    return {
        "type": "object",
        "properties": {name: _value(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.8],
        "additionalProperties": False,
    }


def _value(rng: random.Random, depth: int) -> dict[str, Any]:
    if depth <= 0 or rng.random() < 0.5:
        return _leaf(rng)
    if rng.random() < 0.4:
        low = rng.randint(0, 1)
        return {"type": "array", "items": _value(rng, depth - 1), "minItems": low, "maxItems": low + rng.randint(0, 2)}
    return _object(rng, depth)


def _leaf(rng: random.Random) -> dict[str, Any]:
    low = rng.randint(-1000, 1000)
    short = rng.randint(0, 4)
    return rng.choice(
        (
            {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 5000)},
            {"type": "number", "minimum": low, "exclusiveMaximum": low + 1 + rng.random(), "multipleOf": 0.25},
            {"type": "string", "minLength": short, "maxLength": short + rng.randint(0, 10)},
            {
                "type": "string",
                "pattern": rng.choice(("^[A-Z]{2,4}-[0-9]{1,3}$", "^(ja|nein|vielleicht)$", "^[äöü]{1,5}$")),
            },
            {"type": "string", "format": rng.choice(("date", "uuid", "ipv4", "time"))},
            {"enum": rng.sample([1, None, True, "ä", "日本語", 'a "b"', "c\nd", -2.5, "😀"], rng.randint(1, 4))},
            {"const": rng.choice(("konst", 17, "ß"))},
            {"type": "boolean"},
            {"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 0, "maximum": 99}]},
        )
    )


def regex_case(rng: random.Random) -> GrammarCase:
    pattern = _regex(rng, 2)
    whole = re.compile(pattern)
    return GrammarCase("regex", StructuredOutputsParams(regex=pattern), lambda text: whole.fullmatch(text) is not None)


def _regex(rng: random.Random, depth: int) -> str:
    """Returns an expression that Python's `re` matches without trying every way to divide a text."""
    parts = []
    for _ in range(rng.randint(1, 3)):
        if depth and rng.random() < 0.5:
            part = f"({'|'.join(_regex(rng, depth - 1) for _ in range(rng.randint(1, 3)))})"
            parts.append(part + rng.choice(("", "", "?", "{2}")))
            continue
        low = rng.randint(0, 3)
        part = f"(?:{rng.choice(_PIECES)})"
        parts.append(part + rng.choice(("", "", "?", f"{{{low},{low + rng.randint(1, 3)}}}", f"{{{low + 1}}}")))
    return "".join(parts)


def choice_case(rng: random.Random) -> GrammarCase:
    texts = [f"{rng.choice(_WORDS)}{rng.choice(('', ' 1', chr(10), '/', '#'))}" for _ in range(rng.randint(1, 20))]
    return GrammarCase("choice", StructuredOutputsParams(choice=texts), lambda text: text in texts)


def grammar_case(rng: random.Random) -> GrammarCase:
    grammar, holds = rng.choice((_arithmetic, _nested_lists, _xml, _balanced))(rng)
    return GrammarCase("grammar", StructuredOutputsParams(grammar=grammar), holds)


def _arithmetic(rng: random.Random) -> tuple[str, Callable[[str], bool]]:
    operators = " | ".join(json.dumps(operator) for operator in rng.sample(["+", "-", "*", " // ", " % "], 3))
    most = rng.randint(1, 4)
    grammar = (
        f'start: expr\nexpr: term (op term){{0,{most}}}\nop: {operators}\nterm: NUMBER | NAME | "(" expr ")"\n'
        "NUMBER: /[1-9][0-9]{0,3}/\nNAME: /[a-z_äé]{1,6}_/\n"
    )
    return grammar, lambda text: _parses(lambda: ast.parse(text, mode="eval"))


def _nested_lists(rng: random.Random) -> tuple[str, Callable[[str], bool]]:
    most = rng.randint(1, 3)
    grammar = (
        f'start: list\nlist: "[" "]" | "[" item ("," item){{0,{most}}} "]"\nitem: NUMBER | WORD | list\n'
        f'NUMBER: /[0-9]|[1-9][0-9]{{1,{most}}}/\nWORD: /"[a-zß日]{{0,5}}"/\n'
    )
    return grammar, lambda text: _parses(lambda: json.loads(text))


def _xml(rng: random.Random) -> tuple[str, Callable[[str], bool]]:
    names = rng.sample(["a", "item", "größe", "p-1"], 2)
    rules = " | ".join(f"e{index}" for index in range(len(names)))
    elements = "".join(
        f'e{index}: "<{name}>" ({rules}) "</{name}>" | "<{name}>" TEXT "</{name}>"\n'
        for index, name in enumerate(names)
    )
    grammar = f"start: {rules}\n{elements}TEXT: /[^<>&\\x00-\\x1f\\uFFFE\\uFFFF]{{0,12}}/\n"
    return grammar, lambda text: _parses(lambda: ElementTree.fromstring(text))


def _balanced(rng: random.Random) -> tuple[str, Callable[[str], bool]]:
    left, right = rng.choice((("(", ")"), ("«", "»"), ("begin ", " end")))
    grammar = f'start: pair{{1,3}}\npair: {json.dumps(left)} pair {json.dumps(right)} | "x" | "y" | "z"\n'

    def holds(text: str) -> bool:
        while (shorter := text.replace(f"{left}x{right}", "x")) != text:
            text = shorter
        return re.fullmatch("x{1,3}", text) is not None

    return grammar, lambda text: holds(text.replace("y", "x").replace("z", "x"))


def _parses(parse: Callable[[], Any]) -> bool:
    try:
        parse()
    except (SyntaxError, ValueError, ElementTree.ParseError):
        return False
    return True


def tag_case(rng: random.Random) -> GrammarCase:
    name, schema = rng.choice(("f", "größe", "x1")), _object(rng, 1)
    begin, end = f"<call={name}>", "</call>"
    content = {"type": "json_schema", "json_schema": schema}
    tag = {"type": "structural_tag", "format": {"type": "tag", "begin": begin, "content": content, "end": end}}

    def holds(text: str) -> bool:
        inner = text.removeprefix(begin).removesuffix(end)
        return text == begin + inner + end and follows_schema(schema, inner)

    return GrammarCase("tag", StructuredOutputsParams(structural_tag=tag), holds)
