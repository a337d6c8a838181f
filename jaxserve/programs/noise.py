"""Generates random numbers that are functions of (seed, position, index) alone.

They equal those of `jax.random` bit by bit: `gumbel(fold_in(seed, position), (size,))` with partitionable Threefry
keys. They are written out here because on a CPU jax makes the rounds of the cipher a loop, which stores and loads every
number several times; in one expression XLA keeps them in registers.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def gumbel(seed: jax.Array, position: jax.Array, size: int) -> jax.Array:
    """Draws float32 [R, size] from the standard Gumbel distribution. seed: uint32 [R, 2]; position: int32 [R]."""
    return gumbel_at(seed, position, jax.lax.broadcasted_iota(jnp.uint32, (seed.shape[0], size), 1))


def gumbel_at(seed: jax.Array, position: jax.Array, place: jax.Array) -> jax.Array:
    """Draws what `gumbel` does at the given indices of each row, uint32 [R, N]."""
    zero = jnp.zeros_like(seed[:, 0])
    high, low = threefry(seed[:, 0], seed[:, 1], zero, position.astype(jnp.uint32))
    first, second = threefry(high[:, None], low[:, None], jnp.zeros_like(place), place)
    # 23 random bits as the fraction of a number in [1, 2).
    unit = jax.lax.bitcast_convert_type((first ^ second) >> 9 | jnp.uint32(0x3F800000), jnp.float32) - 1.0
    tiny = jnp.finfo(jnp.float32).tiny
    return -jnp.log(-jnp.log(jnp.maximum(unit * (1.0 - tiny) + tiny, tiny)))


def threefry(high: jax.Array, low: jax.Array, first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes Threefry-2x32-20 of a block (first, second) under a key (high, low); uint32 arrays that broadcast.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    keys = (high, low, high ^ low ^ jnp.uint32(_PARITY))
    first, second = first + keys[0], second + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            first = first + second
            second = (second << rotation | second >> (32 - rotation)) ^ first
        first = first + keys[(group + 1) % 3]
        second = second + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return first, second
