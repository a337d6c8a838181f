"""Holds the arrays that a runner's programs take over and return: page pools, slots, hidden buffer, masks and penalty
rows."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxserve.programs.penalties import Penalties
from jaxserve.programs.slots import Slots
from jaxserve.programs.step_programs import Shapes, abstract_masks, abstract_pools, abstract_state


class DeviceArrays:
    """Holds the device's arrays, all zero when made.

    pools: one for each layer of a group. hidden: [largest token bucket, H]. masks: [S, words]. penalties: as
    `Penalties`.

    A program that takes an array over deletes it and returns its successor, which the caller stores in its place. One
    that fails in execution returns none, so that the arrays it took over are lost.
    """

    def __init__(self, shapes: Shapes, mesh: Mesh):
        self._shapes, self._mesh = shapes, mesh
        self.make()

    def make(self) -> None:
        """Allocates all arrays anew; returns when they are there."""
        self.pools: list[jax.Array] = [
            jnp.zeros(pool.shape, pool.dtype, device=pool.sharding) for pool in abstract_pools(self._shapes, self._mesh)
        ]
        self.slots, self.hidden, self.masks, self.penalties = _initial_state(self._shapes, self._mesh)
        jax.block_until_ready(self._leaves())

    def delete(self) -> None:
        """Frees all arrays that no program has taken over: the device has no room for old and new at once."""
        for leaf in self._leaves():
            if not leaf.is_deleted():
                leaf.delete()

    @property
    def intact(self) -> bool:
        """Tells whether all arrays exist."""
        return not any(leaf.is_deleted() for leaf in self._leaves())

    def _leaves(self) -> list[jax.Array]:
        return jax.tree.leaves((self.pools, self.slots, self.hidden, self.masks, self.penalties))


@functools.lru_cache(maxsize=4)
def _state_maker(
    max_pages: int,
    num_groups: int,
    hidden: jax.ShapeDtypeStruct,
    masks: jax.ShapeDtypeStruct,
    penalties: tuple[int, int],
    sharding: NamedSharding,
) -> Any:
    """Makes slots, hidden buffer, masks and penalty rows (of a number and a vocabulary) in one program: one for each
    would take longer to compile than to run."""

    def make() -> tuple[Slots, jax.Array, jax.Array, Penalties]:
        slots = Slots.zeros(masks.shape[0], max_pages, num_groups)
        zeros = jnp.zeros(hidden.shape, hidden.dtype), jnp.zeros(masks.shape, masks.dtype)
        return slots, *zeros, Penalties.zeros(*penalties)

    return jax.jit(make, out_shardings=sharding)


def _initial_state(shapes: Shapes, mesh: Mesh) -> tuple[Slots, jax.Array, jax.Array, Penalties]:
    _, hidden = abstract_state(shapes, mesh)
    penalties = shapes.num_penalty_rows, shapes.model.vocab_size
    masks = abstract_masks(shapes, mesh)
    return _state_maker(shapes.max_pages, shapes.num_groups, hidden, masks, penalties, hidden.sharding)()
