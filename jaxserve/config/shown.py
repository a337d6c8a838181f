"""Formats values that a client sent for messages: short, whatever was sent. Standard library only."""

from __future__ import annotations

import reprlib

_MAX_CHARACTERS = 80


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = _MAX_CHARACTERS
        self.maxlevel = 2
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 4

    def repr_int(self, x: int, level: int) -> str:
        """Prints integers of at most 64 bits in full, and only the size of larger ones: Python refuses to print
        thousands of digits."""
        return repr(x) if x.bit_length() <= 64 else f"a whole number of {x.bit_length()} bits"

    def repr_dict(self, x: dict, level: int) -> str:
        """Prints few keys, in their own order: sorting would read all of them."""
        few = dict(list(zip(x, x.values(), strict=True))[: self.maxdict + 1]) if len(x) <= 64 else {}
        return super().repr_dict(few, level) if few or not x else f"an object of {len(x)} keys"


def shown(value: object) -> str:
    """Returns the value as `repr` gives it, cut in the middle if it is long. Takes no longer for a long value."""
    return clipped(_Short().repr(value), 2 * _MAX_CHARACTERS)


def shown_seconds(seconds: float) -> str:
    """Formats a time span to the millisecond, and one beyond 1e9 seconds to three digits."""
    return f"{seconds:.3f} s" if abs(seconds) < 1e9 else f"{seconds:.3g} s"


def clipped(text: str, limit: int) -> str:
    """Cuts the text in the middle to `limit` characters."""
    if len(text) <= limit:
        return text
    half = (limit - 5) // 2
    return f"{text[:half]} ... {text[-half:]}"
