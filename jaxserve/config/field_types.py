"""Checks values against the annotated types of dataclass fields, and says in words what a field takes."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text in quotes",
    bool: "True or False",
    types.NoneType: "None",
}


@functools.cache
def hints(config: type) -> dict[str, Any]:
    """Returns the annotated type of every field of a dataclass, by name."""
    annotated = typing.get_type_hints(config)
    return {field.name: annotated[field.name] for field in dataclasses.fields(config) if field.init}


def accepts(hint: Any, value: Any) -> bool:
    """Tells whether a field of this type accepts this value."""
    try:
        convert(hint, value)
    except TypeError:
        return False
    return True


def convert(hint: Any, value: Any) -> Any:
    """Converts a value to the form that a field of this type stores (1 becomes 1.0, a list a tuple); raises TypeError
    if it does not fit."""
    if hint is Any:
        return value
    if hint is float and type(value) in (int, float):
        return float(value)
    if hint in _WORDS:
        if type(value) is hint:
            return value
        raise TypeError
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        if type(value) in arguments:
            return value
        for argument in arguments:
            if accepts(argument, value):
                return convert(argument, value)
        raise TypeError
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in arguments):
            return value
        raise TypeError
    if origin is tuple and isinstance(value, tuple | list):
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(convert(arguments[0], item) for item in value)
        if len(arguments) != len(value):
            raise TypeError
        return tuple(convert(argument, item) for argument, item in zip(arguments, value, strict=True))
    if origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {convert(arguments[0], key): convert(arguments[1], item) for key, item in value.items()}
    if isinstance(hint, type) and isinstance(value, hint):
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping):
        fields = hints(hint)
        if not value.keys() <= fields.keys():
            raise TypeError
        return hint(**{name: convert(fields[name], item) for name, item in value.items()})
    raise TypeError


def describe(hint: Any) -> str:
    """Describes the values that a field of this type accepts, in words that fit after "it must be"."""
    if hint in _WORDS:
        return _WORDS[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return f"a tuple, each item {describe(arguments[0])}"
    if origin is tuple:
        return "a tuple of " + ", ".join(describe(argument) for argument in arguments)
    if origin is not None and issubclass(origin, Mapping):
        return f"a dict from {describe(arguments[0])} to {describe(arguments[1])}"
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return f"a dict of {', '.join(hints(hint))}"
    return getattr(hint, "__name__", str(hint))
