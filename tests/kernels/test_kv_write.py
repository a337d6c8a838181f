"""The KV write: the right places and no others, and no pool-sized work in the compiled step."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.pallas_kernels.paged_attention import (
    kv_write,
    new_pool,
    paged_attention,
    pool_spec,
    rotate_and_write,
    storage_dtype,
    value_dtype,
)
from jaxserve.pallas_kernels.paged_attention.cast import decode, encode
from jaxserve.pallas_kernels.paged_attention.pool import QUANTISED_DTYPES
from tests.budgets import budget
from tests.kernels.packing import arranged, needs_avx512_bf16, plain

PAGES, HEADS, PAGE_SIZE, DIM, TOKENS = 6, 2, 16, 40, 12


IMPLEMENTATIONS = ["xla", "reference", "triton_interpret"]
FLOATS = ["float32", "bfloat16", "float16"]
# Dtypes of the model and of the pool.
PAIRS = [(dtype, dtype) for dtype in FLOATS] + [
    ("bfloat16", "float8_e4m3fn"),
    ("float32", "int8"),
    ("float16", "int8"),
    ("float32", "bfloat16"),
]


def stored(x: np.ndarray, dtype: str, scale: np.ndarray | None) -> np.ndarray:
    """What a pool of `dtype` holds of x [..., K, D]."""
    if scale is None:
        return x.astype(dtype)
    limit = {"int8": 127, "float8_e4m3fn": 448}[dtype]
    x = np.clip(x.astype(np.float32) * (np.float32(1) / scale)[:, None], -limit, limit)
    return (np.rint(x) if dtype == "int8" else x).astype(dtype)


def scales_of(pool_dtype: str, heads: int, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Scales with which some numbers of a normal distribution saturate."""
    if pool_dtype not in QUANTISED_DTYPES:
        return {}
    limit = {"int8": 127, "float8_e4m3fn": 448}[pool_dtype]
    return {name: (random.uniform(1, 3, heads) / limit).astype(np.float32) for name in ("k_scale", "v_scale")}


def compiled(function, implementation: str, **settings):
    """The function over one implementation. An interpreted kernel takes longer to optimize than it runs in a test."""
    options = {"xla_backend_optimization_level": 0} if implementation == "triton_interpret" else None
    return jax.jit(functools.partial(function, implementation=implementation, **settings), compiler_options=options)


@functools.cache
def writer(implementation: str):
    return compiled(kv_write, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("dtype", "pool_dtype"), PAIRS)
def test_writes_each_slot_and_nothing_else_outside_the_null_page(dtype: str, pool_dtype: str, implementation: str):
    @budget(5 if implementation == "triton_interpret" else 20)
    @given(
        slots=st.lists(st.integers(PAGE_SIZE, PAGES * PAGE_SIZE - 1), unique=True, max_size=TOKENS),
        seed=st.integers(0, 2**31),
    )
    def check(slots: list[int], seed: int) -> None:
        random = np.random.default_rng(seed)
        k, v = random.standard_normal((2, TOKENS, HEADS, DIM)).astype(jnp.dtype(dtype))
        scales = scales_of(pool_dtype, HEADS, random)
        before = random.standard_normal((PAGES, 2, HEADS, PAGE_SIZE, DIM)).astype(pool_dtype)
        if pool_dtype != "int8":
            before[random.random(before.shape) < 0.5] = np.nan
        wanted = before.copy()
        for token, slot in enumerate(slots):
            place = slot // PAGE_SIZE, slice(None), slot % PAGE_SIZE
            wanted[place[0], 0, *place[1:]] = stored(k, pool_dtype, scales.get("k_scale"))[token]
            wanted[place[0], 1, *place[1:]] = stored(v, pool_dtype, scales.get("v_scale"))[token]
        # Padding tokens hold no numbers.
        k[len(slots) :] = v[len(slots) :] = np.nan
        padding = random.choice([0, 5, PAGE_SIZE - 1], TOKENS - len(slots)).tolist()
        pool = jnp.asarray(before.view(storage_dtype(pool_dtype, "cpu")))
        arguments = (jnp.asarray(k), jnp.asarray(v), jnp.asarray(slots + padding, jnp.int32))
        after = writer(implementation)(pool, *arguments, **{name: jnp.asarray(x) for name, x in scales.items()})
        after = np.asarray(after).view(np.uint8)
        np.testing.assert_array_equal(after[1:], wanted[1:].view(np.uint8))
        if implementation == "triton_interpret":
            np.testing.assert_array_equal(after[0], before[0].view(np.uint8))

    check()


@pytest.mark.parametrize("dtype", QUANTISED_DTYPES)
def test_quantized_numbers_are_the_nearest_and_saturate(dtype: str):
    """Against distances in float64; the product with the reciprocal of the scale is off by two roundings in float32."""
    scale = np.array([0.037, 3.0], np.float32)
    grid = np.linspace(-600, 600, 4801, dtype=np.float32)
    x = (grid[:, None] * scale)[..., None]
    storage = storage_dtype(dtype, "cpu")
    held = np.asarray(decode(encode(jnp.asarray(x), storage, jnp.asarray(scale)), jnp.float32))[..., 0].astype(float)
    exact = x[..., 0].astype(np.float64) / scale
    limit, smallest = {"int8": (127, 1.0), "float8_e4m3fn": (448, 2.0**-9)}[dtype]
    exponent = np.floor(np.log2(np.maximum(np.abs(exact), smallest * 8)))
    step = np.ones_like(exact) if dtype == "int8" else 2.0 ** (exponent - 3)
    inside = np.abs(exact) <= limit
    bound = step / 2 + np.abs(exact) * 2.0**-22
    assert (np.abs(held - exact) <= bound)[inside].all()
    np.testing.assert_array_equal(held[~inside], np.sign(exact[~inside]) * limit)
    assert (held == np.rint(held)).all() or dtype != "int8"


@pytest.mark.parametrize(
    ("implementation", "dtype", "pool_dtype"),
    [
        pytest.param("cpu", "bfloat16", "bfloat16", marks=needs_avx512_bf16),
        pytest.param("cpu", "float32", "bfloat16", marks=needs_avx512_bf16),
        ("cpu_float32", "float32", "float32"),
        ("cpu_float32", "float32", "bfloat16"),
        ("cpu_float32", "float16", "float16"),
    ],
)
@pytest.mark.parametrize("page_size", [16, 64])
def test_cpu_writes_each_slot_and_nothing_else(page_size: int, implementation: str, dtype: str, pool_dtype: str):
    random = np.random.default_rng(page_size)
    slots = random.permutation(PAGES * page_size)[:50].astype(np.int32)
    k, v = random.standard_normal((2, len(slots), HEADS, 96)).astype(jnp.dtype(dtype))
    before = random.standard_normal((PAGES, 2, HEADS, page_size, 96)).astype(jnp.dtype(pool_dtype))
    wanted = before.copy()
    for token, slot in enumerate(slots):
        page, offset = slot // page_size, slot % page_size
        wanted[page, 0, :, offset], wanted[page, 1, :, offset] = k[token], v[token]
    pool = jnp.asarray(arranged(before, implementation).view(storage_dtype(pool_dtype, "cpu")))
    after = writer(implementation)(pool, jnp.asarray(k), jnp.asarray(v), jnp.asarray(slots))
    np.testing.assert_array_equal(
        plain(np.asarray(after), implementation)[1:].view(np.uint8), wanted[1:].view(np.uint8)
    )


@dataclasses.dataclass(frozen=True)
class Heads:
    """Sizes of a fused write: tokens, key-value heads, query heads for each, head dimension and page size."""

    tokens: int
    kv_heads: int
    group_heads: int
    head_dim: int
    page_size: int


HEADS_AND_DTYPES = [
    (Heads(11, 2, 4, 64, 16), "float32", "float32"),
    (Heads(5, 1, 16, 80, 32), "bfloat16", "bfloat16"),
    (Heads(9, 3, 1, 96, 16), "float16", "float16"),
    (Heads(13, 2, 3, 128, 64), "bfloat16", "float8_e4m3fn"),
    (Heads(6, 1, 2, 256, 128), "bfloat16", "int8"),
    (Heads(7, 2, 5, 48, 16), "float32", "int8"),
]


CPU_HEADS_AND_DTYPES = [
    pytest.param(heads, "bfloat16", "bfloat16", "cpu", marks=needs_avx512_bf16, id=str(heads))
    for heads in (Heads(11, 2, 4, 64, 16), Heads(5, 1, 16, 96, 32), Heads(17, 3, 1, 128, 128))
] + [
    (Heads(11, 2, 4, 64, 16), "float32", "float32", "cpu_float32"),
    (Heads(5, 1, 16, 96, 32), "bfloat16", "bfloat16", "cpu_float32"),
    (Heads(17, 3, 1, 128, 128), "float16", "float16", "cpu_float32"),
    (Heads(9, 2, 2, 32, 16), "float32", "bfloat16", "cpu_float32"),
]


@pytest.mark.parametrize(
    ("shape", "dtype", "pool_dtype", "implementation"),
    [
        *((*case, implementation) for implementation in ("xla", "triton_interpret") for case in HEADS_AND_DTYPES),
        *CPU_HEADS_AND_DTYPES,
    ],
    ids=str,
)
def test_rotates_and_writes_in_one_go(shape: Heads, dtype: str, pool_dtype: str, implementation: str):
    """Against float64. A pair's products and their sum are rounded in float32, the result once more to the dtype."""
    pages = 5
    run = compiled(rotate_and_write, implementation, dtype=dtype)
    epsilon = float(jnp.finfo(dtype).eps)

    @budget(4)
    @given(data=st.data(), seed=st.integers(0, 2**31))
    def check(data: st.DataObject, seed: int) -> None:
        random = np.random.default_rng(seed)
        slot = st.integers(-3, pages * shape.page_size + 3)
        slots = data.draw(st.lists(slot, unique=True, min_size=shape.tokens, max_size=shape.tokens))
        qkv = 3 * random.standard_normal((shape.tokens, shape.kv_heads, shape.group_heads + 2, shape.head_dim))
        qkv = qkv.astype(np.float32)
        angle = random.uniform(-9, 9, (shape.tokens, shape.head_dim // 2)).astype(np.float32)
        cos, sin = np.cos(angle), np.sin(angle)
        scales = scales_of(pool_dtype, shape.kv_heads, random)
        size = (pages, 2, shape.kv_heads, shape.page_size, shape.head_dim)
        before = random.integers(0, 128, size).astype(np.int8).astype(pool_dtype)
        before = before.view(storage_dtype(pool_dtype, "cpu"))
        q, pool = run(
            *(jnp.asarray(x) for x in (qkv, cos, sin, arranged(before, implementation))),
            jnp.asarray(slots, jnp.int32),
            **{name: jnp.asarray(x) for name, x in scales.items()},
        )

        low, high = np.split(qkv[:, :, :-1].astype(np.float64), 2, axis=-1)
        cos, sin = (x[:, None, None].astype(np.float64) for x in (cos, sin))
        exact = np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)
        magnitude = np.concatenate([abs(low * cos) + abs(high * sin), abs(high * cos) + abs(low * sin)], axis=-1)
        off = magnitude * 2.0**-22 + abs(exact) * epsilon
        assert (abs(np.asarray(q, np.float64) - exact[:, :, :-1]) <= off[:, :, :-1]).all()

        after = plain(np.asarray(pool), implementation)
        held = after.view(pool_dtype).astype(np.float64)
        untouched = np.ones((pages, shape.page_size), bool)
        for token, slot in enumerate(slots):
            page, offset = slot // shape.page_size, slot % shape.page_size
            if not 1 <= page < pages:
                continue
            untouched[page, offset] = False
            v = qkv[token, :, -1].astype(dtype)
            np.testing.assert_array_equal(
                after[page, 1, :, offset].view(pool_dtype), stored(v, pool_dtype, scales.get("v_scale"))
            )
            key, scale, error = exact[token, :, -1], 1.0, off[token, :, -1]
            if scales:
                # Then the rounding to the pool's dtype: half a step, and two more roundings in float32.
                scale = scales["k_scale"][:, None].astype(np.float64)
                limit = {"int8": 127.0, "float8_e4m3fn": 448.0}[pool_dtype]
                key, error = np.clip(key / scale, -limit, limit), error / scale
                exponent = np.floor(np.log2(np.maximum(abs(key) + error, 2.0**-6)))
                error = error + abs(key) * 2.0**-22 + (0.5 if pool_dtype == "int8" else 2.0 ** (exponent - 4))
            elif pool_dtype != dtype:
                error = error + abs(key) * float(jnp.finfo(pool_dtype).eps)
            assert (abs(held[page, 0, :, offset] - key) <= error).all()
        untouched[0] = implementation == "triton_interpret"
        kept, was = (x.transpose(0, 3, 1, 2, 4)[untouched] for x in (after, before))
        np.testing.assert_array_equal(kept, was)

    check()


@pytest.mark.parametrize(
    "implementation", [*IMPLEMENTATIONS, "cpu_float32", pytest.param("cpu", marks=needs_avx512_bf16)]
)
def test_a_slot_outside_the_pool_writes_nothing(implementation: str):
    dim, dtype = {"cpu": (64, "bfloat16"), "cpu_float32": (64, "float32")}.get(implementation, (DIM, "float32"))
    slots = jnp.asarray([-1, -PAGE_SIZE, -PAGE_SIZE - 5, PAGES * PAGE_SIZE, 2**31 - 1, -(2**31), 37], jnp.int32)
    ones = jnp.ones((len(slots), HEADS, dim))
    pool = new_pool(PAGES, HEADS, PAGE_SIZE, dim, dtype)
    pool = np.asarray(kv_write(pool, ones, ones, slots, implementation=implementation)).view(dtype).astype(np.float32)
    pool = plain(pool, implementation)
    assert (pool[2, :, :, 5] == 1).all()
    assert pool.sum() == 2 * HEADS * dim


@pytest.mark.parametrize(
    ("dtype", "pool_dtype", "implementation"),
    [
        ("float32", "float32", "xla"),
        ("bfloat16", "bfloat16", "xla"),
        ("float16", "float8_e4m3fn", "xla"),
        ("float32", "int8", "xla"),
        pytest.param("bfloat16", "bfloat16", "cpu", marks=needs_avx512_bf16),
        ("float32", "float32", "cpu_float32"),
        ("bfloat16", "bfloat16", "cpu_float32"),
    ],
)
def test_a_donated_pool_is_updated_in_place_and_never_copied_transposed_or_converted(
    dtype: str, pool_dtype: str, implementation: str
):
    pages, layers = 509, 2
    spec = pool_spec(pages, 2, 16, 64, pool_dtype, platform="cpu")
    scale = jnp.ones(2) if pool_dtype in QUANTISED_DTYPES else None
    options = {"k_scale": scale, "v_scale": scale, "implementation": implementation}
    angles = jnp.ones((24, 32))

    def step(pools, q, slots, table, lengths, starts):
        for layer in range(layers):
            pools[layer] = kv_write(pools[layer], q[:, :, 0], q[:, :, 1], slots, **options)
            q = paged_attention(q, pools[layer], table, lengths, starts, scale=0.125, **options)
            qkv = jnp.concatenate([q, q], axis=2)
            q, pools[layer] = rotate_and_write(qkv, angles, angles, pools[layer], slots, dtype=dtype, **options)
            q = q[:, :, :3]
        return pools, q

    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    q = jax.ShapeDtypeStruct((24, 2, 3, 64), dtype)
    compiled = (
        jax.jit(step, donate_argnums=0)
        .lower([spec] * layers, q, shape((24,)), shape((8, 4)), shape((8,)), shape((9,)))
        .compile()
    )
    pool_bytes = layers * pages * 2 * 2 * 16 * 64 * spec.dtype.itemsize
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / layers

    # In any arrangement, a pool-sized array's sizes multiply to the pool's; 509 is prime, so that nothing else's do.
    elements = pages * 2 * 2 * 16 * 64
    moved = []
    for line in compiled.as_text().splitlines():
        found = re.match(r"\s*(?:ROOT )?%?[\w.-]+ = \w+\[([\d,]+)\]\S* ([\w-]+)\(", line)
        if found and np.prod([int(n) for n in found[1].split(",")]) == elements:
            moved.append(found[2])
    assert moved, "the pattern must find the pool"
    assert not set(moved) & {"copy", "transpose", "convert", "broadcast", "pad", "concatenate", "slice", "select"}


def test_new_pool_is_what_pool_spec_says():
    spec = pool_spec(4, 2, 16, 40, jnp.bfloat16)
    pool = new_pool(4, 2, 16, 40, jnp.bfloat16)
    assert (pool.shape, pool.dtype) == (spec.shape, spec.dtype) == ((4, 2, 2, 16, 40), storage_dtype("bfloat16", "cpu"))
    assert not np.asarray(pool).any()


def test_storage_dtype():
    before = jax.__version_info__ < (0, 11)
    assert storage_dtype("bfloat16", "cpu") == ("uint16" if before else "bfloat16")
    assert storage_dtype("float16", "cpu") == ("int16" if before else "float16")
    assert storage_dtype("float8_e4m3fn", "cpu") == "uint8"
    for name in (*FLOATS, *QUANTISED_DTYPES):
        assert storage_dtype(name, "gpu") == name
        # A pool tells what it holds, whatever holds it.
        assert value_dtype(storage_dtype(name, "cpu")) == value_dtype(name) == name
    assert storage_dtype("float32", "cpu") == "float32"
    with pytest.raises(ValueError, match="pool has dtype int32; it must hold one of"):
        value_dtype("int32")
