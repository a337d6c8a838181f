"""Defines the metadata of sampling parameters beside name, type and default, and derives from it.

The table itself is the fields of `jaxserve.sampling_params.SamplingParams`: each carries the metadata that `sampling`
makes.
Validation, the device's slots, the layout and packing of admitted requests, the wire's conversion, the command line's
options and docs/sampling.md all read it there, so that a new parameter is one more field. Standard library only.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jaxserve.config.shown import shown

MAX_INT32 = 2**31 - 1

_KEY = "sampling"


class Kind(Protocol):
    """Defines the values that a parameter accepts."""

    def checked(self, name: str, value: Any) -> Any:
        """Returns the value in the form in which it is stored. Raises ValueError naming the parameter, the value and
        the limit."""
        ...

    @property
    def limits(self) -> str:
        """Describes the accepted values in a few words."""
        ...


@dataclasses.dataclass(frozen=True)
class Number:
    """Accepts a finite number from low to high; open_low excludes low itself."""

    low: float
    high: float
    open_low: bool = False

    def checked(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} is {shown(value)}; it must be a number")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name} is {shown(value)}; it must be a finite number")
        _check_digits(name, value, self.high)
        if not (self.low < value if self.open_low else self.low <= value) or value > self.high:
            least = f"{'above' if self.open_low else 'at least'} {self.low:g}"
            raise ValueError(f"{name} is {value}; it must be {least} and at most {self.high:g}")
        return value

    @property
    def limits(self) -> str:
        return f"{'above' if self.open_low else 'from'} {self.low:g} to {self.high:g}"


@dataclasses.dataclass(frozen=True)
class Whole:
    """Accepts a whole number from low to high; without: those of them that it refuses all the same."""

    low: int
    high: int
    without: tuple[int, ...] = ()

    def checked(self, name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} is {shown(value)}; it must be a whole number")
        _check_digits(name, value, self.high)
        if not self.low <= value <= self.high or value in self.without:
            raise ValueError(f"{name} is {value}; it must be from {self.low} to {self.high}{self._exception}")
        return value

    @property
    def limits(self) -> str:
        bits = (self.high + 1).bit_length() - 1
        high = f"2^{bits} - 1" if self.high + 1 == 1 << bits else str(self.high)
        low = f"-2^{bits}" if self.low == -1 << bits else str(self.low)
        return f"whole numbers from {low} to {high}{self._exception}"

    @property
    def _exception(self) -> str:
        return f", and not {' or '.join(map(str, self.without))}" if self.without else ""


@dataclasses.dataclass(frozen=True)
class Flag:
    """Accepts true or false."""

    def checked(self, name: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError(f"{name} is {shown(value)}; it must be true or false")
        return value

    @property
    def limits(self) -> str:
        return "true or false"


@dataclasses.dataclass(frozen=True)
class OneOf:
    """Accepts a member of an enumeration, or its name in any case."""

    words: type[enum.Enum]

    def checked(self, name: str, value: Any) -> enum.Enum:
        if isinstance(value, self.words):
            return value
        found = self.words.__members__.get(value.upper()) if isinstance(value, str) else None
        if found is None:
            raise ValueError(f"{name} is {shown(value)}; it must be one of {self.limits}")
        return found

    @property
    def limits(self) -> str:
        return ", ".join(word_of(member) for member in self.words)


def word_of(member: enum.Enum) -> str:
    """Returns the word by which clients name a member of an enumeration."""
    return member.name.lower()


@dataclasses.dataclass(frozen=True)
class Texts:
    """Accepts at most max_items texts of 1 to max_length characters; a single text becomes a list of it, None an empty
    one."""

    max_items: int
    max_length: int

    def checked(self, name: str, value: Any) -> tuple[str, ...]:
        texts = (value,) if isinstance(value, str) else as_tuple(name, value, self.max_items, "strings")
        for text in texts:
            if not isinstance(text, str) or not text:
                raise ValueError(f"{name} has {shown(text)}; each {name} must be a string of at least one character")
            if len(text) > self.max_length:
                raise ValueError(
                    f"{name} has a string of {len(text)} characters; at most {self.max_length} are allowed"
                )
        return texts

    @property
    def limits(self) -> str:
        return f"at most {self.max_items} texts, each of 1 to {self.max_length} characters"


@dataclasses.dataclass(frozen=True)
class Ids:
    """Accepts at most max_items token ids; None means none. least_items: the fewest of a list that is given at all."""

    max_items: int
    least_items: int = 0

    def checked(self, name: str, value: Any) -> tuple[int, ...]:
        ids = as_tuple(name, value, self.max_items, "ids")
        if len(ids) < self.least_items:
            raise ValueError(f"{name} has {len(ids)} ids; it must have at least {self.least_items}, or be left out")
        if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) <= MAX_INT32:  # a long list, without a loop
            return ids
        each = Whole(0, MAX_INT32)
        for token_id in ids:
            each.checked(name, token_id)
        return ids

    @property
    def limits(self) -> str:
        return (
            f"{self.least_items} to {self.max_items} token ids"
            if self.least_items
            else (f"at most {self.max_items} token ids")
        )


@dataclasses.dataclass(frozen=True)
class Biases:
    """Accepts numbers from low to high for at most max_items token ids: a mapping, whose keys may be decimal digits as
    JSON has them, or pairs. They become pairs (id, number), sorted by id; None means none."""

    max_items: int
    low: float
    high: float

    def checked(self, name: str, value: Any) -> tuple[tuple[int, float], ...]:
        if isinstance(value, Mapping):
            check_count(name, len(value), self.max_items, "ids")
            pairs: Sequence[Any] = list(value.items())
        else:
            pairs = as_tuple(name, value, self.max_items, "ids")
        each, number, found = Whole(0, MAX_INT32), Number(self.low, self.high), {}
        for pair in pairs:
            if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
                raise ValueError(f"{name} has {shown(pair)}; it must map token ids to numbers")
            token_id, bias = pair
            if isinstance(token_id, str) and token_id.isascii() and token_id.isdigit() and len(token_id) <= 10:
                token_id = int(token_id)
            token_id = each.checked(f"{name} id", token_id)
            if token_id in found:
                raise ValueError(f"{name} has the id {token_id} twice; give each id one number")
            found[token_id] = float(number.checked(f"{name}[{token_id}]", bias))
        return tuple(sorted(found.items()))

    @property
    def limits(self) -> str:
        return f"at most {self.max_items} token ids, each with a number from {self.low:g} to {self.high:g}"


@dataclasses.dataclass(frozen=True)
class SlotValue:
    """Describes how the device stores a parameter in each slot.

    dtype: int32, uint32 or float32. width: elements, where a slot has several; None is a scalar. idle: the value of
    elements that no request has set. least: a smaller value means the same, and becomes this one. apart: few requests
    set it and it is wide, so that a program of its own writes it for these requests alone; every admission writes how
    many elements count (`used`).
    """

    dtype: str
    width: int | None = None
    idle: float = 0
    least: int | None = None
    apart: bool = False

    def used(self, value: tuple[Any, ...] | None) -> int:
        """Returns how many elements a value takes; 0 where the slot has no room for them."""
        count = 0 if not value else len(value) * (2 if isinstance(value[0], tuple) else 1)
        return count if count <= (self.width or 1) else 0

    def elements(self, value: Any) -> Sequence[int]:
        """Returns the first elements of a slot that has several: those of a tuple, pairs (id, number) as id and
        float32 bits in turn, or a number in 32-bit words, high first."""
        if isinstance(value, tuple):
            if value and isinstance(value[0], tuple):
                return [word for token_id, number in value for word in (token_id, _float32_bits(number))]
            return value
        return [value >> 32 * word & 0xFFFFFFFF for word in reversed(range(self.width or 1))]


@dataclasses.dataclass(frozen=True)
class SamplingField:
    """Describes one row of the table. meaning: one sentence. slot: None for a parameter that only the host looks at."""

    name: str
    default: Any
    kind: Kind
    meaning: str
    slot: SlotValue | None

    def checked(self, value: Any) -> Any:
        """Returns the value as it is kept; None only where that is the default. Raises ValueError."""
        return None if value is None and self.default is None else self.kind.checked(self.name, value)

    def resolved(self, value: Any) -> Any:
        """Returns a checked value in the form that the engine uses."""
        if isinstance(self.kind, Number):
            return float(value)
        least = None if self.slot is None else self.slot.least
        return value if least is None else max(value, least)


def sampling(kind: Kind, meaning: str, slot: SlotValue | None = None) -> dict[str, Any]:
    """Makes the metadata of a field of the table; `SamplingField` documents the arguments."""
    return {_KEY: (kind, meaning, slot)}


@functools.cache
def fields_of(table: type) -> Mapping[str, SamplingField]:
    """Returns the rows of a dataclass whose fields have metadata of `sampling`, in order; other fields are no rows."""
    return {
        field.name: SamplingField(field.name, field.default, *field.metadata[_KEY])
        for field in dataclasses.fields(table)
        if _KEY in field.metadata
    }


def markdown_table(fields: Mapping[str, SamplingField]) -> list[str]:
    """Returns the lines of the table in Markdown, as in docs/sampling.md."""
    lines = ["| parameter | default | allowed | meaning |", "|---|---|---|---|"]
    for field in fields.values():
        default = "none" if field.default in (None, ()) else str(field.default).lower()
        lines.append(f"| `{field.name}` | {default} | {field.kind.limits} | {field.meaning} |")
    return lines


def _float32_bits(number: float) -> int:
    """Returns the bits of a number as float32, as int32."""
    return struct.unpack("<i", struct.pack("<f", number))[0]


def as_tuple(name: str, value: object, limit: int, things: str) -> tuple:
    """Converts a list, tuple or range of at most `limit` things to a tuple; None becomes empty. Raises ValueError."""
    if value is None:
        return ()
    if not isinstance(value, Sequence):
        raise ValueError(f"{name} is {shown(value)}; it must be a list")
    check_count(name, len(value), limit, things)
    return tuple(value)


def check_count(name: str, count: int, limit: int, things: str) -> None:
    """Bounds the number of items in a client's list, before any of them is checked."""
    if count > limit:
        raise ValueError(f"{name} has {count} {things}; at most {limit} are allowed")


def _check_digits(name: str, value: float, high: float) -> None:
    """Refuses whole numbers too long to be compared with a float or printed."""
    if isinstance(value, int) and value.bit_length() > 64:
        raise ValueError(f"{name} is a whole number of {value.bit_length()} bits; it must be at most {high:g}")
