"""Refuses unknown keyword arguments of dataclasses, naming the field that was probably meant. Standard library only."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, TypeVar

from jaxserve.config.checks import did_you_mean
from jaxserve.config.shown import shown

T = TypeVar("T")


class UnknownFieldError(TypeError, ValueError):
    """Names a field that does not exist: a TypeError, as for any unknown keyword, and a ValueError, as all errors of a
    request are.
    """


def refuses_unknown_keywords(cls: type[T]) -> type[T]:
    """Decorates a dataclass so that a keyword which is none of its fields raises UnknownFieldError."""
    init = cls.__init__
    known = frozenset(field.name for field in dataclasses.fields(cls) if field.init)  # pyright: ignore[reportArgumentType]

    @functools.wraps(init)
    def checked_init(self: T, *values: Any, **given: Any) -> None:
        for name in given:
            if name not in known:
                raise UnknownFieldError(f"{cls.__name__} has no field {shown(name)}; {did_you_mean(name, known)}")
        init(self, *values, **given)

    cls.__init__ = checked_init
    return cls
