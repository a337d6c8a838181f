"""Parses tool calls that are written in JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

import msgspec

from jaxserve.frontend.parsers.pieces import Call

_ARGUMENTS = ("arguments", "parameters")
_NO_ARGUMENTS = "{}"


def parse_call(text: str, *, needs_arguments: bool = False) -> Call | None:
    """Parses an object with `name` and `arguments` (or `parameters`); returns None for any other text.

    Arguments may be absent, unless needs_arguments, and may be a text that holds the object. What is valid JSON is kept
    as it is written.
    """
    return _call_of(_members(text), needs_arguments)


def parse_calls(text: str) -> list[Call] | None:
    """Parses one such object or a list of them; returns None for any other text, and for none."""
    if not text.lstrip().startswith("["):
        call = parse_call(text)
        return None if call is None else [call]
    try:
        items = msgspec.json.decode(text, type=list[msgspec.Raw])
    except (msgspec.DecodeError, RecursionError, ValueError):
        return None
    calls = [call for item in items if (call := parse_call(bytes(item).decode())) is not None]
    return calls if calls and len(calls) == len(items) else None


def object_text(text: str) -> str | None:
    """Returns the text of a JSON object without what surrounds it; None for text that is no such object."""
    members = _members(text)
    if members is None:
        return None
    return text.strip() if isinstance(members, _Written) else _dumped(members)


class _Written(dict[str, str]):
    """The members of an object that is valid JSON, each as it is written."""


def _call_of(members: Mapping[str, Any] | None, needs_arguments: bool) -> Call | None:
    if members is None:
        return None
    written = isinstance(members, _Written)
    name = members.get("name")
    if written and name is not None:
        name = _text(name)
    if not isinstance(name, str) or not name or not _is_unicode(name):
        return None
    given = next((members[key] for key in _ARGUMENTS if key in members), None)
    if given is None and needs_arguments:
        return None
    if given is None or given == "null":
        return Call(name, _NO_ARGUMENTS)
    if written and given.startswith('"'):
        given = _text(given)
        arguments = None if given is None else object_text(given)
    elif isinstance(given, str):
        arguments = object_text(given)
    else:
        arguments = _dumped(given) if isinstance(given, dict) else None
    return None if arguments is None else Call(name, arguments)


def _members(text: str) -> Mapping[str, Any] | None:
    """Returns the members of a JSON object: as they are written, or, where only the control characters in its texts
    keep it from being valid, as values."""
    try:
        written = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        for value in written.values():
            msgspec.json.decode(value)  # a raw value is not checked in every detail
        return _Written({name: bytes(value).decode() for name, value in written.items()})
    except (msgspec.DecodeError, RecursionError, ValueError):
        pass
    try:
        found = json.loads(text, strict=False, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _text(written: str) -> str | None:
    """Returns the value of a JSON text; None for any other value."""
    value = msgspec.json.decode(written)
    return value if isinstance(value, str) else None


def _dumped(value: Any) -> str | None:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return text if _is_unicode(text) else json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return None


def _is_unicode(text: str) -> bool:
    """Returns whether the text has no lone surrogate, which an escape in JSON can spell."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
