"""Dequantizes matrices of experts that a checkpoint holds in MXFP4, as gpt-oss is published.

A number is 4 bits wide (E2M1: sign, two bits of exponent, one of mantissa), and 32 that follow each other along the
contracted axis share a scale, an exponent of 2 that is stored with 127 added (E8M0). Source: OCP Microscaling Formats
(MX) Specification 1.0, sections 5.2, 5.3.3 and 5.4.1. `NAME_blocks` uint8 [E, N, K / 32, 16] has two numbers in a byte,
the first in the lower half; `NAME_scales` is uint8 [E, N, K / 32]. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxserve.models.loading.safetensors_file import StoredTensor

BLOCK = 32
"""Numbers that share a scale."""

_MAGNITUDES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_NUMBERS = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
_PAIRS = np.stack([_NUMBERS[np.arange(256) % 16], _NUMBERS[np.arange(256) // 16]], axis=1)
"""Both numbers of each byte."""
_FACTORS = np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))
"""The factor of each scale; the last one is no number."""


def dequantized(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns the numbers of blocks: float32 [..., G * 32], which bfloat16 holds as they are.

    Args:
        blocks: uint8 [..., G, 16].
        scales: uint8 [..., G].
    """
    numbers = _PAIRS[blocks].reshape(*scales.shape, BLOCK)
    with np.errstate(over="ignore"):  # infinity, which the format has not, is no worse than what does not fit
        numbers *= _FACTORS[scales][..., None]
    return numbers.reshape(*scales.shape[:-1], -1)


@dataclasses.dataclass(frozen=True)
class MXFP4Tensor:
    """Stands for the tensor [E, K, N] that blocks and scales hold; numbers are computed when they are asked for.

    Attributes:
        name: of the tensor that is not stored.
        blocks: see above.
        scales: see above.
    """

    name: str
    blocks: StoredTensor
    scales: StoredTensor

    dtype = "BF16"

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The stored tensors."""
        return self.blocks, self.scales

    @property
    def path(self) -> pathlib.Path:
        """File of the blocks."""
        return self.blocks.path

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the numbers, transposed as models have them that are not quantized."""
        experts, rows, blocks, _ = self.blocks.shape
        return experts, blocks * BLOCK, rows

    def values(self, source: Any, shape: tuple[int, ...]) -> np.ndarray:
        """Returns the numbers of an expert that a `Source` takes, float32 of a shape."""
        first, step = source.every or (0, 1)
        blocks, scales = (part.view(source.item)[first::step] for part in self.parts)
        return dequantized(blocks, scales).reshape(shape)


def find(tensors: Mapping[str, StoredTensor], name: str) -> MXFP4Tensor | None:
    """Returns what stands for a tensor that is stored in MXFP4; None where it is not.

    Raises ValueError, one line, where a part is missing, or is malformed.
    """
    blocks, scales = (tensors.get(f"{name}_{part}") for part in ("blocks", "scales"))
    if blocks is None and scales is None:
        return None
    if blocks is None or scales is None:
        have, lack = ("scales", "blocks") if blocks is None else ("blocks", "scales")
        path = (blocks or scales or tensors[name]).path
        raise ValueError(f"checkpoint file {path}: tensor {name}_{have} needs {name}_{lack}, which is in no file")
    for tensor in (blocks, scales):
        if tensor.dtype != "U8":
            raise ValueError(f"checkpoint file {tensor.path}: tensor {tensor.name} has dtype {tensor.dtype}, not U8")
    if len(blocks.shape) != 4 or blocks.shape[3] != BLOCK // 2 or scales.shape != blocks.shape[:3]:
        raise ValueError(
            f"checkpoint file {blocks.path}: tensors {blocks.name} and {scales.name} have shapes "
            f"{list(blocks.shape)} and {list(scales.shape)}; they must be [E, N, K / {BLOCK}, {BLOCK // 2}] and "
            f"[E, N, K / {BLOCK}]"
        )
    return MXFP4Tensor(name, blocks, scales)
