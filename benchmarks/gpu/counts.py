"""Bytes that attention must move and operations that it must do. Standard library only.

Each byte of keys and values is read once, queries are read and results written once. An operation is a multiplication
or an addition: 4 D for a query head and a position that it sees.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable


@dataclasses.dataclass(frozen=True)
class Heads:
    """K key-value heads, G query heads for each, of size D."""

    kv_heads: int = 8
    group: int = 4
    head_dim: int = 128

    @property
    def query_heads(self) -> int:
        return self.kv_heads * self.group


LLAMA_8B = Heads()
SMALL = Heads(kv_heads=2, group=2, head_dim=64)


def kv_bytes(heads: Heads, positions: int, itemsize: int) -> int:
    """Keys and values of `positions` positions."""
    return 2 * heads.kv_heads * heads.head_dim * itemsize * positions


def attention_bytes(heads: Heads, rows: Iterable[tuple[int, int]], itemsize: int, kv_itemsize: int) -> int:
    """Of an attention call over rows of (new tokens, length with them)."""
    rows = list(rows)
    tokens = sum(new for new, _ in rows)
    positions = sum(length for _, length in rows)
    return kv_bytes(heads, positions, kv_itemsize) + 2 * tokens * heads.query_heads * heads.head_dim * itemsize


def attention_flops(heads: Heads, rows: Iterable[tuple[int, int]]) -> int:
    """Of causal attention: a token sees the positions up to its own."""
    seen = 0
    for new, length in rows:
        before = length - new
        seen += new * before + new * (new + 1) // 2
    return 4 * heads.query_heads * heads.head_dim * seen


def write_bytes(heads: Heads, tokens: int, itemsize: int, kv_itemsize: int) -> int:
    """Of a KV write: keys and values read, and written to their pages."""
    return kv_bytes(heads, tokens, itemsize) + kv_bytes(heads, tokens, kv_itemsize)


def rotate_and_write_bytes(heads: Heads, tokens: int, qkv_itemsize: int, itemsize: int, kv_itemsize: int) -> int:
    """Of a fused rotation and write: the projection and the angles read, queries, keys and values written."""
    projection = tokens * heads.kv_heads * (heads.group + 2) * heads.head_dim * qkv_itemsize
    angles = 2 * 4 * tokens * heads.head_dim // 2
    queries = tokens * heads.query_heads * heads.head_dim * itemsize
    return projection + angles + queries + kv_bytes(heads, tokens, kv_itemsize)
