"""The arrays that a runner's programs take over and give back: the page pools, the slots and the hidden buffer."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxserve.programs.slots import Slots
from jaxserve.programs.step_programs import Shapes, abstract_pools, abstract_state


class DeviceArrays:
    """pools: one a layer; slots; hidden: [largest token bucket, H]. All zero when made.

    A program that takes an array over deletes it and returns its successor, which the caller puts in its place. One
    that fails in execution returns none, so that what it had taken over is lost.
    """

    def __init__(self, shapes: Shapes, mesh: Mesh):
        self._shapes, self._mesh = shapes, mesh
        self.make()

    def make(self) -> None:
        """Makes all of them anew; returns when they are there."""
        self.pools: list[jax.Array] = [
            jnp.zeros(pool.shape, pool.dtype, device=pool.sharding) for pool in abstract_pools(self._shapes, self._mesh)
        ]
        self.slots, self.hidden = _initial_state(self._shapes, self._mesh)
        jax.block_until_ready((self.pools, self.slots, self.hidden))

    def delete(self) -> None:
        """Frees what no program has taken over: the device has no room for old and new at once."""
        for leaf in self._leaves():
            if not leaf.is_deleted():
                leaf.delete()

    @property
    def intact(self) -> bool:
        """Whether all of them are there."""
        return not any(leaf.is_deleted() for leaf in self._leaves())

    def _leaves(self) -> list[jax.Array]:
        return jax.tree.leaves((self.pools, self.slots, self.hidden))


@functools.lru_cache(maxsize=4)
def _state_maker(num_slots: int, max_pages: int, hidden: jax.ShapeDtypeStruct, sharding: NamedSharding) -> Any:
    """Makes slots and hidden buffer in one program; for each array its own would take longer to compile than to run."""

    def make() -> tuple[Slots, jax.Array]:
        return Slots.zeros(num_slots, max_pages), jnp.zeros(hidden.shape, hidden.dtype)

    return jax.jit(make, out_shardings=sharding)


def _initial_state(shapes: Shapes, mesh: Mesh) -> tuple[Slots, jax.Array]:
    _, hidden = abstract_state(shapes, mesh)
    return _state_maker(shapes.num_slots, shapes.max_pages, hidden, hidden.sharding)()
