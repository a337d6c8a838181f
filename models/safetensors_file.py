"""Reading safetensors files lazily: the header first, then each tensor as a view of the mapped file.

The format (https://github.com/huggingface/safetensors#format): 8 bytes of little-endian header length, a JSON header
naming dtype, shape and byte range of each tensor, then the bytes. It is read here rather than by the safetensors
package because that package's numpy interface has no bfloat16 and copies every tensor it returns.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import struct
from typing import Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes of weights, by their names in the format; tensors of others are listed but cannot be read."""

MAX_HEADER_BYTES = 100_000_000  # the limit of the format


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its dtype as the format names it, its shape, and where its bytes begin in the file."""

    name: str
    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def view(self) -> np.ndarray:
        """The tensor, read-only. Its pages are read when they are touched and unmapped when the view is dropped."""
        return np.memmap(self.path, dtype=DTYPES[self.dtype], mode="r", offset=self.offset, shape=self.shape)


def read_header(path: pathlib.Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name. A missing, truncated or malformed file is a ValueError of one line."""
    if not path.is_file():
        raise ValueError(f"checkpoint file {path} is missing")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ValueError(f"checkpoint file {path} is truncated: {size} bytes are no safetensors header")
        (length,) = struct.unpack("<Q", prefix)
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"checkpoint file {path} is not safetensors: its header would be {length} bytes long")
        if 8 + length > size:
            raise ValueError(f"checkpoint file {path} is truncated: {size} bytes, its header needs {8 + length}")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise ValueError(f"checkpoint file {path} is not safetensors: header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise ValueError(f"checkpoint file {path} is not safetensors: its header is not an object")
    header.pop("__metadata__", None)
    return {name: _entry(path, name, fields, 8 + length, size) for name, fields in header.items()}


def _entry(path: pathlib.Path, name: str, fields: Any, data: int, size: int) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        numbers = (*shape, begin, end)
        if not isinstance(dtype, str) or not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError("a dtype is a name; sizes and offsets are whole numbers from 0")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"checkpoint file {path} is not safetensors: malformed header of tensor {name}") from error
    if data + end > size:
        raise ValueError(f"checkpoint file {path} is truncated: {size} bytes, tensor {name} ends at {data + end}")
    if dtype in DTYPES and end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(
            f"checkpoint file {path} is not safetensors: tensor {name} has {end - begin} bytes, which dtype {dtype} "
            f"and shape {list(shape)} do not fill"
        )
    return StoredTensor(name, path, dtype, shape, data + begin)
