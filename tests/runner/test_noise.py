"""The noise of random rows against the cipher's published values and jax's own generator."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from jaxserve.programs.noise import gumbel, threefry

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("key", "block", "result"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((ONES, ONES), (ONES, ONES), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_the_cipher_gives_its_published_values(key, block, result):
    found = threefry(*(jnp.array([word], jnp.uint32) for word in (*key, *block)))
    assert tuple(int(word[0]) for word in found) == result


@pytest.mark.parametrize("size", [1, 50, 513, 4096])
def test_noise_is_that_of_jax_random(size):
    rng = np.random.default_rng(size)
    seeds = rng.integers(0, 2**32, (8, 2), dtype=np.uint32)
    positions = rng.integers(0, 2**31, 8, dtype=np.int32)

    def one(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(seed, impl="threefry2x32"), position)
        return jax.random.gumbel(key, (size,), jnp.float32)

    with jax.threefry_partitionable(True):
        wanted = jax.jit(jax.vmap(one))(seeds, positions)
    assert_array_equal(jax.jit(gumbel, static_argnums=2)(seeds, positions, size), wanted)


@pytest.mark.parametrize("size", [50, 513, 32000])
def test_a_row_does_not_depend_on_the_others(size):
    rng = np.random.default_rng(size)
    seeds = rng.integers(0, 2**32, (64, 2), dtype=np.uint32)
    positions = rng.integers(0, 2**31, 64, dtype=np.int32)
    noise = jax.jit(gumbel, static_argnums=2)
    together = np.asarray(noise(seeds, positions, size))
    for start in (0, 8, 56):
        rows = slice(start, start + 8)
        assert_array_equal(noise(seeds[rows], positions[rows], size), together[rows])
