"""Makes the command line's options of sampling parameters, one for each row of their table."""

from __future__ import annotations

import argparse
import json
import typing
from collections.abc import Mapping
from typing import Any

from jaxserve.config.plain_params import Form, PlainField, plain_fields
from jaxserve.config.sampling_fields import Texts, word_of

_OWN_DEFAULTS: Mapping[str, Any] = {"temperature": 0.0}
"""Defaults of the command line, which decodes greedily; the others are the server's."""


def sampling_flags() -> dict[str, dict[str, Any]]:
    """Returns argparse's arguments for each option, by its name."""
    return {f"--{name.replace('_', '-')}": _arguments(field) for name, field in plain_fields().items()}


def given_params(parsed: argparse.Namespace) -> dict[str, Any]:
    """Returns the plain values of the parameters that were given, and of those that have a default here."""
    values = {name: getattr(parsed, name) for name in plain_fields()}
    for name, field in plain_fields().items():
        if field.form is Form.MAPPING and values[name] is not None:
            values[name] = dict(values[name])
    return {name: value for name, value in values.items() if value is not None}


def text_params() -> list[str]:
    """Returns the names of the parameters that are lists of texts."""
    return [name for name, field in plain_fields().items() if isinstance(field.row.kind, Texts)]


def _arguments(field: PlainField) -> dict[str, Any]:
    row = field.row
    meaning = row.meaning.replace("%", "%%")
    match field.form:
        case Form.LIST:
            kind = typing.get_args(field.type)[0]
            metavar = "TEXT" if kind is str else "ID"
            return {"action": "append", "type": kind, "metavar": metavar, "help": meaning}
        case Form.MAPPING:
            return {"action": "append", "type": _pair, "metavar": "ID=NUMBER", "help": meaning}
        case Form.WORD:
            return {"choices": [word_of(member) for member in field.type], "help": meaning}
        case Form.OBJECT:
            return {"type": _json_object, "metavar": "JSON", "help": meaning}
    if field.type is bool:
        action = argparse.BooleanOptionalAction if row.default else "store_true"
        return {"action": action, "default": None, "help": meaning}
    default = _OWN_DEFAULTS.get(row.name)
    told = row.default if default is None else default
    shown_default = "" if told is None else f" (default: {told:g})"
    return {"type": field.type, "default": default, "metavar": "N", "help": meaning + shown_default}


def _pair(text: str) -> tuple[int, float]:
    token_id, equals, number = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is no ID=NUMBER")
    return int(token_id), float(number)


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{text!r} is no object in JSON")
    return value


_pair.__name__ = "pair of a token id and a number, as 5=-1.5"
_json_object.__name__ = "object in JSON"
