"""The KV write: the right places and no others, and no pool-sized work in the compiled step."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.paged_attention import kv_write, new_pool, paged_attention, pool_spec, storage_dtype

PAGES, HEADS, PAGE_SIZE, DIM, TOKENS = 6, 2, 16, 40, 12


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_writes_each_slot_and_nothing_else_outside_the_null_page(dtype: str, implementation: str):
    write = jax.jit(functools.partial(kv_write, implementation=implementation))

    @settings(max_examples=20)
    @given(
        slots=st.lists(st.integers(PAGE_SIZE, PAGES * PAGE_SIZE - 1), unique=True, max_size=TOKENS),
        seed=st.integers(0, 2**31),
    )
    def check(slots: list[int], seed: int) -> None:
        random = np.random.default_rng(seed)

        def normal(*size: int) -> np.ndarray:
            return random.standard_normal(size).astype(jnp.dtype(dtype))

        before, k, v = normal(PAGES, 2, HEADS, PAGE_SIZE, DIM), normal(TOKENS, HEADS, DIM), normal(TOKENS, HEADS, DIM)
        wanted = before.copy()
        for token, slot in enumerate(slots):
            wanted[slot // PAGE_SIZE, 0, :, slot % PAGE_SIZE] = k[token]
            wanted[slot // PAGE_SIZE, 1, :, slot % PAGE_SIZE] = v[token]
        padded = jnp.asarray(slots + [0] * (TOKENS - len(slots)), jnp.int32)
        pool = jnp.asarray(before.view(storage_dtype(dtype, "cpu")))
        after = np.asarray(write(pool, jnp.asarray(k), jnp.asarray(v), padded)).view(before.dtype)
        np.testing.assert_array_equal(after[1:], wanted[1:])

    check()


@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_a_slot_outside_the_pool_writes_nothing(implementation: str):
    slots = jnp.asarray([-1, -PAGE_SIZE, -PAGE_SIZE - 5, PAGES * PAGE_SIZE, 2**31 - 1, -(2**31), 37], jnp.int32)
    ones = jnp.ones((len(slots), HEADS, DIM))
    pool = np.asarray(
        kv_write(new_pool(PAGES, HEADS, PAGE_SIZE, DIM, "float32"), ones, ones, slots, implementation=implementation)
    )
    assert (pool[2, :, :, 5] == 1).all()
    assert pool.sum() == 2 * HEADS * DIM


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_donated_pool_is_updated_in_place_and_never_copied_transposed_or_converted(dtype: str):
    pages, layers = 509, 2
    spec = pool_spec(pages, 2, 16, 64, dtype, platform="cpu")

    def step(pools, q, slots, table, lengths, starts):
        for layer in range(layers):
            pools[layer] = kv_write(pools[layer], q[:, :, 0], q[:, :, 1], slots)
            q = paged_attention(q, pools[layer], table, lengths, starts, scale=0.125)
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
    held_as_bits = jax.__version_info__ < (0, 11)
    assert storage_dtype("bfloat16", "cpu") == ("uint16" if held_as_bits else "bfloat16")
    assert storage_dtype("float16", "gpu") == "float16"
    assert storage_dtype("float32", "cpu") == "float32"
