"""The bytes inside a serialized XLA executable: a Riegeli record file, compressed with Snappy.

Formats: https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md and
https://github.com/google/snappy/blob/main/format_description.txt. Only what XLA writes is read: simple chunks, without
compression or with Snappy. The executable's messages are not parsed, the caller finds what it looks for in them.
"""

from __future__ import annotations

import struct

_SIGNATURE = bytes.fromhex("83af70d10d884a3f") + bytes(8) + (64).to_bytes(8, "little")
"""The hash of the header of a file's first block, and its two distances."""

_CHUNKS = "sr"
_MOST_RECORDS = 1 << 32
_BLOCK = 1 << 16
_BLOCK_HEADER = 24
_CHUNK_HEADER = struct.Struct("<QQQQQ")  # header hash, data size, data hash, chunk type and records, decoded size


class UnreadableError(ValueError):
    """Bytes that are not in the format that this module knows."""


def contents(serialized: bytes) -> bytes:
    """All that a serialized executable holds, decompressed and in order; record files within records too.

    serialized: what an executable's `serialize()` returned. One that holds no record file is returned as it is.
    Raises UnreadableError where a chunk is of a kind that XLA does not write today, or damaged.
    """
    start = serialized.find(_SIGNATURE)
    if start < 0:
        return serialized
    file = memoryview(serialized)[start:]
    parts: list[bytes] = [serialized[:start]]
    place = 0
    while place + _BLOCK_HEADER + _CHUNK_HEADER.size < len(file):
        header, after = _read(file, place, _CHUNK_HEADER.size)
        _, size, _, kind, _ = _CHUNK_HEADER.unpack(header)
        if after + size > len(file):
            if chr(kind & 0xFF) in _CHUNKS and kind >> 8 <= _MOST_RECORDS:
                raise UnreadableError(f"executable ends at byte {len(file)}; a chunk goes on to byte {after + size}")
            break  # no chunk, but what follows the record file in its message
        data, place = _read(file, after, size)
        match chr(kind & 0xFF):
            case "s":  # the file's signature
                continue
            case "r":
                parts.append(contents(_records(data)))
            case other:
                raise UnreadableError(f"executable holds a chunk of kind {other!r}; 's' and 'r' are known")
    return b"".join([*parts, bytes(file[place:])])


def _read(file: memoryview, place: int, size: int) -> tuple[bytes, int]:
    """`size` bytes from `place` on, without the headers that stand at every block's start; and the place after them."""
    parts: list[bytes] = []
    while size:
        if place % _BLOCK == 0:
            place += _BLOCK_HEADER
        end = min(place + size, (place // _BLOCK + 1) * _BLOCK)
        part = bytes(file[place:end])
        if len(part) < end - place:
            raise UnreadableError(f"executable ends at byte {len(file)}; {end - len(file)} more were announced")
        parts.append(part)
        size -= len(part)
        place = end
    return b"".join(parts), place


def _records(chunk: bytes) -> bytes:
    """The records of a simple chunk, one after another."""
    compression = chunk[:1]
    if compression not in (b"\0", b"s"):
        raise UnreadableError(f"executable is compressed in way {compression!r}; Snappy ('s') is known")
    sizes, place = _varint(chunk, 1)
    values = chunk[place + sizes :]
    if compression == b"\0":
        return values
    length, place = _varint(values, 0)
    records = snappy(values[place:])
    if len(records) != length:
        raise UnreadableError(f"executable's records have {len(records)} bytes; {length} were announced")
    return records


def snappy(data: bytes) -> bytes:
    """Decompresses one block in Snappy's format. Raises UnreadableError where it is damaged."""
    length, place = _varint(data, 0)
    out = bytearray()
    try:
        while place < len(data):
            tag = data[place]
            place += 1
            kind = tag & 3
            if kind == 0:
                size = (tag >> 2) + 1
                if size > 60:
                    extra = size - 60
                    size = int.from_bytes(data[place : place + extra], "little") + 1
                    place += extra
                out += data[place : place + size]
                place += size
                continue
            if kind == 1:
                size = (tag >> 2 & 7) + 4
                offset = (tag >> 5) << 8 | data[place]
                place += 1
            else:
                size = (tag >> 2) + 1
                width = 2 if kind == 2 else 4
                offset = int.from_bytes(data[place : place + width], "little")
                place += width
            start = len(out) - offset
            if start < 0 or not offset:
                raise UnreadableError(f"executable cannot be decompressed: a copy from {offset} bytes before its start")
            if offset >= size:
                out += out[start : start + size]
            else:  # the copy reads what it has just written
                pattern = bytes(out[start:])
                out += (pattern * (size // offset + 1))[:size]
    except IndexError as error:
        raise UnreadableError("executable cannot be decompressed: it ends within an element") from error
    if len(out) != length:
        raise UnreadableError(f"executable cannot be decompressed: {len(out)} bytes where {length} were announced")
    return bytes(out)


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if place >= len(data):
            raise UnreadableError("executable cannot be read: it ends within a number")
        byte = data[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
