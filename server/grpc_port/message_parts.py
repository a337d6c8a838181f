"""Makes a message of one large field out of parts.

Serializing a million token ids is one call, which holds the interpreter lock for 30 ms. So the field is serialized part
by part; what is joined in the end is exactly the message that one call would have made.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.serving.grpc_port.oversized import fields


def value_of(message: bytes) -> bytes:
    """Returns the value of the only field, of bytes, of a serialized message; of a message without fields b""."""
    return b"".join(message[start:end] for _, start, end in fields(message))


def of_one_field(number: int, parts: Sequence[bytes]) -> bytes:
    """Returns the serialized message whose only field has this number, and as its value the parts in order.

    A field without content is left out, as of every field without presence.
    """
    size = sum(map(len, parts))
    return b"".join([_varint(number << 3 | 2), _varint(size), *parts]) if size else b""


def _varint(value: int) -> bytes:
    digits = []
    while value >= 0x80:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*digits, value])
