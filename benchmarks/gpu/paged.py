"""Inputs of timed attention calls: one large pool of random keys and values, and page tables that wander through it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import device
from benchmarks.gpu.counts import Heads, kv_bytes
from benchmarks.gpu.record import Settings

MOST_ELEMENTS = 2**31
"""Of a pool: what 32-bit offsets reach."""

MOST_CALLS = 32
"""In one program."""

MOST_SETS = 8
"""Of page tables, that successive launches of a program take in turn."""


@dataclasses.dataclass
class Pool:
    """pages: [num_pages, 2, K, P, D]; k_scale, v_scale: f32 [K] where the pool is quantized, else None."""

    heads: Heads
    page_size: int
    pages: jax.Array
    k_scale: jax.Array | None
    v_scale: jax.Array | None

    @property
    def options(self) -> dict[str, jax.Array]:
        """The arguments of the api that a quantized pool needs."""
        if self.k_scale is None or self.v_scale is None:
            return {}
        return {"k_scale": self.k_scale, "v_scale": self.v_scale}

    @property
    def itemsize(self) -> int:
        return self.pages.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Calls:
    """sets: for each launch in turn the page tables of a program's calls, int32 [R, maxp] each.

    kv_lens [R] and query_start_loc [R + 1] are those of every call.
    """

    sets: list[list[jax.Array]]
    kv_lens: jax.Array
    query_start_loc: jax.Array

    @property
    def count(self) -> int:
        """Calls of a program."""
        return len(self.sets[0])


def heads_of(settings: Settings) -> Heads:
    """Llama-3.1-8B's heads on a GPU, small ones on a CPU."""
    return Heads() if settings.gpu else Heads(kv_heads=2, group=2, head_dim=64)


def query_dtype(settings: Settings) -> Any:
    """bfloat16; float32 on a CPU, whose bfloat16 arithmetic is slow."""
    return jnp.dtype(jnp.bfloat16 if settings.gpu else jnp.float32)


def make_pool(
    settings: Settings, page_size: int, dtype: Any, positions: int | None = None, heads: Heads | None = None
) -> Pool:
    """A pool as large as offsets and an eighth of the memory allow, or of `positions`; random contents."""
    heads, dtype = heads or heads_of(settings), jnp.dtype(dtype)
    if positions is None:
        by_offsets = MOST_ELEMENTS // kv_bytes(heads, 1, 1)
        by_memory = device.device_memory() // 8 // kv_bytes(heads, 1, max(2, dtype.itemsize))
        positions = min(by_offsets, by_memory) if settings.gpu else 1024
    pages = max(64, positions // page_size // 64 * 64)
    shape = (pages, 2, heads.kv_heads, page_size, heads.head_dim)
    content = device.random_array(jax.random.key(settings.seed), shape, dtype)
    quantized = dtype.itemsize == 1
    scale = jnp.full((heads.kv_heads,), 0.02 if dtype == jnp.int8 else 1.0, jnp.float32) if quantized else None
    return Pool(heads, page_size, content, scale, scale)


def make_calls(settings: Settings, pool: Pool, rows: list[tuple[int, int]], most: int = MOST_CALLS) -> Calls:
    """Calls over `rows`, (new tokens, length) each: enough to read several times the cache's size before any repeats.

    Each has page tables of its own. A pool smaller than one call's pages is gone through more than once, in an order
    so long that the cache does not help.
    """
    lengths = np.array([length for _, length in rows], np.int32)
    starts = np.concatenate([[0], np.cumsum([new for new, _ in rows])]).astype(np.int32)
    read = kv_bytes(pool.heads, int(lengths.sum()), pool.itemsize)
    wanted = -(-4 * device.CACHE_BYTES // read)
    count = max(1, min(most, wanted)) if settings.gpu else 2
    sets = max(1, min(MOST_SETS, -(-wanted // count))) if settings.gpu else 2
    pages_a_row = -(-int(lengths.max()) // pool.page_size)
    tables = device.page_tables(sets * count, len(rows), pages_a_row, pool.pages.shape[0], settings.seed)
    arrays = [jnp.asarray(table) for table in tables]
    by_launch = [arrays[place : place + count] for place in range(0, len(arrays), count)]
    return Calls(by_launch, jnp.asarray(lengths), jnp.asarray(starts))


def queries(pool: Pool, tokens: int, dtype: Any, seed: int) -> jax.Array:
    """Random queries [T, K, G, D]."""
    heads = pool.heads
    shape = (tokens, heads.kv_heads, heads.group, heads.head_dim)
    return device.random_array(jax.random.key(seed), shape, dtype)


def check_finite(array: jax.Array) -> dict[str, str]:
    """A case's reason to fail where a result is not finite."""
    if bool(jnp.all(jnp.isfinite(array.astype(jnp.float32)))):
        return {}
    return {"reason": "the result is not finite"}
