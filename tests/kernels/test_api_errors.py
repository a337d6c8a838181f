"""Arguments that do not fit are refused with the field, its value and the limit."""

import dataclasses

import jax
import pytest

from jaxserve.pallas_kernels.paged_attention import (
    AttentionSpec,
    Use,
    choose,
    kv_write,
    paged_attention,
    pool_spec,
    rotate_and_write,
)
from jaxserve.pallas_kernels.paged_attention.cpu import attention_calls as calls
from tests.kernels.packing import needs_avx512_bf16

T, R, K, G, D = 8, 3, 2, 2, 40


def _shape(*size: int, dtype: str = "int32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(size, dtype)


ATTENTION = {
    "q": _shape(T, K, G, D, dtype="float32"),
    "pool": _shape(5, 2, K, 16, D, dtype="float32"),
    "page_table": _shape(R, 4),
    "kv_lens": _shape(R),
    "query_start_loc": _shape(R + 1),
}
WRITE = {
    "pool": _shape(5, 2, K, 16, D, dtype="float32"),
    "k": _shape(T, K, D, dtype="float32"),
    "v": _shape(T, K, D, dtype="float32"),
    "slot_mapping": _shape(T),
}


ROTATE = {
    "qkv": _shape(T, K, G + 2, D, dtype="float32"),
    "cos": _shape(T, D // 2, dtype="float32"),
    "sin": _shape(T, D // 2, dtype="float32"),
    "pool": WRITE["pool"],
    "slot_mapping": WRITE["slot_mapping"],
}
INT8 = _shape(5, 2, K, 16, D, dtype="int8")
SCALE = _shape(K, dtype="float32")
OPTIONAL = ("k_scale", "v_scale", "sinks")


def _attend(*, scale: float = 1.0, **changes):
    static = {name: changes.pop(name) for name in list(changes) if name not in (*ATTENTION, *OPTIONAL)}
    return jax.eval_shape(lambda arrays: paged_attention(**arrays, scale=scale, **static), ATTENTION | changes)


def _write(implementation: str = "xla", **changes):
    return jax.eval_shape(lambda arrays: kv_write(**arrays, implementation=implementation), WRITE | changes)


def _rotate(dtype: str = "bfloat16", implementation: str = "xla", **changes):
    return jax.eval_shape(
        lambda arrays: rotate_and_write(**arrays, dtype=dtype, implementation=implementation), ROTATE | changes
    )


def test_fitting_arguments_pass():
    assert _attend().shape == (T, K, G, D)
    assert _attend(q=_shape(T, K, 32, D, dtype="float32")).shape == (T, K, 32, D)
    assert _attend(q=_shape(T, K, 33, D, dtype="float32"), implementation="reference").shape == (T, K, 33, D)
    assert _attend(pool=INT8, k_scale=SCALE, v_scale=SCALE, decode_only=True).dtype == "float32"
    assert _write().shape == (5, 2, K, 16, D)
    assert _write(pool=INT8, k_scale=SCALE, v_scale=SCALE).dtype == "int8"
    q, pool = _rotate()
    assert (q.shape, q.dtype, pool.dtype) == ((T, K, G, D), "bfloat16", "float32")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": _shape(T, K, G, D)}, "q has dtype int32; it must be one of float32, bfloat16, float16"),
        ({"q": _shape(T, K, G, D, dtype="float8_e4m3fn")}, "q has dtype float8_e4m3fn; it must be one of"),
        ({"q": _shape(T, 3, G, D, dtype="float32")}, r"q has shape \[8, 3, 2, 40\]; it must be \[8, 2, 2, 40\]"),
        ({"q": _shape(T, K, D, dtype="float32")}, r"q has shape \[8, 2, 40\]"),
        ({"q": _shape(0, K, G, D, dtype="float32")}, r"q has shape \[0, 2, 2, 40\]; every size must be at least 1"),
        ({"q": _shape(T, K, 33, D, dtype="float32")}, "q has 33 query heads a key-value head; 'xla' takes at most 32"),
        ({"pool": _shape(5, K, 16, D, dtype="float32")}, r"pool has shape \[5, 2, 16, 40\]; it must be \[num_pages, 2"),
        ({"pool": _shape(5, 2, K, 48, D, dtype="float32")}, "page_size is 48; it must be one of"),
        (
            {"pool": _shape(5, 2, K, 16, D, dtype="int32")},
            "pool has dtype int32; it must hold one of float32, bfloat16",
        ),
        ({"pool": INT8}, r"k_scale is None for a pool of int8; it must be float32 \[kv_heads\]"),
        ({"pool": INT8, "k_scale": SCALE}, "v_scale is None for a pool of int8"),
        ({"k_scale": SCALE}, "k_scale is given for a pool of float32; only a quantized pool takes one"),
        ({"pool": INT8, "k_scale": SCALE, "v_scale": _shape(K)}, "v_scale has dtype int32; it must be float32"),
        ({"pool": INT8, "k_scale": _shape(K, 1), "v_scale": SCALE}, r"k_scale has shape \[2, 1\]; it must be \[2\]"),
        ({"sinks": _shape(G, K + 1, dtype="float32")}, r"sinks has shape \[2, 3\]; it must be \[2, 2\]"),
        ({"sinks": _shape(K, G, dtype="bfloat16")}, "sinks has dtype bfloat16; it must be float32"),
        ({"page_table": _shape(R + 1, 4)}, r"page_table has shape \[4, 4\]; it must be \[3, 4\]"),
        ({"page_table": _shape(R, 0)}, r"page_table has shape \[3, 0\]; every size must be at least 1"),
        ({"page_table": _shape(R, 4, dtype="uint32")}, "page_table has dtype uint32; it must be int32"),
        ({"query_start_loc": _shape(R)}, r"query_start_loc has shape \[3\]; it must be \[4\]"),
        ({"kv_lens": _shape(R, dtype="float32")}, "kv_lens has dtype float32; it must be int32"),
        ({"kv_lens": _shape(R, 1)}, r"kv_lens has shape \[3, 1\]; it must be \[3\]"),
        ({"implementation": "triton!"}, "implementation is 'triton!'; it must be one of "),
        ({"cascade": "always"}, "cascade is 'always'; it must be one of auto, on, off"),
        ({"sliding_window": 0}, "sliding_window is 0; it must be None or at least 1"),
        ({"soft_cap": 0.0}, "soft_cap is 0.0; it must be None or a finite number above 0"),
        ({"scale": float("nan")}, "scale is nan; it must be finite"),
    ],
)
def test_attention_refuses(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        _attend(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": _shape(T, 3, D, dtype="float32")}, r"k has shape \[8, 3, 40\]; it must be \[8, 2, 40\]"),
        ({"v": _shape(T + 1, K, D, dtype="float32")}, r"v has shape \[9, 2, 40\]; it must be \[8, 2, 40\]"),
        ({"v": _shape(T, K, D, dtype="bfloat16")}, "v has dtype bfloat16; it must be float32"),
        ({"k": _shape(T, K, D), "v": _shape(T, K, D)}, "k has dtype int32; it must be one of float32"),
        ({"pool": INT8, "v_scale": SCALE}, "k_scale is None for a pool of int8"),
        ({"v_scale": SCALE}, "v_scale is given for a pool of float32"),
        ({"slot_mapping": _shape(T - 1)}, r"slot_mapping has shape \[7\]; it must be \[8\]"),
        ({"slot_mapping": _shape(T, dtype="uint32")}, "slot_mapping has dtype uint32; it must be int32"),
        ({"implementation": ""}, "implementation is ''"),
    ],
)
def test_kv_write_refuses(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        _write(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"qkv": _shape(T, 3, G + 2, D, dtype="float32")},
            r"qkv has shape \[8, 3, 4, 40\]; it must be \[8, 2, 4, 40\]",
        ),
        ({"qkv": _shape(T, K, 2, D, dtype="float32")}, "qkv has 2 heads a key-value head; it must have at least 3"),
        ({"qkv": _shape(T, K, G + 2, D, dtype="float16")}, "qkv has dtype float16; it must be float32 or dtype, which"),
        ({"cos": _shape(T, D, dtype="float32")}, r"cos has shape \[8, 40\]; it must be \[8, 20\]"),
        ({"sin": _shape(T, D // 2, dtype="bfloat16")}, "sin has dtype bfloat16; it must be float32"),
        ({"slot_mapping": _shape(T - 1)}, r"slot_mapping has shape \[7\]; it must be \[8\]"),
        ({"dtype": "int8"}, "dtype is int8; it must be one of float32, bfloat16, float16"),
        ({"pool": INT8, "k_scale": SCALE}, "v_scale is None for a pool of int8"),
        ({"implementation": ""}, "implementation is ''"),
    ],
)
def test_rotate_and_write_refuses(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        _rotate(**changes)


def test_an_odd_head_dimension_cannot_be_rotated():
    odd = {"qkv": _shape(T, K, G + 2, 5, dtype="float32"), "pool": _shape(5, 2, K, 16, 5, dtype="float32")}
    with pytest.raises(ValueError, match="qkv has head dimension 5; it must be even to be rotated"):
        _rotate(**odd)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_pages": 1}, "num_pages is 1; it must be at least 2"),
        ({"num_kv_heads": 0}, "num_kv_heads is 0; it must be at least 1"),
        ({"head_dim": 0}, "head_dim is 0; it must be at least 1"),
        ({"page_size": 24}, "page_size is 24; it must be one of"),
        ({"num_pages": 2**24, "page_size": 128}, "it must be at most 2147483647"),
        ({"dtype": "int32"}, "dtype is int32; it must be one of float32, bfloat16, float16, float8_e4m3fn"),
    ],
)
def test_pool_spec_refuses(changes: dict, message: str):
    sizes = {"num_pages": 5, "num_kv_heads": 2, "page_size": 16, "head_dim": 40, "dtype": "float32"}
    with pytest.raises(ValueError, match=message):
        pool_spec(**sizes | changes)


BFLOAT = {"q": _shape(T, K, G, 64, dtype="bfloat16"), "pool": _shape(5, 2, K, 16, 64, dtype="bfloat16")}


@needs_avx512_bf16
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pool": ATTENTION["pool"], "q": ATTENTION["q"]}, "pool holds float32; 'cpu' takes bfloat16: choose 'xla'"),
        ({"q": _shape(T, K, G, 64, dtype="float32")}, "q has dtype float32; 'cpu' takes bfloat16 with"),
        ({"pool": _shape(5, 2, K, 8, 64, dtype="bfloat16")}, "page_size is 8; 'cpu' takes at least 16: raise it or"),
        (
            {"pool": _shape(5, 2, K, 16, 48, dtype="bfloat16"), "q": _shape(T, K, G, 48, dtype="bfloat16")},
            "head_dim is 48; 'cpu' takes multiples of 32: choose 'xla'",
        ),
    ],
)
def test_cpu_refuses(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        _attend(**BFLOAT | changes, implementation="cpu")


USE = Use("bfloat16", "bfloat16", 16, 64, 3)


@needs_avx512_bf16
def test_cpu_serves_models_of_bfloat16():
    assert choose("cpu", use=USE) == choose("cpu", "cpu", USE) == "cpu"
    for change, instead, message in (
        ({"dtype": "float32"}, "cpu_float32", "dtype is float32; 'cpu' takes bfloat16"),
        ({"kv_cache_dtype": "int8"}, "xla", "pool holds int8; 'cpu' takes bfloat16"),
        ({"page_size": 4}, "xla", "page_size is 4; 'cpu' takes at least 16"),
        ({"head_dim": 80}, "xla", "head_dim is 80; 'cpu' takes multiples of 32"),
    ):
        use = dataclasses.replace(USE, **change)
        assert choose("cpu", use=use) == instead
        with pytest.raises(ValueError, match=message):
            choose("cpu", "cpu", use)


def test_a_cpu_without_the_instructions_falls_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(calls.features, "has", lambda name: False)
    assert choose("cpu", use=USE) == "cpu_float32"
    with pytest.raises(ValueError, match="this CPU has no avx512_bf16, which 'cpu' needs"):
        choose("cpu", "cpu", USE)
    half = Use("float16", "float16", 16, 64, 3)
    assert choose("cpu", use=half) == "cpu_float32"
    monkeypatch.setattr(calls.elements, "converts_float16", lambda: False)
    assert choose("cpu", use=half) == "xla"
    with pytest.raises(ValueError, match="this CPU has no f16c, which 'cpu_float32' needs for float16"):
        choose("cpu", "cpu_float32", half)


def test_cpu_float32_serves_pages_that_are_not_quantized():
    use = Use("float32", "float32", 16, 32, 2)
    for change in ({}, {"kv_cache_dtype": "bfloat16"}, {"dtype": "float16", "kv_cache_dtype": "float16"}):
        assert choose("cpu", use=dataclasses.replace(use, **change)) == "cpu_float32"
    for change, message in (
        ({"dtype": "bfloat16"}, "dtype is bfloat16; 'cpu_float32' takes float32 with pages of float32: choose 'xla'"),
        ({"kv_cache_dtype": "int8"}, "pool holds int8; 'cpu_float32' takes float32, bfloat16, float16: choose 'xla'"),
        ({"page_size": 8}, "page_size is 8; 'cpu_float32' takes at least 16: raise it or choose 'xla'"),
        ({"head_dim": 48}, "head_dim is 48; 'cpu_float32' takes multiples of 32: choose 'xla'"),
    ):
        other = dataclasses.replace(use, **change)
        assert choose("cpu", use=other) == "xla"
        with pytest.raises(ValueError, match=message):
            choose("cpu", "cpu_float32", other)


def test_choose():
    assert choose("cpu") == choose("gpu", "xla") == "xla"
    assert choose("cpu", "reference") == "reference"
    with pytest.raises(ValueError, match="implementation is 'mosaic'"):
        choose("cpu", "mosaic")


def test_spec_is_hashable():
    assert {AttentionSpec(1.0, 5, 2.0): 1}[AttentionSpec(1.0, 5, 2.0)] == 1
