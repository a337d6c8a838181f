"""Quantizes plain weights while they are loaded, symmetrically and to the nearest number. Imports no jax."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from jaxserve.models.quantization import Scheme

LARGEST = {"fp8": 448.0, "int8": 127.0, "int4": 7.0}
"""Magnitude that the largest weight of each scale becomes."""

_ROWS_BYTES = 8 * 1024 * 1024
"""Bytes of float32 that are quantized at a time."""


def quantized(weights: np.ndarray, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    """Quantizes rows of weights.

    Args:
        weights: [N, K], of any floating dtype.
        scheme: without zeros and act order.

    Returns:
        (numbers as `jaxserve.models.layers.quantized` stores them, [N, K] or [N, K / 2]; scales float32 [N, groups]).
    """
    rows, length = weights.shape
    groups = 1 if scheme.group is None else length // scheme.group
    kinds = {"fp8": ml_dtypes.float8_e4m3fn, "int8": np.int8, "int4": np.uint8}
    stored = np.empty((rows, length // 2 if scheme.kind == "int4" else length), kinds[scheme.kind])
    scales = np.empty((rows, groups), np.float32)
    step = max(1, _ROWS_BYTES // (4 * length))
    for first in range(0, rows, step):
        block = np.asarray(weights[first : first + step], np.float32)
        parts = block.reshape(len(block), groups, -1)
        scale = np.abs(parts).max(axis=2) / np.float32(LARGEST[scheme.kind])
        scale[scale == 0] = 1
        numbers = (parts / scale[..., None]).reshape(block.shape)
        scales[first : first + step] = scale
        stored[first : first + step] = _stored(numbers, scheme.kind)
    return stored, scales


def _stored(numbers: np.ndarray, kind: str) -> np.ndarray:
    """Rounds numbers and returns them as they are stored."""
    if kind == "fp8":
        return np.clip(numbers, -LARGEST[kind], LARGEST[kind]).astype(ml_dtypes.float8_e4m3fn)
    whole = np.rint(numbers)
    if kind == "int8":
        return whole.astype(np.int8)
    return in_pairs((whole + 8).astype(np.uint8))


def in_pairs(numbers: np.ndarray) -> np.ndarray:
    """Returns numbers from 0 to 15, uint8 [N, K], two in a byte: [N, K / 2]."""
    return numbers[:, 0::2] | (numbers[:, 1::2] << 4)
