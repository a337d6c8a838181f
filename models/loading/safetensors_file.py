"""Reads safetensors files lazily: the header first, then each tensor as a view of the mapped file.

The format (https://github.com/huggingface/safetensors#format): 8 bytes of little-endian header length, a JSON header
naming dtype, shape and byte range of each tensor, then the bytes. It is read here rather than by the safetensors
package because that package's numpy interface has no bfloat16 and copies every tensor it returns.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import struct
from collections.abc import Iterable
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jaxserve.models.loading.json_files import parse

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""Supported dtypes of weights by their names in the format; other tensors are listed but not served as they are."""

NUMBERS: dict[str, np.dtype] = {
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
"""Dtypes of the parts of quantized weights."""

_READ = DTYPES | NUMBERS
_ITEM_BYTES = {name: dtype.itemsize for name, dtype in _READ.items()}

MAX_HEADER_BYTES = 100_000_000  # the limit of the format

_BLOCK = 4 * 1024 * 1024
"""Number of elements that `same_values` compares at a time."""


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Locates a tensor in a file: its dtype as named in the format, its shape, and the offset of its bytes."""

    name: str
    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def view(self, item: int | None = None) -> np.ndarray:
        """Returns the tensor as a read-only view, or what it holds at an index of its first axis.

        Its pages are read when they are touched and unmapped when the view is dropped.
        """
        whole = np.memmap(self.path, dtype=_READ[self.dtype], mode="r", offset=self.offset, shape=self.shape)
        return whole if item is None else whole[item]

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The tensor itself; what stands for a tensor that is not stored as such has several parts."""
        return (self,)

    def values(self, source: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Returns what a `jaxserve.models.layers.parameter.Source` takes of the tensor, in a shape."""
        return source.values(self.view(source.item), shape)


def stored_bytes(tensor: StoredTensor) -> int:
    """Returns the bytes of a tensor in its file."""
    return math.prod(tensor.shape) * _ITEM_BYTES[tensor.dtype]


def read_header(path: pathlib.Path) -> dict[str, StoredTensor]:
    """Reads the tensors of a file by name, from the header alone.

    Raises ValueError, one line that names the file, where it is missing, unreadable, truncated or malformed.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint file {path} {'is no regular file' if path.exists() else 'is missing'}")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            text = _header(path, file, size)
    except OSError as error:
        raise ValueError(f"checkpoint file {path} cannot be read: {error.strerror}") from error
    try:
        header = parse(text)
    except ValueError as error:
        raise ValueError(f"checkpoint file {path} is not safetensors: header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"checkpoint file {path} is not safetensors: its header is not an object")
    header.pop("__metadata__", None)
    found = [_entry(path, name, fields, 8 + len(text), size) for name, fields in header.items()]
    _check_apart(path, found)
    return {tensor.name: tensor for tensor, _ in found}


def same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Returns whether two tensors of a dtype in `DTYPES` have the same shape and values.

    Reads both in blocks, up to the first difference; equal tensors of one dtype may hold NaN.
    """
    if one.shape != other.shape:
        return False
    dtypes = [DTYPES[tensor.dtype] for tensor in (one, other)]
    with one.path.open("rb") as first, other.path.open("rb") as second:
        for file, tensor in ((first, one), (second, other)):
            file.seek(tensor.offset)
        left = math.prod(one.shape)
        while left:
            count = min(_BLOCK, left)
            blocks = [file.read(count * dtype.itemsize) for file, dtype in zip((first, second), dtypes, strict=True)]
            if dtypes[0] == dtypes[1]:
                same = blocks[0] == blocks[1]
            else:
                # float64 holds every number of every other dtype.
                values = [np.frombuffer(block, dtype) for block, dtype in zip(blocks, dtypes, strict=True)]
                same = np.array_equal(values[0].astype(np.float64), values[1].astype(np.float64))
            if not same:
                return False
            left -= count
    return True


def _header(path: pathlib.Path, file: BinaryIO, size: int) -> bytes:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise ValueError(f"checkpoint file {path} is truncated: {size} bytes are no safetensors header")
    (length,) = struct.unpack("<Q", prefix)
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"checkpoint file {path} is not safetensors: its header would be {length} bytes long")
    if 8 + length > size:
        raise ValueError(f"checkpoint file {path} is truncated: {size} bytes, its header needs {8 + length}")
    return file.read(length)


def _entry(path: pathlib.Path, name: str, fields: Any, data: int, size: int) -> tuple[StoredTensor, int]:
    """Parses one header entry: the tensor and the offset of its end in the file."""
    try:
        dtype, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        if not isinstance(dtype, str) or not all(
            type(number) is int and number >= 0 for number in (*shape, begin, end)
        ):
            raise ValueError("a dtype is a name; sizes and offsets are whole numbers from 0")
        if begin > end:
            raise ValueError("it ends before it begins")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint file {path} is not safetensors: malformed header of tensor {name}") from error
    if data + end > size:
        raise ValueError(f"checkpoint file {path} is truncated: {size} bytes, tensor {name} ends at {data + end}")
    if dtype in _ITEM_BYTES and end - begin != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise ValueError(
            f"checkpoint file {path} is not safetensors: tensor {name} has {end - begin} bytes, which dtype {dtype} "
            f"and shape {list(shape)} do not fill"
        )
    return StoredTensor(name, path, dtype, shape, data + begin), data + end


def _check_apart(path: pathlib.Path, found: Iterable[tuple[StoredTensor, int]]) -> None:
    """Raises ValueError where two tensors share bytes."""
    last, reached = "", 0
    for tensor, end in sorted(found, key=lambda item: (item[0].offset, item[1])):
        if tensor.offset < reached and end > tensor.offset:
            raise ValueError(f"checkpoint file {path} is not safetensors: tensors {last} and {tensor.name} overlap")
        if end > reached:
            last, reached = tensor.name, end
