"""Work lists, tuning table and limits of the Triton attention kernels."""

import functools
import json
import math
import pathlib
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.pallas_kernels.paged_attention import IMPLEMENTATIONS
from jaxserve.pallas_kernels.paged_attention.triton import kernel_plan as plan
from jaxserve.pallas_kernels.paged_attention.triton import limits, tuning
from jaxserve.pallas_kernels.paged_attention.triton.backend import DEPRECATION, pl, triton
from tests.budgets import budget

DECODE = tuning.DecodeConfig(block=16, chunk=32, splits=4, programs=3, num_warps=4, num_stages=2)
PREFILL = tuning.PrefillConfig(tile=32, block=16, num_warps=4, num_stages=2)
ROWS, TOKENS, GROUP_HEADS = 5, 40, 3


@functools.cache
def _decode_plan(max_len: int, window: int | None):
    def arrays(lengths, starts):
        table = jnp.zeros((ROWS, max_len // 16), jnp.int32)
        return plan.plan_decode(lengths, starts, table, 16, window, DECODE)[:3]

    return jax.jit(arrays)


@functools.cache
def _prefill_plan():
    return jax.jit(lambda lengths, starts: plan.plan_prefill(lengths, starts, TOKENS, GROUP_HEADS, PREFILL).tiles)


@st.composite
def rows(draw: st.DrawFn, max_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths and starts of rows whose tokens fit the bucket; empty rows may lie between others."""
    lengths, starts = [], [0]
    for _ in range(ROWS):
        count = draw(st.one_of(st.sampled_from([0, 1]), st.integers(0, TOKENS)))
        count = min(count, TOKENS - starts[-1])
        lengths.append(draw(st.integers(count, max_len)) if count else 0)
        starts.append(starts[-1] + count)
    return np.array(lengths, np.int32), np.array(starts, np.int32)


@pytest.mark.parametrize("window", [None, 1, 50])
@budget(60)
@given(case=rows(500))
def test_decode_items_cover_what_a_token_sees_once(window: int | None, case: tuple[np.ndarray, np.ndarray]):
    lengths, starts = case
    items, ends, chunks = (np.asarray(one) for one in _decode_plan(512, window)(lengths, starts))
    decodes = np.flatnonzero(np.diff(starts) == 1)
    assert set(np.flatnonzero(chunks)) == set(decodes)
    splits = plan.max_splits(512, window, DECODE)
    assert chunks.max(initial=0) <= splits
    assert ends[-1] == chunks.sum()
    for row in decodes:
        own = items[: ends[-1]][items[: ends[-1], plan.ITEM_ROW] == row]
        oldest = 0 if window is None else max(0, lengths[row] - window)
        begins, stops = own[:, plan.ITEM_BEGIN], own[:, plan.ITEM_END]
        assert begins[0] == oldest // DECODE.block * DECODE.block
        assert stops[-1] == lengths[row]
        assert (begins[1:] == stops[:-1]).all()
        assert (begins < stops).all()
        assert (begins % DECODE.block == 0).all()
        assert (own[:, plan.ITEM_SLOT] == row * splits + np.arange(len(own))).all()
        assert (own[:, plan.ITEM_TOKEN] == starts[row]).all()
        assert (own[:, plan.ITEM_OLDEST] == oldest).all()


@given(length=st.integers(1, 500))
def test_chunks_of_a_row_do_not_depend_on_how_long_rows_may_become(length: int):
    span = jnp.array([length], jnp.int32)
    assert plan.chunk_lengths(span, 512, DECODE) == plan.chunk_lengths(span, 1 << 20, DECODE)


@budget(60)
@given(case=rows(500))
def test_prefill_tiles_cover_prompts_and_padding_once(case: tuple[np.ndarray, np.ndarray]):
    lengths, starts = case
    tiles = np.asarray(_prefill_plan()(lengths, starts))
    seen = []
    for row, first, count, position in tiles:
        assert 0 <= count <= PREFILL.tile // GROUP_HEADS
        tokens = range(first, first + count)
        seen += tokens
        if position == plan.PADDING:
            assert count == 0 or first >= starts[-1]
        elif count:
            assert starts[row] <= first
            assert first + count <= starts[row + 1]
            assert position == lengths[row] - starts[row + 1] + first
    computed = [token for row in range(ROWS) for token in range(starts[row], starts[row + 1])]
    alone = {starts[row] for row in range(ROWS) if starts[row + 1] - starts[row] == 1}
    assert sorted(seen) == sorted((set(computed) | set(range(starts[-1], TOKENS))) - alone)


def test_plans_hold_no_loop_and_no_sort():
    lengths, starts = jnp.ones(ROWS, jnp.int32), jnp.arange(ROWS + 1, dtype=jnp.int32)
    for function in (_decode_plan(512, 50), _prefill_plan()):
        text = function.lower(lengths, starts).compile().as_text()
        assert " while(" not in text
        assert " sort(" not in text
        assert " custom-call(" not in text


def test_partial_results_of_the_largest_batch_stay_small():
    """llama.gin: 256 rows, 131,072 positions, 8 key-value heads, groups of 4, head size 128."""
    for entry, config in tuning.load():
        if entry["kernel"] == "decode" and entry["device"] != tuning.INTERPRET_DEVICE:
            slots = 256 * plan.max_splits(131072, None, config)
            assert slots * 8 * 4 * (128 + 2) * 4 <= 150e6


def test_every_entry_of_the_table_is_the_answer_to_some_question():
    keys = [
        tuple(entry.get(key) for key in ("device", "kernel", "dtype", "pool_dtype", "head_dim"))
        for entry, _ in tuning.load()
    ]
    assert len(set(keys)) == len(keys)
    for (device, kernel, dtype, pool_dtype, head_dim), (_, config) in zip(keys, tuning.load(), strict=True):
        pool_dtype = pool_dtype or dtype or "bfloat16"
        assert tuning.lookup(device, kernel, dtype or "bfloat16", pool_dtype, head_dim or 96) == config


@pytest.mark.parametrize("kernel", ["decode", "prefill"])
def test_look_up_prefers_the_device_then_dtype_then_pool_then_head_size(kernel: str, tmp_path: pathlib.Path):
    base = {"decode": DECODE, "prefill": PREFILL}[kernel]
    order = [
        {"device": "default"},
        {"device": "default", "dtype": "float32", "pool_dtype": "int8", "head_dim": 64},
        {"device": "Some GPU"},
        {"device": "Some GPU", "head_dim": 64},
        {"device": "Some GPU", "pool_dtype": "int8"},
        {"device": "Some GPU", "dtype": "float32"},
    ]
    for most in range(1, len(order) + 1):
        config = {name: getattr(base, name) for name in base.__dataclass_fields__}
        entries = [
            {**entry, "kernel": kernel, "config": {**config, "num_stages": 1 + n}} for n, entry in enumerate(order)
        ]
        path = tmp_path / f"{most}.json"
        path.write_text(json.dumps(entries[:most]))
        assert tuning.lookup("Some GPU 80GB", kernel, "float32", "int8", 64, path).num_stages == most
        assert tuning.lookup("Some GPUs", kernel, "float32", "int8", 64, path).num_stages == min(most, 2)


def test_a_malformed_table_is_refused(tmp_path: pathlib.Path):
    path = tmp_path / "table.json"
    entry = {
        "device": "default",
        "kernel": "prefill",
        "config": {"tile": 24, "block": 16, "num_warps": 4, "num_stages": 1},
    }
    path.write_text(json.dumps([entry]))
    with pytest.raises(
        ValueError, match=r"entry 0 of table.json: tile is 24; it must be a power of two from 16 to 256"
    ):
        tuning.lookup("default", "prefill", "float32", "float32", 64, path)
    path = tmp_path / "other.json"
    path.write_text(json.dumps([{**entry, "head_size": 64}]))
    with pytest.raises(ValueError, match=r"entry 0 of other.json is malformed"):
        tuning.load(path)
    path = tmp_path / "empty.json"
    path.write_text("[]")
    with pytest.raises(ValueError, match="no decode entry for default"):
        tuning.lookup("default", "decode", "float32", "float32", 64, path)


@pytest.mark.parametrize(
    ("field", "value"), [("block", 8), ("block", 24), ("chunk", 8), ("splits", 0), ("programs", 0), ("num_stages", 9)]
)
def test_decode_configurations_are_checked(field: str, value: int):
    fields = {name: getattr(DECODE, name) for name in DECODE.__dataclass_fields__}
    with pytest.raises(ValueError, match=f"{field} is {value}; it must be"):
        tuning.DecodeConfig(**{**fields, field: value})


def _pool(num_pages: int, dtype: str, page: tuple[int, ...] = (2, 8, 16, 128)) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((num_pages, *page), jnp.dtype(dtype))


# A page of 2 * 8 * 16 * 128 elements is 2^15: 2^16 pages are 2^31 elements.
@pytest.mark.parametrize(
    ("dtype", "num_pages", "wanted"),
    [
        ("int8", 2**16, True),
        ("int8", 2**16 + 1, False),
        ("float8_e4m3fn", 2**17, False),
        ("int8", 2**17 + 1, True),
        ("bfloat16", 2**16, True),
        ("bfloat16", 2**16 + 1, True),
        ("float32", 2**15 + 1, True),
    ],
)
def test_offsets_of_32_bits_reach_the_whole_pool_or_are_not_used(
    dtype: str, num_pages: int, wanted: bool, capfd: pytest.CaptureFixture[str]
):
    """The backend's own choice, in the program that it hands to Triton: 32 signed bits unless the array is larger."""
    pool = _pool(num_pages, dtype)
    assert limits.addressable(pool) == wanted
    bits, size = _offset_bits(pool, capfd), math.prod(pool.shape)
    assert (size <= 2 ** (bits - 1)) == wanted


def _offset_bits(pool: jax.ShapeDtypeStruct, capfd: pytest.CaptureFixture[str]) -> int:
    """Bits of the offsets that the backend adds to the pointer to `pool`."""

    def kernel(pool_ref, page_ref, out_ref):
        lane = jnp.arange(16, dtype=jnp.int32)
        out_ref[...] = triton.load(pool_ref.at[page_ref[0], 1, 7, 15, lane])

    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((16,), pool.dtype),
        compiler_params=triton.CompilerParams(num_warps=1),
        debug=True,
    )
    device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=DEPRECATION, category=DeprecationWarning)
        jax.jit(call).trace(pool, jax.ShapeDtypeStruct((1,), jnp.int32)).lower(lowering_platforms=("cuda",))
    text = capfd.readouterr().out
    found = re.findall(r"tt\.addptr .*tensor<16xi(32|64)>", text)
    assert found
    return int(found[0])


@pytest.mark.parametrize(
    ("page", "group_heads", "message"),
    [
        ((2, 8, 16, 512), 4, "head_dim is 512"),
        ((2, 8, 16, 65), 4, "head_dim is 65"),
        ((2, 8, 16, 128), 17, "17 query heads"),
        ((2, 8, 8, 128), 4, "page_size is 8; the Triton kernels take at least 16: raise it or choose 'xla'"),
    ],
)
def test_sizes_past_the_limits_are_refused(page: tuple[int, ...], group_heads: int, message: str):
    check = IMPLEMENTATIONS["triton"].check
    assert check is not None
    with pytest.raises(ValueError, match=message):
        check(_pool(9, "bfloat16", page), 64, group_heads)


def test_float8_is_refused_where_the_device_cannot_cast_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limits, "device_kind", lambda: "NVIDIA A100-SXM4-80GB")
    limits.check(_pool(9, "int8"), 64, 4)
    with pytest.raises(ValueError, match=r"A100.*8\.9"):
        limits.check(_pool(9, "float8_e4m3fn"), 64, 4)
    monkeypatch.setattr(limits, "device_kind", lambda: "NVIDIA H200")
    limits.check(_pool(9, "float8_e4m3fn"), 64, 4)
