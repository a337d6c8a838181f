"""Defines the programs that copy pages out of the pools and back, and within them, all layers of a group at once.

    swap_out(pools, vector)       -> pages           reads the pools
    swap_in(pools, pages, vector) -> pools, placed   the pools are donated
    page_copy(pools, vector)      -> pools           the pools are donated

Pages that `swap_out` has read go to host memory. `page_copy` makes the copies from device to device; it has one size,
since what it pads with, the null page onto itself, costs no more than a page.

A page in transit is one array [m, 2, K, page_size, D], for m layers of a group, of the pools' dtype, bits
included, so a round trip changes nothing whatever the pages hold. There are programs for `SWAP_SIZES` pages; any number
is a sum of these, without padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.kv_cache.page_pool import PageCopy, PageState
from jaxserve.kv_cache.pool_checks import NULL_PAGE

SWAP_SIZES = (1, 4, 16)
"""Numbers of pages that one program copies out or in."""

COPY_PAGES = 16
"""Number of pages that the program for copies within the device makes, at most."""


def swap_blocks(count: int) -> list[int]:
    """Returns the fewest of `SWAP_SIZES` whose sum is `count`, largest first."""
    blocks = []
    for size in reversed(SWAP_SIZES):
        blocks += [size] * (count // size)
        count %= size
    return blocks


def copy_sizes(count: int) -> list[int]:
    """Returns the sizes of the blocks that `page_copy` makes `count` copies in."""
    return [min(COPY_PAGES, count - begin) for begin in range(0, count, COPY_PAGES)]


def copy_blocks(copies: Sequence[PageCopy], num_groups: int = 1) -> Iterator[Sequence[PageCopy]]:
    """Yields the copies in order, in blocks that one call of a program makes: of one way, `SWAP_SIZES` many or, within
    the device, at most `COPY_PAGES`, and none reads or overwrites what another one of the block has written.

    Raises ValueError for a copy of a group that is not there, or between tiers that no program copies between.
    """
    for copy in copies:
        if copy.group >= num_groups:
            raise ValueError(
                f"group is {copy.group}; layers are of {num_groups} groups here, so that of a page copy is at most "
                f"{num_groups - 1}"
            )
    begin = 0
    while begin < len(copies):
        end = _run_end(copies, begin)
        kind = way(copies[begin])
        sizes = swap_blocks(end - begin)
        if kind == "page_copy":
            sizes = copy_sizes(end - begin)
        elif kind in DISK_WAYS:
            sizes = [end - begin]
        for size in sizes:
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


def way(copy: PageCopy) -> str:
    """Returns the kind of the program that makes a copy, or one of DISK_WAYS, which is the same for every group: all
    groups' layers are in the same arrays. Raises ValueError where there is none.
    """
    kind = _WAYS.get((copy.source_tier, copy.destination_tier))
    if kind is None:
        tiers = f"{copy.source_tier.value} to {copy.destination_tier.value}"
        raise ValueError(f"page {copy.source} is to be copied from {tiers}, which is not possible")
    return kind


_WAYS = {
    (PageState.ACTIVE, PageState.HOST): "swap_out",
    (PageState.HOST, PageState.ACTIVE): "swap_in",
    (PageState.ACTIVE, PageState.ACTIVE): "page_copy",
    (PageState.HOST, PageState.DISK): "disk_write",
    (PageState.DISK, PageState.HOST): "disk_read",
}

DISK_WAYS = ("disk_write", "disk_read")
"""Copies that no program makes."""


def copy_vector(copies: Sequence[PageCopy]) -> np.ndarray:
    """Returns the input vector of `page_copy` for at most COPY_PAGES copies: int32 [2 * COPY_PAGES]."""
    vector = np.full((2, COPY_PAGES), NULL_PAGE, np.int32)
    vector[0, : len(copies)] = [copy.source for copy in copies]
    vector[1, : len(copies)] = [copy.destination for copy in copies]
    return vector.reshape(-1)


def page_copy(pools: list[jax.Array], vector: jax.Array) -> list[jax.Array]:
    """Copies pages of every pool [N, 2, K, page_size, D]; all are read before any is written.

    vector: int32 [2 * COPY_PAGES], the pages to read, then those to write.
    """
    sources, destinations = vector[:COPY_PAGES], vector[COPY_PAGES:]
    return [
        pool.at[destinations].set(pool.at[sources].get(mode="promise_in_bounds"), mode="promise_in_bounds")
        for pool in pools
    ]


def swap_out(pools: list[jax.Array], vector: jax.Array, *, pages: int) -> tuple[jax.Array, ...]:
    """Gathers the pages `vector`, int32 [pages], of every pool [N, 2, K, page_size, D].

    Returns `pages` arrays [m, 2, K, page_size, D].
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
