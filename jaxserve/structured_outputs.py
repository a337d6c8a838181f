"""Defines what a request may constrain its output to. Standard library only; the names are vLLM's."""

from __future__ import annotations

import dataclasses
import hashlib
import json as json_module
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.config.shown import shown

GRAMMAR_FAILED = "structured_outputs cannot go on, simplify the grammar: "
"""Beginning of the error line of a request whose grammar failed in the engine."""

MAX_CHOICES = 4096
"""Maximum number of choices of one request."""


@dataclasses.dataclass(frozen=True)
class StructuredOutputsParams:
    """Constrains an output to one of the following; exactly one is set.

    json: a JSON schema, as text or as a mapping (kept as text).
    regex: a regular expression of Rust's `regex` crate, which the whole output matches.
    choice: texts of which the output is one.
    grammar: a context-free grammar in llguidance's Lark syntax, or GBNF.
    json_object: any JSON object.
    structural_tag: text between tags, as vLLM's JSON in either of its forms.

    Of JSON alone: disable_any_whitespace allows no whitespace between its parts, whitespace_pattern only what matches
    it, and disable_additional_properties no properties of objects but those that the schema names.

    Raises ValueError, where it is made, naming the field and the limit. What a grammar costs is checked by the front
    end.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | Mapping[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        if self.json_object is False:  # what clients send that do not ask for it
            object.__setattr__(self, "json_object", None)
        given = [name for name in KINDS if getattr(self, name) is not None]
        if len(given) != 1:
            has = " and ".join(given) or "none"
            raise ValueError(f"structured_outputs must have exactly one of {', '.join(KINDS)}; it has {has}")
        for name in ("json", "structural_tag"):
            object.__setattr__(self, name, _json_text(name, getattr(self, name)))
        for name in ("regex", "grammar", "whitespace_pattern"):
            _check_text(name, getattr(self, name))
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            _check_flag(name, getattr(self, name))
        if self.json_object is not None:
            _check_flag("json_object", self.json_object)
        if self.choice is not None:
            object.__setattr__(self, "choice", _choices(self.choice))

    @property
    def kind(self) -> str:
        """Returns the name of the field of KINDS that is set."""
        return next(name for name in KINDS if getattr(self, name) is not None)

    @property
    def where(self) -> str:
        """Returns the field of a request that errors name."""
        return f"structured_outputs.{self.kind}"

    @property
    def num_bytes(self) -> int:
        """Returns the bytes of all texts together, in UTF-8."""
        texts = [getattr(self, name) for name in ("json", "regex", "grammar", "structural_tag", "whitespace_pattern")]
        return sum(
            len(text) if text.isascii() else len(text.encode()) for text in (*texts, *(self.choice or ())) if text
        )

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields that are set, as JSON has them."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["choice"] = None if self.choice is None else list(self.choice)
        return {name: value for name, value in values.items() if value not in (None, False, "")}

    def digest(self) -> bytes:
        """Returns 16 bytes that tell it from any other."""
        return hashlib.blake2b(json_module.dumps(self.as_dict()).encode(), digest_size=16).digest()


KINDS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
"""Fields of `StructuredOutputsParams` of which exactly one is set."""


@dataclasses.dataclass(frozen=True)
class ReplyStructuredOutputs(StructuredOutputsParams):
    """Constrains the answer in a reply of a chat; front ends make it, and no request has it.

    lead: what the reply begins with before the answer, such as reasoning: lines of Lark of which the first defines the
    rule `lead`; "" for nothing. source: the field of the request that the constraint follows from, where that is not
    structured_outputs.
    """

    lead: str = ""
    source: str = ""

    @property
    def where(self) -> str:
        """Returns the field of a request that errors name."""
        return self.source or super().where


@dataclasses.dataclass(frozen=True)
class StructuredOutputs:
    """Accepts StructuredOutputsParams, or a mapping of its fields: a kind of the table of sampling parameters."""

    def checked(self, name: str, value: Any) -> StructuredOutputsParams:
        if isinstance(value, StructuredOutputsParams):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} is {shown(value)}; it must be an object with one of {', '.join(KINDS)}")
        known = [field.name for field in dataclasses.fields(StructuredOutputsParams)]
        for key in value:
            if key not in known:
                raise ValueError(f"{name} has the unknown field {shown(key)}; known are {', '.join(known)}")
        return StructuredOutputsParams(**{key: part for key, part in value.items() if part is not None})

    @property
    def limits(self) -> str:
        return f"one of {', '.join(KINDS)}"


def _json_text(name: str, value: Any) -> str | None:
    """Returns a JSON value as text; text is kept as it is, since reading it costs what it is deep."""
    if value is None:
        return None
    if isinstance(value, str):
        _check_text(name, value)
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"structured_outputs.{name} is {shown(value)}; it must be an object, or its JSON as text")
    try:
        text = json_module.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except RecursionError as error:
        raise ValueError(f"structured_outputs.{name} is nested too deep for JSON: make it flatter") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"structured_outputs.{name} is no JSON: {error}") from error
    _check_text(name, text)
    return text


def _check_text(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, str) or not value:
        raise ValueError(f"structured_outputs.{name} is {shown(value)}; it must be a text of at least one character")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"structured_outputs.{name} has a lone surrogate; it must be valid Unicode")


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"structured_outputs.{name} is {shown(value)}; it must be true or false")


def _choices(value: Any) -> tuple[str, ...]:
    if isinstance(value, str | bytes) or not isinstance(value, Sequence) or not value:
        raise ValueError(f"structured_outputs.choice is {shown(value)}; it must be a list of at least one text")
    if len(value) > MAX_CHOICES:
        raise ValueError(f"structured_outputs.choice has {len(value)} texts; at most {MAX_CHOICES} are allowed")
    for text in value:
        _check_text("choice", text)
    return tuple(value)
