"""Values of the Triton attention kernels (in Pallas' interpret mode) against sums in float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given
from hypothesis import strategies as st

from jaxserve.pallas_kernels.paged_attention import rotate_and_write
from jaxserve.pallas_kernels.paged_attention.cast import decode, encode
from jaxserve.pallas_kernels.paged_attention.pool import QUANTISED_DTYPES, largest, storage_dtype
from jaxserve.pallas_kernels.paged_attention.triton import limits
from jaxserve.pallas_kernels.paged_attention.triton.tuning import DecodeConfig, PrefillConfig
from tests.budgets import budget
from tests.kernels.packing import bits
from tests.kernels.triton_steps import Layer, Row, Sequence, Step, assert_close

# Without the search for an explanation, which traces every line of the compiler, and without shrinking, which compiles.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float16"]))
    block = draw(st.sampled_from([16, 32]))
    return Layer(
        kv_heads=draw(st.integers(1, 3)),
        group_heads=draw(st.integers(1, 16)),
        head_dim=draw(st.sampled_from([64, 80, 96, 128, 256])),
        page_size=draw(st.sampled_from([16, 32, 64, 128])),
        dtype=dtype,
        pool_dtype=draw(st.sampled_from([dtype, "float32", "bfloat16", *QUANTISED_DTYPES])),
        scale=draw(st.sampled_from([0.01, 0.0625, 0.11])),
        sliding_window=draw(st.sampled_from([None, 1, 17, 100])),
        soft_cap=draw(st.sampled_from([None, 5.0, 30.0])),
        sinks=draw(st.booleans()),
        decode=DecodeConfig(
            block=block,
            chunk=block * draw(st.sampled_from([1, 2])),
            splits=draw(st.sampled_from([1, 2, 8])),
            programs=draw(st.sampled_from([1, 5])),
            num_warps=4,
            num_stages=2,
        ),
        prefill=PrefillConfig(
            tile=draw(st.sampled_from([16, 64])),
            block=draw(st.sampled_from([16, 32])),
            num_warps=4,
            num_stages=2,
        ),
    )


@st.composite
def ragged(draw: st.DrawFn, layer: Layer) -> list[Row]:
    """Rows whose tokens fit the bucket together: decodes, chunks, whole prompts, rows without tokens."""
    rows, left = [], layer.tokens
    for _ in range(draw(st.integers(1, layer.rows))):
        length = draw(st.integers(1, layer.max_len))
        count = draw(st.one_of(st.just(1), st.integers(0, layer.tokens)))
        count = min(count, left, length)
        rows.append(Row(length, count))
        left -= count
    return rows


@pytest.mark.long  # each draw is a program to compile; COVERING has the fixed ones
@budget(4, phases=PHASES)
@given(data=st.data(), layer=layers(), seed=st.integers(0, 2**31))
def test_agrees_with_float64_and_reads_nothing_else(data: st.DataObject, layer: Layer, seed: int):
    for number in range(3):
        assert_close(Step(layer, data.draw(ragged(layer)), seed + number))


def _layer(
    head_dim: int,
    page_size: int,
    group_heads: int,
    dtype: str,
    pool_dtype: str,
    sliding_window: int | None,
    soft_cap: float | None,
    sinks: bool,
) -> Layer:
    scale = head_dim**-0.5 if soft_cap is None else 1 / 16
    return Layer(2, group_heads, head_dim, page_size, dtype, pool_dtype, scale, sliding_window, soft_cap, sinks)


# Every value of each parameter at least twice, and beside others: no two layers share two of head size, group and
# dtypes, or two of page size, group and dtypes.
COVERING = [
    _layer(96, 128, 3, "float32", "float32", None, 30.0, True),
    _layer(128, 32, 1, "float32", "float32", 17, None, False),
    _layer(64, 32, 3, "bfloat16", "bfloat16", 1, 30.0, False),
    _layer(256, 16, 1, "bfloat16", "bfloat16", None, 5.0, True),
    _layer(80, 32, 7, "float16", "float16", None, None, False),
    _layer(128, 64, 3, "float16", "float16", 1, 5.0, True),
    _layer(96, 64, 4, "bfloat16", "float8_e4m3fn", None, 5.0, False),
    _layer(128, 16, 7, "bfloat16", "float8_e4m3fn", 100, 30.0, True),
    _layer(64, 64, 1, "float16", "int8", 100, None, False),
    _layer(80, 16, 4, "float16", "int8", 17, 30.0, True),
    _layer(64, 128, 7, "float32", "bfloat16", 17, 5.0, True),
    _layer(96, 16, 16, "float32", "bfloat16", 1, None, False),
    _layer(80, 32, 16, "bfloat16", "float32", 100, 5.0, True),
    _layer(256, 128, 4, "bfloat16", "float32", 1, None, False),
]


def _name(layer: Layer) -> str:
    return f"{layer.head_dim}-{layer.page_size}-{layer.group_heads}-{layer.dtype}-{layer.pool_dtype}"


@pytest.mark.parametrize("layer", COVERING, ids=_name)
def test_a_mixed_step_of_every_size_dtype_and_setting(layer: Layer):
    """Decodes beside a chunk, a whole prompt and a row without tokens."""
    assert_close(Step(layer, [Row(256, 1), Row(200, 17), Row(130, 0), Row(65, 1), Row(9, 9)], 0))


@pytest.mark.parametrize(
    "layer",
    [
        Layer(dtype="bfloat16", pool_dtype="bfloat16", head_dim=128),
        Layer(group_heads=7, dtype="bfloat16", pool_dtype="int8", sliding_window=40, soft_cap=20.0, sinks=True),
    ],
    ids=["plain", "everything"],
)
def test_lengths_at_the_edges_of_pages_blocks_and_chunks(layer: Layer):
    lengths = [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 130, 255, 256]
    for first in range(0, len(lengths), 4):
        assert_close(Step(layer, [Row(length, 1) for length in lengths[first : first + 4]], first))
        assert_close(Step(layer, [Row(length, min(length, 9)) for length in lengths[first : first + 4]], first))


@pytest.mark.parametrize("pool_dtype", QUANTISED_DTYPES)
def test_quantized_values_come_out_within_their_rounding(pool_dtype: str):
    layer = Layer(pool_dtype=pool_dtype)
    step = Step(layer, [Row(200, 1), Row(256, 20), Row(9, 9)], 3)
    assert step.scales is not None
    random = np.random.default_rng(4)
    for number, sequence in enumerate(step.sequences):
        exact = random.standard_normal(sequence.stored[:, 1].shape, dtype=np.float32)
        stored = encode(jnp.asarray(exact), layer.pool_dtype, jnp.asarray(step.scales[1]))
        exact = exact.clip(
            -largest(pool_dtype) * step.scales[1][:, None], largest(pool_dtype) * step.scales[1][:, None]
        )
        sequence.stored[:, 1] = np.asarray(stored)
        # Half a step of int8; half a unit in the last of three bits, or of the least number, of float8_e4m3fn.
        unit = step.scales[1][:, None] * (1.0 if pool_dtype == "int8" else 2.0**-9)
        relative = 0.0 if pool_dtype == "int8" else 2.0**-4
        off = np.abs(np.asarray(decode(stored, jnp.float32)) * step.scales[1][:, None] - exact)
        assert (off <= np.maximum(unit / 2, relative * np.abs(exact)) * (1 + 1e-6)).all()
        wanted = step.expected(number)
        sequence.stored = sequence.stored.astype(np.float64)
        sequence.stored[:, 1] = exact / step.scales[1][:, None]
        assert np.abs(wanted - step.expected(number)).max() <= off.max()
        sequence.stored[:, 1] = np.asarray(decode(stored, jnp.float32))
        sequence.stored = sequence.stored.astype(jnp.dtype(pool_dtype))
    step.pack(random)
    assert_close(step)


@pytest.mark.parametrize("pool_dtype", QUANTISED_DTYPES)
def test_pools_that_the_backend_would_address_wrongly(pool_dtype: str, monkeypatch: pytest.MonkeyPatch):
    """As if every one-byte pool lay between 2^31 and 2^32 bytes: read in pairs, written by XLA."""
    layer = Layer(head_dim=80, pool_dtype=pool_dtype, scale=0.099)
    monkeypatch.setattr(limits, "MAX_32_BIT_OFFSETS", 0)
    assert_close(Step(layer, [Row(200, 1), Row(40, 20), Row(9, 9)], 6))

    random = np.random.default_rng(0)
    qkv = random.standard_normal((5, 2, 6, 80), dtype=np.float32)
    angle = random.uniform(0, 6, (5, 40)).astype(np.float32)
    pool = np.zeros((4, 2, 2, 16, 80), np.int8).view(storage_dtype(pool_dtype, "cpu"))
    slots = np.array([17, 40, 3, 63, 16], np.int32)
    scale = np.full(2, 0.02, np.float32)

    def write(implementation: str) -> list[np.ndarray]:
        arrays = (jnp.asarray(one) for one in (qkv, np.cos(angle), np.sin(angle), pool, slots))
        scales = {"k_scale": jnp.asarray(scale), "v_scale": jnp.asarray(scale)}
        return [
            np.asarray(one)
            for one in rotate_and_write(*arrays, dtype=jnp.float32, implementation=implementation, **scales)
        ]

    for got, wanted in zip(write("triton_interpret"), write("xla"), strict=True):
        # The null page is nobody's.
        np.testing.assert_array_equal(bits(got[1:]), bits(wanted[1:]))


BATCHES = [
    Layer(tokens=1, rows=1, decode_only=True),
    Layer(tokens=8, rows=8, decode_only=True),
    Layer(tokens=16, rows=9, decode_only=True),
    Layer(tokens=40, rows=6),
    Layer(tokens=24, rows=11, max_len=512),
]
VARIANTS = [
    {"dtype": "bfloat16", "pool_dtype": "bfloat16"},
    {"sliding_window": 70, "soft_cap": 10.0, "sinks": True, "group_heads": 3},
]


@pytest.mark.one_lane  # values in interpret mode are what another jax may change; the order of sums is the kernels' own
@pytest.mark.parametrize("variant", VARIANTS, ids=["bfloat16", "window"])
def test_a_decode_has_the_same_bits_in_any_batch_bucket_and_position(variant: dict):
    lengths = [1, 16, 33, 65, 129, 200, 256, 255]
    alone = dataclasses.replace(BATCHES[0], **variant)
    source = Step(dataclasses.replace(BATCHES[1], **variant), [Row(length, 1) for length in lengths], 9)
    random = np.random.default_rng(1)

    def outputs(layer: Layer, order: list[int], more: list[Row]) -> list[np.ndarray]:
        step = Step(layer, [Row(lengths[index], 1) for index in order] + more, int(random.integers(2**31)))
        step.sinks = source.sinks
        step.sequences[: len(order)] = [source.sequences[index] for index in order]
        step.pack(random)
        return step.run()

    wanted = [outputs(alone, [index], [])[0] for index in range(len(lengths))]
    assert all(np.isfinite(one.astype(np.float32)).all() for one in wanted)

    @budget(10, phases=PHASES)
    @given(layer=st.sampled_from(BATCHES[1:]), order=st.permutations(range(len(lengths))), others=st.integers(0, 2**31))
    def check(layer: Layer, order: list[int], others: int) -> None:
        layer = dataclasses.replace(layer, **variant)
        more = [] if layer.decode_only else [Row(20 + others % 100, 9), Row(7, 2)]
        order = order[: layer.rows - len(more)]
        for index, out in zip(order, outputs(layer, order, more), strict=False):
            np.testing.assert_array_equal(bits(out), bits(wanted[index]), err_msg=f"length {lengths[index]}, {layer}")

    check()


@pytest.mark.one_lane  # values in interpret mode are what another jax may change; the order of sums is the kernels' own
def test_a_prompt_has_the_same_bits_in_any_chunks_of_two_or_more():
    layer = Layer(dtype="bfloat16", pool_dtype="bfloat16", sliding_window=30, group_heads=5)
    whole = Step(layer, [Row(40, 40)], 2)
    (wanted, _) = whole.run()

    for split in (2, 5, 16, 21, 38):
        step = Step(layer, [Row(split, split), Row(40, 40 - split)], split)
        full = whole.sequences[0]
        step.sequences = [
            Sequence(full.queries[:split], full.stored[:split]),
            Sequence(full.queries[split:], full.stored),
        ]
        step.pack(np.random.default_rng(split))
        np.testing.assert_array_equal(bits(np.concatenate(step.run()[:2])), bits(wanted))


@pytest.mark.one_lane  # values in interpret mode are what another jax may change; the order of sums is the kernels' own
def test_decode_only_gives_the_bits_of_a_mixed_step():
    layer = Layer(dtype="bfloat16", pool_dtype="float8_e4m3fn", sinks=True, tokens=5)
    mixed = Step(layer, [Row(200, 1), Row(3, 1), Row(77, 1)], 5).run()
    decoded = Step(dataclasses.replace(layer, decode_only=True), [Row(200, 1), Row(3, 1), Row(77, 1)], 5).run()
    for one, other in zip(mixed, decoded, strict=True):
        np.testing.assert_array_equal(bits(one), bits(other))
