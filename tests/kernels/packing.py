"""Ragged steps for kernel tests: sequences with keys and values in scattered pages of a pool full of garbage."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.pallas_kernels.cpu import features
from jaxserve.pallas_kernels.paged_attention import paged_attention, storage_dtype
from jaxserve.pallas_kernels.paged_attention.pool import QUANTISED_DTYPES
from jaxserve.programs.compiler import compiler_options

needs_avx512_bf16 = pytest.mark.skipif(not features.has("avx512_bf16"), reason="this CPU has no avx512_bf16")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Static sizes of a case; `tokens` and `rows` are the bucket, `implementation` is the one that it is for."""

    kv_heads: int
    group_heads: int
    head_dim: int
    page_size: int = 16
    dtype: str = "float32"
    tokens: int = 64
    rows: int = 8
    max_len: int = 300
    sliding_window: int | None = None
    soft_cap: float | None = None
    pool_dtype: str | None = None
    sinks: bool = False
    implementation: str = "xla"

    @property
    def stored(self) -> str:
        """Name of the dtype of the numbers in the pool."""
        return self.pool_dtype or self.dtype

    @property
    def max_pages(self) -> int:
        return -(-self.max_len // self.page_size)


def for_cpu(*sizes: int, **settings: Any) -> Any:
    """A case of bfloat16 for the implementation "cpu", as a parameter of a test."""
    shape = Shape(*sizes, dtype="bfloat16", implementation="cpu", **settings)
    return pytest.param(shape, marks=needs_avx512_bf16, id=str(shape))


def for_cpu_float32(*sizes: int, **settings: Any) -> Shape:
    """A case for the implementation "cpu_float32"."""
    return Shape(*sizes, implementation="cpu_float32", **settings)


@dataclasses.dataclass(frozen=True)
class Work:
    """Tokens `start` to `stop` of sequence `sequence`, as one row of a step."""

    sequence: int
    start: int
    stop: int


class Memory:
    """Sequences of random queries, keys and values, the last two in pages of one pool whose other numbers are `fill`.

    Attributes:
        pool: the pool, in its storage dtype.
        values: what the pool stands for, float64; a quantized pool's numbers are multiplied by their scales.
        scales: float32 [2, K] of a quantized pool, else None.
        sinks: float32 [K, G] or None.
        queries: for each sequence, [length, K, G, D] in the shape's dtype.
    """

    def __init__(self, shape: Shape, lengths: list[int], seed: int, fill: float = float("nan")) -> None:
        self.shape = shape
        self._random = np.random.default_rng(seed)
        dtype = jnp.dtype(shape.stored)
        pages = [-(-length // shape.page_size) for length in lengths]
        # The same number of pages for the same shape, so that each shape compiles once.
        self.num_pages = shape.rows * shape.max_pages + 3
        free = 1 + self._random.permutation(self.num_pages - 1)
        self.pages = np.split(free[: sum(pages)], np.cumsum(pages)[:-1])
        size = (self.num_pages, 2, shape.kv_heads, shape.page_size, shape.head_dim)
        # An int8 pool cannot hold what is no number; its largest one stands for it.
        pool = np.full(size, 127 if dtype == np.int8 and fill else fill, dtype=np.float32).astype(dtype)
        quantized = shape.stored in QUANTISED_DTYPES
        self.scales = self._random.uniform(0.5, 2, (2, shape.kv_heads)).astype(np.float32) if quantized else None
        if dtype == np.int8 and self.scales is not None:
            self.scales /= 32
        for length, table in zip(lengths, self.pages, strict=True):
            position = np.arange(length)
            page, offset = table[position // shape.page_size], position % shape.page_size
            written = 2 * self._random.standard_normal((length, 2, shape.kv_heads, shape.head_dim), dtype=np.float32)
            if self.scales is not None:
                written /= self.scales[..., None]
                written = np.clip(np.rint(written), -127, 127) if dtype == np.int8 else written
            pool[page, :, :, offset] = written.astype(dtype)
        self.pool = jnp.asarray(pool.view(storage_dtype(dtype, "cpu")))
        self.values = pool.astype(np.float64)
        if self.scales is not None:
            self.values *= self.scales[:, :, None, None]
        self.queries = [self._normal(length, shape.kv_heads, shape.group_heads, shape.head_dim) for length in lengths]
        shape_of_sinks = (shape.kv_heads, shape.group_heads)
        self.sinks = self._random.standard_normal(shape_of_sinks, dtype=np.float32) if shape.sinks else None

    def _normal(self, *size: int) -> np.ndarray:
        return (2 * self._random.standard_normal(size, dtype=np.float32)).astype(jnp.dtype(self.shape.dtype))

    def arguments(self, items: list[Work], tokens: int | None = None, rows: int | None = None) -> tuple:
        """Packs `items`; unused page table entries point anywhere, outside the pool too."""
        shape = self.shape
        tokens, rows = tokens or shape.tokens, rows or shape.rows
        query = self._normal(tokens, shape.kv_heads, shape.group_heads, shape.head_dim)
        table = self._random.integers(-9, self.num_pages + 9, (rows, shape.max_pages), dtype=np.int32)
        lengths, starts = np.zeros(rows, np.int32), np.zeros(rows + 1, np.int32)
        for row, item in enumerate(items):
            used = -(-item.stop // shape.page_size)
            table[row, :used] = self.pages[item.sequence][:used]
            lengths[row] = item.stop
            starts[row + 1] = starts[row] + item.stop - item.start
            query[starts[row] : starts[row + 1]] = self.queries[item.sequence][item.start : item.stop]
        starts[len(items) + 1 :] = starts[len(items)]
        return tuple(jnp.asarray(x) for x in (query, table, lengths, starts))

    def attend(
        self,
        items: list[Work],
        *,
        tokens: int | None = None,
        rows: int | None = None,
        implementation: str | None = None,
        decode_only: bool = False,
    ) -> list[np.ndarray]:
        """Returns each item's outputs [stop - start, K, G, D], and last those of the padding tokens."""
        query, table, lengths, starts = self.arguments(items, tokens, rows)
        optional = {}
        if self.scales is not None:
            optional = {"k_scale": jnp.asarray(self.scales[0]), "v_scale": jnp.asarray(self.scales[1])}
        if self.sinks is not None:
            optional["sinks"] = jnp.asarray(self.sinks)
        implementation = implementation or self.shape.implementation
        attend = _attend(self.shape, implementation, decode_only)
        pool = jnp.asarray(arranged(np.asarray(self.pool), implementation))
        out = np.asarray(attend(query, pool, table, lengths, starts, **optional))
        return np.split(out, np.asarray(starts[1 : len(items) + 1]))


@functools.cache
def _attend(shape: Shape, implementation: str, decode_only: bool):
    attend = functools.partial(
        paged_attention,
        scale=shape.head_dim**-0.5,
        sliding_window=shape.sliding_window,
        soft_cap=shape.soft_cap,
        decode_only=decode_only,
        implementation=implementation,
    )
    # What is compared with, and what is interpreted, runs a few times and no product runs it so: it is not optimized.
    cheap = implementation in ("reference", "triton_interpret")
    options = {"xla_backend_optimization_level": 0} if cheap else compiler_options(jax.default_backend())
    return jax.jit(attend, compiler_options=options)


_TOGETHER = {"cpu": 2, "cpu_float32": 1}
"""Numbers of a unit of the implementations that order the numbers of a page by themselves."""


def arranged(pool: np.ndarray, implementation: str) -> np.ndarray:
    """A pool as an implementation orders the numbers of a page; "cpu" and "cpu_float32", in units of n: keys
    [D / n, page_size, n], values [page_size / n, D, n]."""
    if implementation not in _TOGETHER:
        return pool
    pages, _, heads, page_size, head_dim = pool.shape
    unit = _TOGETHER[implementation]
    keys = pool[:, 0].reshape(pages, heads, page_size, head_dim // unit, unit).transpose(0, 1, 3, 2, 4)
    values = pool[:, 1].reshape(pages, heads, page_size // unit, unit, head_dim).transpose(0, 1, 2, 4, 3)
    return np.stack([part.reshape(pages, heads, page_size, head_dim) for part in (keys, values)], axis=1)


def plain(pool: np.ndarray, implementation: str) -> np.ndarray:
    """Inverse of `arranged`."""
    if implementation not in _TOGETHER:
        return pool
    pages, _, heads, page_size, head_dim = pool.shape
    unit = _TOGETHER[implementation]
    keys = pool[:, 0].reshape(pages, heads, head_dim // unit, page_size, unit).transpose(0, 1, 3, 2, 4)
    values = pool[:, 1].reshape(pages, heads, page_size // unit, head_dim, unit).transpose(0, 1, 2, 4, 3)
    return np.stack([part.reshape(pages, heads, page_size, head_dim) for part in (keys, values)], axis=1)


def bits(array: np.ndarray) -> np.ndarray:
    """The array's bits as integers, so that comparisons tell -0 from 0 and hold for NaN."""
    return array.view(f"uint{8 * array.dtype.itemsize}")
