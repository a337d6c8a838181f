"""Reads and makes messages of one large field without holding the interpreter lock for long.

Serializing a million token ids is one call, which holds the lock for 30 ms. So the field is serialized part by part;
what is joined in the end is exactly the message that one call would have made. Reading so many from a message, one
Python number after another, takes 70 ms in which a processor is kept from an engine; numpy reads what is serialized.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxserve.serving.grpc_port.oversized import fields

_BLOCK = 64 * 1024
"""Bytes whose numbers are read at one time, which stay in a processor's cache."""


def value_of(message: bytes) -> bytes:
    """Returns the value of the only field, of bytes, of a serialized message; of a message without fields b""."""
    return b"".join(message[start:end] for _, start, end in fields(message))


def numbers_of(packed: bytes) -> np.ndarray:
    """Returns the numbers of a packed field of type int32, as protobuf serializes it: [numbers] int32."""
    data, found, start = np.frombuffer(packed, np.uint8), [np.zeros(0, np.uint32)], 0
    while start < len(data):
        block = data[start : start + _BLOCK]
        # A number has ten bytes at most, and the highest bit of its last byte alone is clear.
        block = block[: len(block) - int(np.argmax(block[:-12:-1] < 0x80))]
        found.append(_numbers_of_block(block))
        start += len(block)
    return np.concatenate(found).view(np.int32)


def _numbers_of_block(data: np.ndarray) -> np.ndarray:
    """Returns the numbers whose bytes these are, modulo 2^32: [numbers] uint32. data: [bytes] uint8."""
    ends = np.flatnonzero(data < 0x80)
    starts = np.concatenate([[0], ends[:-1] + 1])
    found = (data[starts] & 0x7F).astype(np.uint32)
    for place in range(1, 5):  # what further bytes hold is beyond 32 bits
        longer = np.flatnonzero(ends - starts >= place)
        if not len(longer):
            break
        found[longer] |= (data[starts[longer] + place] & 0x7F).astype(np.uint32) << np.uint32(7 * place)
    return found


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
