"""Parses JSON bodies without holding the interpreter for long.

A decoder is one call that holds the interpreter lock: a text of 4 MB takes milliseconds, and a million empty lists
half a second. So the structure of a large body is counted first, in steps, and one that is more than any request needs
is refused; what remains decodes in milliseconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from jaxserve.config.shown import clipped
from jaxserve.frontend.preparation_steps import Steps

T = TypeVar("T")

LARGE = 64 * 1024
"""Bytes from which a body is counted first; a smaller one decodes in two milliseconds, whatever it is."""

_LIMITS = {"containers": 8 * 1024, "texts": 32 * 1024, "commas": 512 * 1024}
"""Maximum numbers in a large body: of objects and lists, of texts (each name is one), and of commas, which divide token
ids."""

_PIECE = 64 * 1024
_MOST_PER_ITEM = 6
"""Bytes of JSON that one byte of text takes at most, as in \\u0041."""


@dataclasses.dataclass
class Structure:
    """Counts what a body in JSON consists of. longest_text: bytes that its longest text stands for, at least. data: the
    body.
    """

    containers: int = 0
    texts: int = 0
    commas: int = 0
    longest_text: int = 0
    data: bytes = b""


def parse_steps(
    data: bytes, parse: Callable[[dict[str, Any]], T], check: Callable[[Structure], None] | None = None
) -> Steps[T]:
    """Decodes a body, which must be an object, and parses it, in steps.

    Args:
        data: the body.
        parse: takes the decoded object; raises ValueError.
        check: raises ValueError for the structure of a large body that is refused whatever it says.

    Raises:
        ValueError: the body is no JSON object, or is nested or divided beyond measure; and what `parse` raises.
    """
    if len(data) > LARGE:
        structure = yield from _count_steps(data)
        if check is not None:
            check(structure)
        yield 0
    return parse(decode(data))


def decode(data: bytes) -> dict[str, Any]:
    """Decodes a body. Raises ValueError in one line, unless it is an object."""
    try:
        body = msgspec.json.decode(data)
    except RecursionError:
        raise ValueError("the body is no JSON that can be read: it is nested too deep") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"the body is no JSON: {clipped(str(error), 200)}") from None
    if not isinstance(body, dict):
        raise ValueError(f"the body is {_kind(body)}; it must be a JSON object")
    return body


def _count_steps(data: bytes) -> Steps[Structure]:
    found, inside, start, text = Structure(data=data), False, 0, 0
    while start < len(data):
        yield 0
        end = start + _PIECE
        piece = data[start:end]
        if end < len(data):  # what escapes the next byte stays with it
            backslashes = len(piece) - len(piece.rstrip(b"\\"))
            piece = piece[: len(piece) - backslashes % 2]
        start += len(piece)
        parts = piece.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        outside = b"".join(parts[1 if inside else 0 :: 2])
        found.containers += outside.count(b"[") + outside.count(b"{")
        found.commas += outside.count(b",")
        found.texts += len(parts) // 2
        _check_counts(found)
        for index in range(0 if inside else 1, len(parts), 2):
            text = (text if index == 0 else 0) + _least_bytes(parts[index])
            found.longest_text = max(found.longest_text, text)
        inside ^= len(parts) % 2 == 0
        if not inside:
            text = 0
    return found


def _check_counts(found: Structure) -> None:
    for name, most in _LIMITS.items():
        if getattr(found, name) > most:
            words = "objects and lists" if name == "containers" else name
            raise ValueError(
                f"the body has more than {most} {words}, and over {LARGE} bytes; such a body is refused: divide the "
                "request"
            )


def _least_bytes(text: bytes) -> int:
    """Returns the fewest bytes that a part of a text in JSON stands for."""
    return max(0, len(text) - (_MOST_PER_ITEM - 1) * text.count(b"\\"))


def _kind(value: Any) -> str:
    words = {list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return words.get(type(value), "a number")
