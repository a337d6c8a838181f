"""The XLA and the CPU implementations against the reference, and the reference against sums written out in NumPy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.pallas_kernels.paged_attention import kv_write, largest, new_pool, paged_attention
from tests.budgets import budget
from tests.kernels.packing import Memory, Shape, Work, bits, for_cpu, for_cpu_float32, needs_avx512_bf16

SHAPES = [
    Shape(2, 2, 40),
    Shape(4, 3, 64, dtype="bfloat16"),
    Shape(2, 1, 32, page_size=32, tokens=40, rows=5),
    Shape(1, 16, 64, page_size=64, dtype="bfloat16", rows=3),
    Shape(1, 5, 128, page_size=128, tokens=150),
    Shape(2, 4, 16, page_size=8, dtype="float16"),
    Shape(2, 2, 40, sliding_window=37, max_len=500),
    Shape(3, 2, 24, soft_cap=3.0, dtype="bfloat16", sliding_window=1),
    Shape(2, 3, 64, dtype="bfloat16", pool_dtype="float8_e4m3fn", sinks=True),
    Shape(2, 2, 80, pool_dtype="int8", soft_cap=5.0, page_size=32),
]
CPU_SHAPES = [
    for_cpu(4, 3, 64, sliding_window=50),
    for_cpu(2, 1, 128, page_size=64),
    for_cpu(1, 8, 96, page_size=32, tokens=150, sliding_window=33),
    for_cpu(2, 7, 32, page_size=128, sinks=True, rows=17),
    for_cpu(2, 3, 64, soft_cap=3.0),
    for_cpu_float32(2, 2, 32),
    for_cpu_float32(4, 3, 64, sliding_window=50, dtype="bfloat16"),
    for_cpu_float32(1, 8, 96, page_size=32, tokens=150, sliding_window=33, dtype="float16"),
    for_cpu_float32(2, 7, 128, page_size=128, sinks=True, rows=17, soft_cap=3.0),
]
CPU = pytest.param("cpu", marks=needs_avx512_bf16)


@st.composite
def ragged(draw: st.DrawFn, shape: Shape) -> tuple[list[int], list[Work]]:
    """Lengths of sequences, and for each the tokens of this step: decodes and chunks that fit the bucket together."""
    lengths, items, left = [], [], shape.tokens
    for _ in range(draw(st.integers(0, shape.rows))):
        if not left:
            break
        stop = draw(st.integers(1, shape.max_len))
        count = draw(st.one_of(st.just(1), st.integers(1, shape.tokens)))
        start = max(0, stop - min(count, left))
        lengths.append(stop)
        items.append(Work(len(items), start, stop))
        left -= stop - start
    return lengths, items


@pytest.mark.parametrize("shape", [*SHAPES, *CPU_SHAPES], ids=str)
def test_agrees_with_the_reference_and_ignores_unwritten_memory(shape: Shape):
    tolerance = {"float32": 2e-5, "bfloat16": 4e-2, "float16": 5e-3}[shape.dtype]

    @budget(12)
    @given(case=ragged(shape), seed=st.integers(0, 2**31))
    def check(case: tuple[list[int], list[Work]], seed: int) -> None:
        lengths, items = case
        clean = Memory(shape, lengths or [1], seed, fill=0.0)
        wanted = clean.attend(items, implementation="reference")
        got = Memory(shape, lengths or [1], seed, fill=float("nan")).attend(items)
        for one, other in zip(got, wanted, strict=True):
            np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), atol=tolerance, rtol=tolerance)
        assert not got[-1].any(), "padding tokens must come out as zeros"

    check()


@pytest.mark.parametrize("fill", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("implementation", ["xla", "reference", "cpu_float32", CPU])
def test_memory_that_no_one_wrote_changes_no_bit(implementation: str, fill: float):
    shape = {"cpu": Shape(2, 2, 64, dtype="bfloat16"), "cpu_float32": Shape(2, 2, 32)}.get(
        implementation, Shape(2, 2, 40)
    )
    lengths = [1, 16, 17, 129, 300]
    items = [Work(0, 0, 1), Work(1, 3, 16), Work(2, 16, 17), Work(3, 100, 129), Work(4, 299, 300)]
    clean = Memory(shape, lengths, 7, fill=0.0).attend(items, implementation=implementation)
    dirty = Memory(shape, lengths, 7, fill=fill).attend(items, implementation=implementation)
    for one, other in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("implementation", ["xla", "reference", "triton_interpret", "cpu_float32", CPU])
def test_what_lies_before_the_window_has_no_influence(implementation: str):
    """Pages that a sliding window has left may belong to others by now."""
    shape = Shape(2, 2, 40, sliding_window=37, tokens=96)
    if implementation == "cpu":
        shape = Shape(2, 2, 64, sliding_window=37, tokens=96, dtype="bfloat16")
    elif implementation == "cpu_float32":
        shape = dataclasses.replace(shape, head_dim=64)
    items = [Work(0, 299, 300), Work(1, 100, 140), Work(2, 60, 90), Work(3, 0, 20)]
    lengths = [item.stop for item in items]
    clean = Memory(shape, lengths, 7).attend(items, implementation=implementation)
    memory = Memory(shape, lengths, 7)
    nan = np.full(1, np.nan, jnp.dtype(shape.stored)).view(memory.pool.dtype)[0]
    pool = np.array(memory.pool)
    for item in items:
        position = np.arange(max(0, item.start - 36))
        pool[memory.pages[item.sequence][position // 16], :, :, position % 16] = nan
        memory.pages[item.sequence][: max(0, item.start - 36) // 16] = -5
    memory.pool = jnp.asarray(pool)
    for one, other in zip(clean, memory.attend(items, implementation=implementation), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("implementation", ["xla", "reference", "triton_interpret", "cpu_float32"])
def test_scores_far_below_zero(implementation: str):
    memory = Memory(Shape(2, 2, 64 if implementation == "cpu_float32" else 40), [1] * 4, 0)
    stored = [memory.values[pages[0], :, :, 0] for pages in memory.pages]
    memory.queries = [np.repeat(-1e9 * both[0][None, :, None], 2, axis=2).astype(np.float32) for both in stored]
    outs = memory.attend([Work(i, 0, 1) for i in range(4)], implementation=implementation)
    for both, out in zip(stored, outs, strict=False):
        np.testing.assert_allclose(out[0], np.repeat(both[1][:, None], 2, axis=1), rtol=1e-6)


def _by_hand(memory: Memory, item: Work, position: int) -> np.ndarray:
    """Attention of one token [K, G, D] in float64, head by head and position by position."""
    shape = memory.shape
    pool = memory.values
    seen = range(max(0, position - (shape.sliding_window or position + 1) + 1), position + 1)
    place = [(memory.pages[item.sequence][p // shape.page_size], p % shape.page_size) for p in seen]
    out = np.zeros((shape.kv_heads, shape.group_heads, shape.head_dim))
    for head in range(shape.kv_heads):
        key = np.array([pool[page, 0, head, offset] for page, offset in place])
        value = np.array([pool[page, 1, head, offset] for page, offset in place])
        for member in range(shape.group_heads):
            score = key @ memory.queries[item.sequence][position, head, member].astype(np.float64)
            score *= shape.head_dim**-0.5
            if shape.soft_cap is not None:
                score = shape.soft_cap * np.tanh(score / shape.soft_cap)
            weight = np.exp(score - score.max())
            sink = 0.0 if memory.sinks is None else np.exp(float(memory.sinks[head, member]) - score.max())
            out[head, member] = weight @ value / (weight.sum() + sink)
    return out


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize(
    "shape",
    [
        Shape(2, 2, 40),
        Shape(2, 2, 40, sliding_window=20),
        Shape(2, 2, 40, soft_cap=2.0),
        Shape(2, 2, 40, sinks=True),
        Shape(2, 2, 40, pool_dtype="float8_e4m3fn", soft_cap=2.0),
        Shape(2, 2, 40, pool_dtype="int8", sinks=True, sliding_window=20),
        Shape(2, 2, 40, pool_dtype="bfloat16"),
    ],
    ids=str,
)
def test_agrees_with_sums_written_out(implementation: str, shape: Shape):
    _check_sums_written_out(implementation, shape)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(2, 2, 32),
        Shape(2, 1, 64, sliding_window=20),
        Shape(1, 7, 128, soft_cap=2.0),
        Shape(1, 3, 96, soft_cap=50.0, sinks=True, page_size=64),
        Shape(2, 2, 64, sinks=True, sliding_window=20),
        Shape(2, 2, 32, pool_dtype="bfloat16"),
        Shape(2, 2, 64, pool_dtype="float16", sinks=True),
    ],
    ids=str,
)
def test_cpu_float32_agrees_with_sums_written_out(shape: Shape):
    _check_sums_written_out("cpu_float32", shape)


def _check_sums_written_out(implementation: str, shape: Shape) -> None:
    memory = Memory(shape, [5, 140, 33], 3, fill=0.0 if implementation == "reference" else float("nan"))
    items = [Work(0, 0, 5), Work(1, 139, 140), Work(2, 20, 33)]
    got = memory.attend(items, implementation=implementation)
    for item, out in zip(items, got, strict=False):
        wanted = np.array([_by_hand(memory, item, position) for position in range(item.start, item.stop)])
        np.testing.assert_allclose(out, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "shape",
    [
        for_cpu(2, 1, 64),
        for_cpu(1, 2, 32, page_size=32, sinks=True),
        for_cpu(1, 5, 96, page_size=64, sliding_window=20),
        for_cpu(1, 8, 128, page_size=128),
        for_cpu(1, 8, 64, soft_cap=2.0),
    ],
)
def test_cpu_agrees_with_sums_written_out(shape: Shape):
    memory = Memory(shape, [5, 140, 33], 3)
    items = [Work(0, 0, 5), Work(1, 139, 140), Work(2, 20, 33)]
    for item, out in zip(items, memory.attend(items), strict=False):
        wanted = np.array([_by_hand(memory, item, position) for position in range(item.start, item.stop)])
        # Weights and the result keep 8 bits; values are of the order of 4.
        np.testing.assert_allclose(out.astype(np.float64), wanted, atol=2.0**-5, rtol=2.0**-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_one_position_returns_its_value(dtype: str):
    memory = Memory(Shape(2, 2, 40, dtype=dtype), [1] * 8, 0)
    pool = np.asarray(memory.pool).view(dtype)
    outs = memory.attend([Work(i, 0, 1) for i in range(8)])
    for pages, out in zip(memory.pages, outs, strict=False):
        wanted = np.repeat(pool[pages[0], 1, :, None, 0], 2, axis=1)
        # Two roundings in float32, which a narrower output does not show.
        np.testing.assert_allclose(
            out[0].astype(np.float32), wanted.astype(np.float32), rtol=3e-7 * (dtype == "float32")
        )


@pytest.mark.parametrize(
    ("shape", "buckets"),
    [
        (Shape(2, 2, 40), ((8, 8), (8, 16), (17, 8))),
        (Shape(4, 3, 64, dtype="bfloat16", sliding_window=50), ((8, 16),)),
        (Shape(2, 3, 64, dtype="bfloat16", pool_dtype="float8_e4m3fn", sinks=True), ((8, 8),)),
        (Shape(2, 2, 40, pool_dtype="int8"), ((17, 8),)),
    ],
    ids=str,
)
def test_a_promise_of_decodes_alone_changes_no_bit(shape: Shape, buckets: tuple[tuple[int, int], ...]):
    """buckets: of rows and tokens."""
    lengths = [150, 3, 129, 64, 300, 17]
    memory = Memory(shape, lengths, 9)
    for rows, tokens in buckets:
        items = [Work(i, n - 1, n) for i, n in enumerate(lengths)]
        wanted = memory.attend(items, tokens=tokens, rows=rows)
        got = memory.attend(items, tokens=tokens, rows=rows, decode_only=True)
        for one, other in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(bits(one), bits(other))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sinks_that_outweigh_everything_or_nothing(dtype: str):
    memory = Memory(Shape(2, 2, 40, dtype=dtype, sinks=True), [40, 129], 4)
    items = [Work(0, 30, 40), Work(1, 128, 129)]
    plain = Memory(Shape(2, 2, 40, dtype=dtype), [40, 129], 4).attend(items)
    memory.sinks[:] = -np.inf
    for one, other in zip(memory.attend(items), plain, strict=True):
        np.testing.assert_array_equal(bits(one), bits(other))
    memory.sinks[:] = 1e4
    for out in memory.attend(items):
        assert not out.any()


@pytest.mark.parametrize("pool_dtype", ["float8_e4m3fn", "int8"])
def test_quantized_pages_change_attention_by_no_more_than_their_rounding(pool_dtype: str):
    """From write to read, against float64 over keys and values that were never rounded.

    With keys off by at most a and values by at most b, scores are off by e = scale |q|_1 a, so every weight by a factor
    from exp(-2 e) to exp(2 e): the result is off by at most b + (exp(2 e) - 1) max |v|.
    """
    length, heads, group, dim, page = 50, 2, 2, 16, 16
    random = np.random.default_rng(0)
    k, v = random.standard_normal((2, length, heads, dim)).astype(np.float32)
    q = random.standard_normal((1, heads, group, dim)).astype(np.float32)
    limit = largest(pool_dtype)
    k_scale, v_scale = (np.abs(x).max(axis=(0, 2)) / limit for x in (k, v))
    pool = new_pool(5, heads, page, dim, pool_dtype, platform="cpu")
    scales = {"k_scale": jnp.asarray(k_scale), "v_scale": jnp.asarray(v_scale)}
    pool = kv_write(pool, jnp.asarray(k), jnp.asarray(v), page + jnp.arange(length, dtype=jnp.int32), **scales)
    table, lens, starts = (jnp.asarray(x, jnp.int32) for x in ([[1, 2, 3, 4]], [length], [0, 1]))
    out = paged_attention(jnp.asarray(q), pool, table, lens, starts, scale=0.25, **scales)[0]
    # Half a step: of 1 in int8, of 2^5 in the topmost binade of float8_e4m3fn (256 to 448).
    half = {"int8": 0.5, "float8_e4m3fn": 16.0}[pool_dtype]
    for head in range(heads):
        for member in range(group):
            score = k[:, head].astype(np.float64) @ q[0, head, member] * 0.25
            weight = np.exp(score - score.max())
            exact = weight @ v[:, head].astype(np.float64) / weight.sum()
            off = 0.25 * np.abs(q[0, head, member]).sum() * half * k_scale[head]
            bound = half * v_scale[head] + (np.exp(2 * off) - 1) * np.abs(v[:, head]).max()
            error = np.abs(np.asarray(out[head, member]) - exact).max()
            assert 0 < error < bound + 1e-5
