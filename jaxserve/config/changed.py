"""Finds the settings of a configuration that differ from their defaults. Standard library only."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any


def changed_settings(config: Any) -> Iterator[str]:
    """Yields `CLASS.FIELD = VALUE` for each field that differs from the default of its class, nested ones included.

    Args:
        config: a dataclass whose fields are values or dataclasses in turn. A field without a default always differs.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from changed_settings(value)
        elif value != _default(field):
            yield f"{type(config).__name__}.{field.name} = {value!r}"


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
