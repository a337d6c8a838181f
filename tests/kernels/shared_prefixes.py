"""Steps for kernel tests in which rows share the first pages of their tables, and the same with pages of their own."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from jaxserve.pallas_kernels.paged_attention.pool import QUANTISED_DTYPES, largest


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes of a step; `tokens`, `rows` and `max_len` are the bucket."""

    kv_heads: int
    group_heads: int
    head_dim: int
    page_size: int
    dtype: str = "bfloat16"
    pool_dtype: str = "bfloat16"
    sliding_window: int | None = None
    sinks: bool = False
    tokens: int = 24
    rows: int = 12
    max_len: int = 512


@dataclasses.dataclass(frozen=True)
class Branch:
    """A row of `length` positions that computes the last `count`, and has the first `shared` pages of row `parent`."""

    length: int
    count: int = 1
    parent: int = 0
    shared: int = 0


@st.composite
def branches(draw: st.DrawFn, sizes: Sizes, *, decodes: bool = False) -> list[Branch]:
    """Rows that branch off one another at any depth; with one token each, or some with a chunk or without tokens."""
    found: list[Branch] = []
    left = sizes.tokens
    lengths = st.one_of(st.integers(1, sizes.max_len), st.integers(sizes.max_len // 2, sizes.max_len))
    for number in range(draw(st.integers(1, sizes.rows))):
        length = draw(lengths)
        count = 1 if decodes else min(draw(st.sampled_from([1, 1, 1, 1, 1, 0, 5])), left, length)
        parent = draw(st.integers(0, max(0, number - 1)))
        most = min(length, found[parent].length) // sizes.page_size if found else 0
        shared = draw(st.one_of(st.just(most), st.integers(0, most)))
        found.append(Branch(length, count, parent, shared))
        left -= count
    return found


class SharedStep:
    """The arguments of a step; what no row sees is NaN, or for int8 the greatest number.

    Attributes:
        query: [T, K, G, D].
        pool: [num_pages, 2, K, page_size, D] in the pool's value dtype; a page is shared where branches say so.
        table: int32 [R, max_pages] over that pool.
        own_pool: the same with pages of its own for every row, of which it sees every position that is a number.
        own_table: over that pool.
        lengths: int32 [R].
        starts: int32 [R + 1].
        scales: float32 [2, K] of a quantized pool, else None.
        sinks: float32 [K, G] or None.
        stored: each row's keys and values [length, 2, K, D].
    """

    def __init__(self, sizes: Sizes, rows: list[Branch], seed: int) -> None:
        self.sizes, self.rows = sizes, rows
        self._random = random = np.random.default_rng(seed)
        shape = (sizes.tokens, sizes.kv_heads, sizes.group_heads, sizes.head_dim)
        self.query = (2 * random.standard_normal(shape)).astype(jnp.dtype(sizes.dtype))
        quantized = sizes.pool_dtype in QUANTISED_DTYPES
        self.scales = random.uniform(0.01, 0.1, (2, sizes.kv_heads)).astype(np.float32) if quantized else None
        self.sinks = random.normal(0, 4, shape[1:3]).astype(np.float32) if sizes.sinks else None
        self.stored: list[np.ndarray] = []
        for row in rows:
            drawn = self._draw(row.length)
            if row.shared:
                drawn[: row.shared * sizes.page_size] = self.stored[row.parent][: row.shared * sizes.page_size]
            self.stored.append(drawn)
        self.lengths, self.starts = np.zeros(sizes.rows, np.int32), np.zeros(sizes.rows + 1, np.int32)
        for number, row in enumerate(rows):
            self.lengths[number] = row.length
            self.starts[number + 1] = self.starts[number] + row.count
        self.starts[len(rows) + 1 :] = self.starts[len(rows)]
        self.pool, self.table = self._place(share=True)
        self.own_pool, self.own_table = self._place(share=False)

    def oldest(self, row: Branch) -> int:
        """The first position of `row` that any of its tokens sees; its length where it has none."""
        if not row.count:
            return row.length
        window = self.sizes.sliding_window
        return 0 if window is None else max(0, row.length - row.count + 1 - window)

    def _draw(self, length: int) -> np.ndarray:
        sizes = self.sizes
        number = 2 * self._random.standard_normal((length, 2, sizes.kv_heads, sizes.head_dim), dtype=np.float32)
        if sizes.pool_dtype in QUANTISED_DTYPES:
            most = largest(sizes.pool_dtype)
            number = np.clip(number * most / 8, -most, most)
        return (np.round(number) if sizes.pool_dtype == "int8" else number).astype(jnp.dtype(sizes.pool_dtype))

    def _place(self, *, share: bool) -> tuple[np.ndarray, np.ndarray]:
        sizes = self.sizes
        columns = -(-sizes.max_len // sizes.page_size)
        num_pages = sizes.rows * columns + 3
        garbage = 127 if sizes.pool_dtype == "int8" else np.nan
        shape = (num_pages, 2, sizes.kv_heads, sizes.page_size, sizes.head_dim)
        pool = np.full(shape, garbage, np.float32).astype(jnp.dtype(sizes.pool_dtype))
        free = iter(1 + self._random.permutation(num_pages - 1))
        whole: list[list[int]] = []
        table = self._random.integers(-9, num_pages + 9, (sizes.rows, columns), dtype=np.int32)
        for number, (row, stored) in enumerate(zip(self.rows, self.stored, strict=True)):
            used = -(-row.length // sizes.page_size)
            begun = whole[row.parent][: row.shared] if share and row.shared else []
            whole.append(begun + [int(next(free)) for _ in range(used - len(begun))])
            position = np.arange(self.oldest(row), row.length)
            pages = np.array(whole[-1])[position // sizes.page_size]
            pool[pages, :, :, position % sizes.page_size] = stored[position]
            first = self.oldest(row) // sizes.page_size
            table[number, first:used] = whole[-1][first:]
        return pool, table

    def expected(self, number: int, scale: float, soft_cap: float | None = None) -> np.ndarray:
        """Row `number`'s outputs [count, K, G, D] in float64, from its own keys and values."""
        row, stored = self.rows[number], self.stored[number].astype(np.float64)
        if self.scales is not None:
            stored = stored * self.scales.astype(np.float64)[None, :, :, None]
        query = self.query[self.starts[number] : self.starts[number + 1]].astype(np.float64)
        score = scale * np.einsum("nkgd,lkd->nkgl", query, stored[:, 0])
        if soft_cap is not None:
            score = soft_cap * np.tanh(score / soft_cap)
        position, own = np.arange(row.length), np.arange(row.length - row.count, row.length)
        seen = position[None, :] <= own[:, None]
        if self.sizes.sliding_window is not None:
            seen &= position[None, :] > own[:, None] - self.sizes.sliding_window
        score = np.where(seen[:, None, None, :], score, -np.inf)
        greatest = score.max(axis=-1, keepdims=True)
        weight = np.exp(score - greatest)
        total = weight.sum(axis=-1, keepdims=True)
        if self.sinks is not None:
            total += np.exp(self.sinks.astype(np.float64)[None, :, :, None] - greatest)
        return np.einsum("nkgl,lkd->nkgd", weight / total, stored[:, 1])
