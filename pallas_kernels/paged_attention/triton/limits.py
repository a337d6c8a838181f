"""What the Triton backend cannot do, and what is refused for it before a kernel is traced."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.paged_attention.pool import value_dtype
from jaxserve.pallas_kernels.paged_attention.triton.tuning import device_kind, serves

MAX_HEAD_DIM = 256
# Positions that a step of the attention kernels takes at least (see `tuning`). No test and no compilation covers
# smaller pages, which would be gathered in pieces too short to be read at the memory's speed.
MIN_PAGE_SIZE = 16
# The decode kernel packs a group into one tile.
MAX_GROUP_HEADS = 16
# Programs along the first axis of a grid.
MAX_TOKENS = 2**31 - 1

# Offsets are counted in elements. They are signed 32-bit integers as long as an array has no more than 2^32 bytes, and
# 64-bit ones above (`_compute_offsets_from_indices` in jax/_src/pallas/triton/lowering.py, jax 0.10.2 and 0.11.2).
# Elements of two bytes or more never come past 2^31 in the former case; those of one byte do.
MAX_32_BIT_OFFSETS = 2**31
MAX_32_BIT_BYTES = 2**32

# Casts from and to float8_e4m3fn need compute capability 8.9. These device kinds, or kinds that begin so, have less;
# for a device that is here, the device itself is asked.
_BEFORE_FLOAT8 = ("NVIDIA A100", "NVIDIA A30", "NVIDIA A10", "NVIDIA A10G", "NVIDIA A40", "Tesla V100", "Tesla T4")
_FLOAT8_CAPABILITY = (8, 9)


def check(pool: Any, num_tokens: int, group_heads: int | None) -> None:
    """Raises ValueError where the Triton kernels cannot take these.

    Args:
        pool: [num_pages, 2, K, page_size, D], an array or a ShapeDtypeStruct.
        num_tokens: T.
        group_heads: G; None where only keys and values matter.
    """
    page_size, head_dim = pool.shape[3:]
    if page_size < MIN_PAGE_SIZE:
        raise ValueError(
            f"page_size is {page_size}; the Triton kernels take at least {MIN_PAGE_SIZE}: raise it or choose 'xla'"
        )
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"head_dim is {head_dim}; the Triton kernels take at most {MAX_HEAD_DIM}")
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}; the Triton kernels take even ones")
    if group_heads is not None and group_heads > MAX_GROUP_HEADS:
        raise ValueError(
            f"there are {group_heads} query heads a key-value head; the Triton kernels take at most {MAX_GROUP_HEADS}"
        )
    if num_tokens > MAX_TOKENS:
        raise ValueError(
            f"there are {num_tokens} tokens; a grid has at most {MAX_TOKENS} programs along its first axis"
        )
    if value_dtype(pool.dtype) == jnp.float8_e4m3fn and not _takes_float8(device_kind()):
        raise ValueError(
            f"pool holds float8_e4m3fn; {device_kind()} has a compute capability below 8.9, which the casts need: "
            "use int8 or the model's dtype"
        )


def addressable(pool: Any) -> bool:
    """Whether the backend computes the right address of each element of `pool`, an array or a ShapeDtypeStruct.

    Not of pools of one-byte elements between 2^31 and 2^32 bytes. Attention then reads elements in pairs, which are
    addressed rightly, and XLA writes.
    """
    size = math.prod(pool.shape)
    return size <= MAX_32_BIT_OFFSETS or size * pool.dtype.itemsize > MAX_32_BIT_BYTES


def _takes_float8(kind: str) -> bool:
    if any(serves(name, kind) for name in _BEFORE_FLOAT8):
        return False
    if jax.default_backend() != "gpu" or jax.devices()[0].device_kind != kind:
        return True
    capability = str(getattr(jax.devices()[0], "compute_capability", "9.0"))
    return tuple(int(part) for part in capability.split(".")) >= _FLOAT8_CAPABILITY
