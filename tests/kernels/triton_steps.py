"""Steps for tests of the Triton attention kernels in interpret mode, and their results in float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.pallas_kernels.paged_attention import AttentionSpec
from jaxserve.pallas_kernels.paged_attention.pool import QUANTISED_DTYPES, largest, storage_dtype
from jaxserve.pallas_kernels.paged_attention.triton.attention import paged_attention
from jaxserve.pallas_kernels.paged_attention.triton.tuning import DecodeConfig, PrefillConfig

# The most that a result may be off by, in units of the greatest value V. Weights each off by a share of e or less move
# a mean of values by e V or less.
# 16 bits: weights and result are each rounded to within half the relative distance of neighboring numbers. A tenth
# more is for the second order, for what float32 loses and for float16's weights below its normal numbers.
# float32: scores up to 64, off by 2^-23 of that, move weights by the same share.
ROUNDING = {"float32": 64 * 2.0**-23, "bfloat16": 1.1 * 2.0**-7, "float16": 1.1 * 2.0**-10}


@dataclasses.dataclass(frozen=True)
class Layer:
    """Static sizes and settings; `tokens` and `rows` are the bucket."""

    kv_heads: int = 2
    group_heads: int = 4
    head_dim: int = 64
    page_size: int = 16
    dtype: str = "float32"
    pool_dtype: str = "float32"
    scale: float = 0.1
    sliding_window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    tokens: int = 40
    rows: int = 5
    max_len: int = 256
    decode_only: bool = False
    decode: DecodeConfig = DecodeConfig(block=16, chunk=32, splits=4, programs=3, num_warps=4, num_stages=2)
    prefill: PrefillConfig = PrefillConfig(tile=32, block=16, num_warps=4, num_stages=2)

    @property
    def quantized(self) -> bool:
        return self.pool_dtype in QUANTISED_DTYPES

    def oldest(self, row: "Row") -> int:
        """The first position of `row` that any of its tokens sees; its length where it has none."""
        if not row.count:
            return row.length
        return 0 if self.sliding_window is None else max(0, row.length - row.count + 1 - self.sliding_window)


@dataclasses.dataclass(frozen=True)
class Row:
    """A sequence of `length` positions of which this step computes the last `count`."""

    length: int
    count: int


@dataclasses.dataclass
class Sequence:
    """Queries [count, K, G, D], keys and values [length, 2, K, D] as the pool stores them, in its value dtype."""

    queries: np.ndarray
    stored: np.ndarray


class Step:
    """The arguments of a step; whatever must not be read is NaN, or for int8 the greatest number."""

    def __init__(self, layer: Layer, rows: list[Row], seed: int) -> None:
        self.layer, self.rows = layer, rows
        random = np.random.default_rng(seed)
        heads, dim = layer.kv_heads, layer.head_dim
        self.scales = random.uniform(0.01, 0.1, (2, heads)).astype(np.float32) if layer.quantized else None
        self.sinks = random.normal(0, 4, (heads, layer.group_heads)).astype(np.float32) if layer.sinks else None
        self.sequences = [
            Sequence(
                (2 * random.standard_normal((row.count, heads, layer.group_heads, dim))).astype(jnp.dtype(layer.dtype)),
                _stored(random, (row.length, 2, heads, dim), layer.pool_dtype),
            )
            for row in rows
        ]
        self.pack(random)

    def pack(self, random: np.random.Generator) -> None:
        layer = self.layer
        columns = -(-layer.max_len // layer.page_size)
        num_pages = layer.rows * columns + 3
        shape = (num_pages, 2, layer.kv_heads, layer.page_size, layer.head_dim)
        garbage = 127 if layer.pool_dtype == "int8" else np.nan
        pool = np.full(shape, garbage, np.float32).astype(jnp.dtype(layer.pool_dtype))
        query = np.full((layer.tokens, layer.kv_heads, layer.group_heads, layer.head_dim), np.nan, np.float32)
        self.query = query.astype(jnp.dtype(layer.dtype))
        self.table = random.integers(-9, num_pages + 9, (layer.rows, columns), dtype=np.int32)
        self.lengths, self.starts = np.zeros(layer.rows, np.int32), np.zeros(layer.rows + 1, np.int32)
        free = iter(1 + random.permutation(num_pages - 1))
        for number, (row, sequence) in enumerate(zip(self.rows, self.sequences, strict=True)):
            used = -(-row.length // layer.page_size)
            oldest = layer.oldest(row)
            first = oldest // layer.page_size
            self.table[number, first:used] = [next(free) for _ in range(first, used)]
            position = np.arange(oldest, row.length)
            pages = self.table[number, position // layer.page_size]
            pool[pages, :, :, position % layer.page_size] = sequence.stored[oldest:]
            self.lengths[number] = row.length
            self.starts[number + 1] = self.starts[number] + row.count
            self.query[self.starts[number] : self.starts[number + 1]] = sequence.queries
        self.starts[len(self.rows) + 1 :] = self.starts[len(self.rows)]
        self.pool = pool.view(storage_dtype(layer.pool_dtype, "cpu"))

    def run(self) -> list[np.ndarray]:
        """Each row's outputs [count, K, G, D], and last those of the padding tokens."""
        scales = (None, None) if self.scales is None else tuple(self.scales)
        out = _compiled(self.layer)(self.query, self.pool, self.table, self.lengths, self.starts, *scales, self.sinks)
        return np.split(np.asarray(out), self.starts[1 : len(self.rows) + 1])

    def expected(self, number: int) -> np.ndarray:
        """Row `number`'s outputs in float64, from its sequence alone."""
        layer, row, sequence = self.layer, self.rows[number], self.sequences[number]
        stored = sequence.stored.astype(np.float64)
        if not layer.quantized:
            # As the kernels do; it changes nothing unless the pool's dtype is the wider one.
            stored = stored.astype(jnp.dtype(layer.dtype)).astype(np.float64)
        if self.scales is not None:
            stored = stored * self.scales.astype(np.float64)[None, :, :, None]
        query = sequence.queries.astype(np.float64)
        score = layer.scale * np.einsum("nkgd,lkd->nkgl", query, stored[:, 0])
        if layer.soft_cap is not None:
            score = layer.soft_cap * np.tanh(score / layer.soft_cap)
        position, own = np.arange(row.length), np.arange(row.length - row.count, row.length)
        seen = position[None, :] <= own[:, None]
        if layer.sliding_window is not None:
            seen &= position[None, :] > own[:, None] - layer.sliding_window
        score = np.where(seen[:, None, None, :], score, -np.inf)
        greatest = score.max(axis=-1, keepdims=True)
        sink = np.zeros_like(greatest)
        if self.sinks is not None:
            sink = np.exp(self.sinks.astype(np.float64)[None, :, :, None] - greatest)
        weight = np.exp(score - greatest)
        weight /= weight.sum(axis=-1, keepdims=True) + sink
        return np.einsum("nkgl,lkd->nkgd", weight, stored[:, 1])

    def greatest_value(self) -> float:
        """The greatest magnitude among the values, scaled."""
        scale = 1.0 if self.scales is None else self.scales[1][None, :, None]
        found = [np.abs(one.stored[:, 1].astype(np.float32) * scale).max() for one in self.sequences]
        return float(max(found, default=0))


def _stored(random: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    number = 2 * random.standard_normal(shape, dtype=np.float32)
    if dtype in QUANTISED_DTYPES:
        number = np.clip(number * largest(dtype) / 8, -largest(dtype), largest(dtype))
    return (np.round(number) if dtype == "int8" else number).astype(jnp.dtype(dtype))


@functools.cache
def _compiled(layer: Layer):
    spec = AttentionSpec(layer.scale, layer.sliding_window, layer.soft_cap)

    def attend(query, pool, table, lengths, starts, k_scale, v_scale, sinks):
        return paged_attention(
            query,
            pool,
            table,
            lengths,
            starts,
            spec,
            k_scale,
            v_scale,
            sinks,
            layer.decode_only,
            interpret=True,
            decode_config=layer.decode,
            prefill_config=layer.prefill,
        )

    # Interpreted kernels take a second to compile and are run a few times: the compiler's optimizations do not pay.
    return jax.jit(attend, compiler_options={"xla_backend_optimization_level": 0})


def assert_close(step: Step) -> None:
    layer = step.layer
    allowed = ROUNDING[layer.dtype] * step.greatest_value()
    *outputs, padding = step.run()
    for number, out in enumerate(outputs):
        np.testing.assert_allclose(out.astype(np.float64), step.expected(number), rtol=0, atol=allowed)
    assert not padding.any(), "padding tokens must come out as zeros"
