"""Converts fields of protobuf messages to and from plain values, whatever their types.

A repeated field is a list, a map a dict, an enumeration the word of its member without the prefix of its type, a
message the dict of its fields that are set; a message of one repeated field alone, which gives a list a presence, is
that list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message


def read_fields(proto: Message) -> dict[str, Any]:
    """Returns the plain values of a message's fields that are set. Raises ValueError for an unknown enumeration member.

    Of fields without presence those are set that are not zero or empty; an enumeration's first member means unset, too.
    """
    found = {}
    for field, value in proto.ListFields():
        if field.enum_type is None or field.is_repeated:
            found[field.name] = _read(field, value)
        elif value:
            found[field.name] = _read_word(field, value)
    return found


def made(message: type[Message], values: Mapping[str, Any]) -> Any:
    """Returns a message with fields of plain values; a field whose value is None is left unset."""
    fields = message.DESCRIPTOR.fields_by_name
    return message(**{name: _written(fields[name], value) for name, value in values.items() if value is not None})


def _read(field: Any, value: Any) -> Any:
    kind = field.message_type
    if kind is None:
        return tuple(value) if field.is_repeated else value
    if kind.GetOptions().map_entry:
        return dict(value)
    if field.is_repeated:
        return [_read_message(kind, one) for one in value]
    return _read_message(kind, value)


def _read_message(kind: Any, value: Message) -> Any:
    name = _only_repeated(kind)
    return read_fields(value) if name is None else list(getattr(value, name))


def _read_word(field: Any, number: int) -> str:
    kind = field.enum_type
    if number not in kind.values_by_number:
        raise ValueError(f"{field.name} is {number}; it must be one of {', '.join(_words(kind))}")
    return kind.values_by_number[number].name.removeprefix(_prefix(kind)).lower()


def _written(field: Any, value: Any) -> Any:
    """Returns the value as a message's constructor takes it."""
    if field.enum_type is not None:
        return _words(field.enum_type)[value]
    kind = field.message_type
    if kind is None:
        # An object in a field of text: its JSON, as of a schema.
        is_object = field.type == FieldDescriptor.TYPE_STRING and isinstance(value, Mapping)
        return json.dumps(value) if is_object else value
    if kind.GetOptions().map_entry:
        return dict(value)
    if field.is_repeated:
        return [_written_message(kind, one) for one in value]
    return _written_message(kind, value)


def _written_message(kind: Any, value: Any) -> dict[str, Any]:
    name = _only_repeated(kind)
    if name is not None:
        return {name: value}
    fields = kind.fields_by_name
    return {name: _written(fields[name], part) for name, part in value.items() if part is not None}


def _only_repeated(kind: Any) -> str | None:
    """Returns the name of the field of a message that has only one, where it is repeated."""
    if len(kind.fields) != 1 or not kind.fields[0].is_repeated or kind.fields[0].message_type is not None:
        return None
    return kind.fields[0].name


def _prefix(kind: Any) -> str:
    """Returns what the names of an enumeration's members begin with: OUTPUT_KIND_ of OutputKind."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind.name).upper() + "_"


def _words(kind: Any) -> dict[str, int]:
    """Returns the numbers of an enumeration's members but the first by their words."""
    return {value.name.removeprefix(_prefix(kind)).lower(): value.number for value in kind.values if value.number}
