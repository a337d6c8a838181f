"""Defines the programs that copy pages out of the pools and back, all layers at once.

    swap_out(pools, vector)       -> pages           reads the pools
    swap_in(pools, pages, vector) -> pools, placed   the pools are donated

Pages that `swap_out` has read go to host memory, or at once to `swap_in` where the copy is from device to device.

A page in transit is one array [L, 2, K, page_size, D] of the pools' dtype, bits included, so a round trip changes
nothing whatever the pages hold. There are programs for `SWAP_SIZES` pages; any number is a sum of these, without
padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

from jaxserve.kv_cache.page_pool import PageCopy, PageState

SWAP_SIZES = (1, 4, 16)
"""Numbers of pages that one program copies."""


def swap_blocks(count: int) -> list[int]:
    """Returns the fewest of `SWAP_SIZES` whose sum is `count`, largest first."""
    blocks = []
    for size in reversed(SWAP_SIZES):
        blocks += [size] * (count // size)
        count %= size
    return blocks


def copy_blocks(copies: Sequence[PageCopy]) -> Iterator[Sequence[PageCopy]]:
    """Yields the copies in order, in blocks that one call each of `swap_out` and `swap_in` makes: of one way,
    `SWAP_SIZES` many, and none reads or overwrites what another one of the block has written."""
    begin = 0
    while begin < len(copies):
        end = _run_end(copies, begin)
        for size in swap_blocks(end - begin):
            yield copies[begin : begin + size]
            begin += size


def _run_end(copies: Sequence[PageCopy], begin: int) -> int:
    """Returns the end of the longest run of copies from `begin` on that can be made at once."""
    written: set[tuple[PageState, int]] = set()
    for place in range(begin, len(copies)):
        copy = copies[place]
        source, destination = (copy.source_tier, copy.source), (copy.destination_tier, copy.destination)
        if way(copy) != way(copies[begin]) or source in written or destination in written:
            return place
        written.add(destination)
    return len(copies)


def way(copy: PageCopy) -> tuple[str, ...]:
    """Returns the kinds of the programs that make a copy, in order. Raises ValueError where there are none."""
    if copy.group:
        raise ValueError(f"group is {copy.group}; all layers are alike here, so a page is of group 0")
    kinds = _WAYS.get((copy.source_tier, copy.destination_tier))
    if kinds is None:
        tiers = f"{copy.source_tier.value} to {copy.destination_tier.value}"
        raise ValueError(f"page {copy.source} is to be copied from {tiers}; one of the two must be on the device")
    return kinds


_WAYS = {
    (PageState.ACTIVE, PageState.HOST): ("swap_out",),
    (PageState.HOST, PageState.ACTIVE): ("swap_in",),
    (PageState.ACTIVE, PageState.ACTIVE): ("swap_out", "swap_in"),
}


def swap_out(pools: list[jax.Array], vector: jax.Array, *, pages: int) -> tuple[jax.Array, ...]:
    """Gathers the pages `vector`, int32 [pages], of every layer's pool [N, 2, K, page_size, D].

    Returns `pages` arrays [L, 2, K, page_size, D].
    """
    found = [pool.at[vector].get(mode="promise_in_bounds") for pool in pools]
    return tuple(jnp.stack([layer[place] for layer in found]) for place in range(pages))


def swap_in(pools: list[jax.Array], pages: Sequence[jax.Array], vector: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Writes `pages`, arrays as `swap_out` makes them, as the device's pages `vector`, int32 [pages].

    Returns pools, and the first of these numbers, int32 [1], which signals when the pages have been read.
    """
    pools = [
        pool.at[vector].set(jnp.stack([page[layer] for page in pages]), mode="promise_in_bounds")
        for layer, pool in enumerate(pools)
    ]
    return pools, vector[:1]
