"""Reads the JSON files of a checkpoint; each unreadable one raises a one-line error."""

from __future__ import annotations

import json
import pathlib
from typing import Any


def read_object(path: pathlib.Path, *, contradictions: bool = False) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    contradictions: a key may stand in it twice with different values; the last one counts.

    Raises ValueError, one line that names the file, where it is missing, unreadable, no JSON or no object, or
    contradicts itself.
    """
    if not path.is_file():
        state = "is no regular file" if path.exists() else "is missing"
        raise ValueError(f"model file {path} {state}")
    try:
        content = parse(path.read_bytes(), contradictions=contradictions)
    except OSError as error:
        raise ValueError(f"model file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"model file {path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"model file {path} holds a {type(content).__name__}; it must hold an object")
    return content


def parse(text: bytes, *, contradictions: bool = False) -> Any:
    """Parses JSON as `json.loads` does; every fault is a ValueError, and so is a key with two values."""
    try:
        return json.loads(text, object_pairs_hook=None if contradictions else _without_contradictions)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _without_contradictions(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        for name, value in pairs:
            if value != content[name]:
                raise ValueError(f"key {name!r} stands in it twice, with different values")
    return content
