"""Parses the settings of a generated trace from text, such as `rate=5,count=1000`."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, TypeVar

Config = TypeVar("Config")


def parsed(what: str, base: Config, text: str) -> Config:
    """Returns a configuration with the fields that "NAME=VALUE,NAME=VALUE" sets; "" changes none.

    Args:
        what: kind of trace, for errors.
        base: A frozen dataclass whose fields are of type int, float or str.

    Raises:
        ValueError: names what cannot be parsed.
    """
    types = typing.get_type_hints(type(base))
    options: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        name, equals, value = item.partition("=")
        if not equals or name not in types:
            raise ValueError(f"{what} trace {item!r}: it must be NAME=VALUE with NAME one of {', '.join(types)}")
        try:
            options[name] = types[name](value)
        except ValueError as error:
            raise ValueError(f"{what} {name} is {value!r}; it must be of type {types[name].__name__}") from error
    return dataclasses.replace(base, **options)  # pyright: ignore[reportArgumentType]
