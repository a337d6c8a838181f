"""Checks fields of OpenAI's bodies, for all that parse them."""

from __future__ import annotations

import json
from collections.abc import Sequence, Set
from typing import Any

from jaxserve.config.checks import did_you_mean
from jaxserve.config.shown import shown


def hint(name: str, known: Set[str]) -> str:
    """Returns what an unknown field was probably meant to be, or all that is known."""
    return did_you_mean(name, known)


def check_text(name: str, value: Any) -> None:
    """Raises ValueError unless the value is text."""
    if not isinstance(value, str):
        raise ValueError(f"{name} is {shown(value)}; it must be text")


def check_neutral(name: str, value: Any, neutral: Sequence[Any]) -> None:
    """Raises ValueError unless the value is one of the neutral ones."""
    if not any(_is_same(value, one) for one in neutral):
        words = " or ".join(json.dumps(one) for one in neutral) or "null"
        raise ValueError(f"{name} is {shown(value)}; only {words} is supported")


def _is_same(value: Any, neutral: Any) -> bool:
    """Returns whether a value means the same as `neutral`; fields of an object may be absent or null."""
    if isinstance(value, dict) and isinstance(neutral, dict):
        return all(part is None or (name in neutral and _is_same(part, neutral[name])) for name, part in value.items())
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def checked_flag(name: str, value: Any) -> bool:
    """Returns the value. Raises ValueError unless it is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {shown(value)}; it must be true or false")
    return value


def checked_object(name: str, value: Any) -> dict[str, Any]:
    """Returns the value. Raises ValueError unless it is an object."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {shown(value)}; it must be an object")
    return value
