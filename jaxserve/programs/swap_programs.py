"""The programs that copy pages of the pools out of them and back, all layers at once.

    swap_out(pools, vector)              -> pages                  reads the pools
    swap_in(pools, slots, pages, vector) -> pools, slots, placed   pools and slots are donated

A page on its way is one array [L, 2, K, page_size, D] of the pools' dtype, bits included, so a round trip changes
nothing whatever the pages hold. There are programs for `SWAP_SIZES` pages; any number is a sum of these, without
padding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.programs.layout import swap_in_layout
from jaxserve.programs.slots import Slots

SWAP_SIZES = (1, 4, 16)
"""Pages that one program copies."""


def swap_blocks(count: int) -> list[int]:
    """The fewest of `SWAP_SIZES` whose sum is `count`, largest first."""
    blocks = []
    for size in reversed(SWAP_SIZES):
        blocks += [size] * (count // size)
        count %= size
    return blocks


def swap_out(pools: list[jax.Array], vector: jax.Array, *, pages: int) -> tuple[jax.Array, ...]:
    """The pages `vector`, int32 [pages], of every layer's pool [N, 2, K, page_size, D]: `pages` arrays [L, 2, K,
    page_size, D]."""
    found = [pool.at[vector].get(mode="promise_in_bounds") for pool in pools]
    return tuple(jnp.stack([layer[place] for layer in found]) for place in range(pages))


def swap_in(
    pools: list[jax.Array], slots: Slots, pages: Sequence[jax.Array], vector: jax.Array
) -> tuple[list[jax.Array], Slots, jax.Array]:
    """Writes `pages`, arrays as `swap_out` makes them, where `vector` (`swap_in_layout`) says, and into its slot's page
    table.

    Returns pools, slots, and the slot, int32 [1], for who wants to know when the pages have been read.
    """
    fields = swap_in_layout(len(pages)).read(vector)
    target = fields["page"]
    pools = [
        pool.at[target].set(jnp.stack([page[layer] for page in pages]), mode="promise_in_bounds")
        for layer, pool in enumerate(pools)
    ]
    index = fields["index"] + jnp.arange(len(pages), dtype=jnp.int32)
    page_table = slots.page_table.at[fields["slot"], index].set(target, mode="drop")
    return pools, dataclasses.replace(slots, page_table=page_table), fields["slot"]


def swap_in_vector(pages: Sequence[int], slot: int, index: int) -> np.ndarray:
    """What `swap_in` is told: device pages, and the slot whose page table gets them from `index` on."""
    layout = swap_in_layout(len(pages))
    vector = np.empty(layout.size, np.int32)
    fields = layout.views(vector)
    fields["page"][:] = pages
    fields["slot"][:] = slot
    fields["index"][:] = index
    return vector
