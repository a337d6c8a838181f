"""Translates structural tags to a Lark grammar of llguidance: text between tags whose content follows a grammar.

Two forms are in use, both JSON: vLLM's older one, `structures` (begin, schema, end) and their `triggers`, and that of
xgrammar, a `format` made of nested formats. Texts that are special tokens of the vocabulary become these tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llguidance import regex_to_lark

from jaxserve.config.shown import shown

_ANY = r"/(?s:.*)/"


class TagGrammar:
    """Builds one grammar. special: ids of the vocabulary's special tokens by text. schema: completes a JSON schema with
    the options of the request."""

    def __init__(self, special: Mapping[str, int], schema: Callable[[Any], Any]):
        self._special = special
        self._schema = schema
        self._rules: list[str] = []
        self._parts = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True)))) if special else None

    def translate(self, tag: Any) -> str:
        """Returns the grammar of a structural tag's JSON value. Raises ValueError naming what is wrong in it."""
        if not isinstance(tag, dict):
            raise ValueError(f"structural_tag is {shown(tag)}; it must be an object")
        if "format" in tag:
            body = self._format(tag["format"], "structural_tag.format")
        elif "structures" in tag:
            body = self._older(tag)
        else:
            raise ValueError("structural_tag has neither format nor structures; give one of them")
        return "\n".join(("%llguidance {}", f"start: {body}", *self._rules))

    # ---- the older form ------------------------------------------------------------------------------------------

    def _older(self, tag: Mapping[str, Any]) -> str:
        structures, triggers = _list(tag, "structures"), _texts(tag, "triggers")
        tags = []
        for index, structure in enumerate(structures):
            where = f"structural_tag.structures[{index}]"
            content = {"type": "json_schema", "json_schema": _member(structure, "schema", where)}
            begin, end = _text(structure, "begin", where), _text(structure, "end", where)
            tags.append({"begin": begin, "content": content, "end": end})
        return self._triggered({"triggers": triggers, "tags": tags}, "structural_tag")

    # ---- formats -------------------------------------------------------------------------------------------------

    def _format(self, value: Any, where: str) -> str:
        """Returns an expression of the grammar for a format."""
        kind = _text(value, "type", where)
        match kind:
            case "const_string":
                return self._literal(_text(value, "value", where))
            case "json_schema":
                return self._json(_member(value, "json_schema", where))
            case "regex":
                return self._rule(f"/{lark_regex(_text(value, 'pattern', where))}/")
            case "any_text":
                return self._rule(_ANY)
            case "sequence":
                parts = [self._format(part, f"{where}.elements") for part in _list(value, "elements", where)]
                return f"({' '.join(parts)})"
            case "or":
                parts = [self._format(part, f"{where}.elements") for part in _list(value, "elements", where)]
                return f"({' | '.join(parts)})"
            case "tag":
                return self._tag(value, where)
            case "triggered_tags":
                return self._triggered(value, where)
            case "tags_with_separator":
                return self._separated(value, where)
        known = "const_string, json_schema, regex, any_text, sequence, or, tag, triggered_tags, tags_with_separator"
        raise ValueError(f"{where}.type is {shown(kind)}; known are {known}")

    def _tag(self, value: Any, where: str, without: str = "") -> str:
        """Returns a tag; without: the beginning of its `begin` that is there already."""
        begin, ends = _text(value, "begin", where), _member(value, "end", where)
        ends = [ends] if isinstance(ends, str) else ends
        if not isinstance(ends, list) or not ends or not all(isinstance(end, str) for end in ends):
            raise ValueError(f"{where}.end is {shown(ends)}; it must be a text or a list of texts")
        content = _member(value, "content", where)
        if isinstance(content, dict) and content.get("type") == "any_text":
            return f"({self._literal(begin[len(without) :])} {self._text_until(ends, where)})"
        last = "(" + " | ".join(self._literal(end) for end in ends) + ")" if any(ends) else ""
        return f"({self._literal(begin[len(without) :])} {self._format(content, f'{where}.content')} {last})"

    def _text_until(self, ends: Sequence[str], where: str) -> str:
        """Returns any text up to and with one of `ends`."""
        if any(end in self._special for end in ends):
            return f"{self._rule(_ANY)} ({' | '.join(self._literal(end) for end in ends)})"
        if not all(ends):
            raise ValueError(f"{where}.end has an empty text; any text needs one that ends it")
        return self._rule(f"/(?s:.*)({'|'.join(_escaped(end) for end in ends)})/", lazy=True)

    def _triggered(self, value: Any, where: str) -> str:
        """Returns any text in which each trigger begins one of the tags that begin with it."""
        triggers, tags = _texts(value, "triggers", where), _list(value, "tags", where)
        by_trigger: dict[str, list[str]] = {trigger: [] for trigger in triggers}
        for index, tag in enumerate(tags):
            begin = _text(tag, "begin", f"{where}.tags[{index}]")
            trigger = next((trigger for trigger in triggers if begin.startswith(trigger)), None)
            if trigger is None:
                raise ValueError(f"{where}.tags[{index}].begin is {shown(begin)}; none of the triggers begins it")
            by_trigger[trigger].append(self._tag(tag, f"{where}.tags[{index}]", trigger))
        heads = []
        for trigger, bodies in by_trigger.items():
            if not bodies:
                raise ValueError(f"{where}.triggers has {shown(trigger)}; no tag begins with it")
            if trigger in self._special:
                head = f"{self._rule(_ANY)} {self._literal(trigger)}"
            else:
                head = self._rule(f"/(?s:.*)({_escaped(trigger)})/", lazy=True)
            heads.append(f"{head} ({' | '.join(bodies)})")
        once, needed = bool(_option(value, "stop_after_first")), bool(_option(value, "at_least_one"))
        call = f"({' | '.join(heads)})"
        if once:
            return call if needed else f"({call} | {self._rule(_ANY)})"
        return f"({call}{'+' if needed else '*'} {self._rule(_ANY)})"

    def _separated(self, value: Any, where: str) -> str:
        tags = [self._tag(tag, f"{where}.tags[{index}]") for index, tag in enumerate(_list(value, "tags", where))]
        separator = self._literal(_text(value, "separator", where))
        any_tag = f"({' | '.join(tags)})"
        many = any_tag if _option(value, "stop_after_first") else f"({any_tag} ({separator} {any_tag})*)"
        return many if _option(value, "at_least_one") else f"{many}?"

    # ---- pieces --------------------------------------------------------------------------------------------------

    def _rule(self, body: str, lazy: bool = False) -> str:
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{'[lazy]' if lazy else ''}: {body}")
        return name

    def _json(self, schema: Any) -> str:
        return self._rule(f"%json {json.dumps(self._schema(schema), ensure_ascii=False)}")

    def _literal(self, text: str) -> str:
        """Returns a text, in which the texts of special tokens are these tokens."""
        pieces, position = [], 0
        for found in self._parts.finditer(text) if self._parts is not None else ():
            pieces += [quoted(text[position : found.start()]), f"<[{self._special[found.group()]}]>"]
            position = found.end()
        pieces.append(quoted(text[position:]))
        return " ".join(piece for piece in pieces if piece != '""') or '""'


def quoted(text: str) -> str:
    """Returns a text as a string of a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def lark_regex(pattern: str) -> str:
    """Returns a regular expression as it stands between two slashes of a Lark grammar.

    Its classes of characters, such as \\w, are those characters that every notation counts to them (in a class that is
    negated: that any notation does): what a text matches must not depend on who checks it, and letters with marks, say,
    are letters to some alone.
    """
    parts, negated = [], [False]  # of the open classes, whether what stands in them is excluded
    for part in _PARTS.findall(pattern):
        if part.startswith("["):
            negated.append(negated[-1] != part.startswith("[^"))
        elif part == "]" and len(negated) > 1:
            negated.pop()
        parts.append((_IN_ANY if negated[-1] else _IN_ALL).get(part, part))
    return regex_to_lark("".join(parts), "")


_PARTS = re.compile(r"\\.?|\[\^?\]?|\]|[^\\\[\]]+", re.DOTALL)
"""Escapes, what opens a class (a bracket that closes none stands first in it), what closes one, and the rest."""

_IN_ALL = {
    r"\d": "[0-9]",
    r"\w": "[0-9A-Za-z_]",
    r"\s": r"[ \t\n\r\f\v]",
    r"\D": r"[^\p{N}]",
    r"\W": r"[^\w\p{N}]",
    r"\S": r"[^\s\x1c-\x1f\u0085\uFEFF]",
}
"""Characters that every notation counts to a class."""

_IN_ANY = {
    r"\d": r"\p{N}",
    r"\w": r"[\w\p{N}]",
    r"\s": r"[\s\x1c-\x1f\u0085\uFEFF]",
    r"\D": "[^0-9]",
    r"\W": "[^0-9A-Za-z_]",
    r"\S": r"[^ \t\n\r\f\v]",
}
"""Characters that any notation counts to it."""


def _escaped(text: str) -> str:
    """Returns a regular expression, as it stands between two slashes, that matches a text."""
    return regex_to_lark(re.sub(r"([\\.+*?()|\[\]{}^$#&\-~])", r"\\\1", text), "")


def _member(value: Any, name: str, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {shown(value)}; it must be an object")
    if name not in value:
        raise ValueError(f"{where} has no {name}")
    return value[name]


def _option(value: Any, name: str) -> Any:
    return value.get(name, False)


def _text(value: Any, name: str, where: str) -> str:
    found = _member(value, name, where)
    if not isinstance(found, str):
        raise ValueError(f"{where}.{name} is {shown(found)}; it must be text")
    return found


def _list(value: Any, name: str, where: str = "structural_tag") -> list[Any]:
    found = _member(value, name, where)
    if not isinstance(found, list) or not found:
        raise ValueError(f"{where}.{name} is {shown(found)}; it must be a list of at least one")
    return found


def _texts(value: Any, name: str, where: str = "structural_tag") -> list[str]:
    found = _list(value, name, where)
    for text in found:
        if not isinstance(text, str) or not text:
            raise ValueError(f"{where}.{name} has {shown(text)}; each must be a text of at least one character")
    return found
