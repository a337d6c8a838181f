"""The work list of a step in which rows that share pages read them together.

A chunk of context that several rows see whole, over the same pages, is one work item with a query tile of several rows.
Each row still gets its own partial result in its own slot, so that the results are combined as if the chunk had been
read for each row alone. Which rows share depends on page tables, which are data.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Chunks(NamedTuple):
    """The chunks of all rows, R rows by C chunks at most.

    Attributes:
        first: int32 [R, C], each chunk's first position.
        last: int32 [R, C], the one past its last.
        oldest: int32 [R, C], the oldest position of the chunk that the row's token sees.
        exists: bool [R, C].
    """

    first: jax.Array
    last: jax.Array
    oldest: jax.Array
    exists: jax.Array


class SharedItems(NamedTuple):
    """Work items of several rows each.

    Attributes:
        ends: int32 [R], the running sum of the items that begin with each row.
        row: int32 [N], the row in whose page table an item's pages stand.
        chunk: int32 [N], the number of the chunk, which is the same for all its rows.
        rows: int32 [N, S], the rows of an item, in order; -1 past the last.
    """

    ends: jax.Array
    row: jax.Array
    chunk: jax.Array
    rows: jax.Array


def share_chunks(chunks: Chunks, page_table: jax.Array, page_size: int, longest: int, together: int) -> SharedItems:
    """Puts chunks over the same pages into items of `together` rows at most.

    A row joins the first row whose chunk begins with the same page, if all pages of the chunk are the same; else the
    chunk is an item of its own. So sharing is found in O(R^2 C) comparisons, and never assumed.

    Args:
        chunks: of all rows.
        page_table: int32 [R, max_pages].
        page_size: positions a page.
        longest: positions of the longest chunk.
        together: S, rows of an item.

    Returns:
        The items; N = R * C, of which the first ends[-1] count.
    """
    rows, count = chunks.first.shape
    number = jnp.arange(rows, dtype=jnp.int32)
    leader = _leaders(chunks, page_table, page_size, longest)
    # Another row r' of the same item, where chunks of no row have no companions: [R, C, R'].
    same = (leader[:, :, None] == leader.T[None]) & chunks.exists[:, :, None] & chunks.exists.T[None]
    rank = jnp.sum(same & (number < number[:, None, None]), axis=2, dtype=jnp.int32)
    following = jnp.min(jnp.where(same & (number > number[:, None, None]), number, rows), axis=2)
    begins = chunks.exists & (rank % together == 0)
    items = jnp.sum(begins, axis=1, dtype=jnp.int32)
    ends = jnp.sum(jnp.where(number[None, :] <= number[:, None], items[None, :], 0), axis=1, dtype=jnp.int32)
    item = jnp.arange(rows * count, dtype=jnp.int32)
    row = jnp.minimum(jnp.sum(ends[None, :] <= item[:, None], axis=1, dtype=jnp.int32), rows - 1)
    place = jnp.arange(count, dtype=jnp.int32)
    before = jnp.sum(begins[:, None, :] & (place[None, :] <= place[:, None]), axis=2, dtype=jnp.int32)
    index = jnp.sum(before[row] <= (item - (ends - items)[row])[:, None], axis=1, dtype=jnp.int32)
    index = jnp.minimum(index, count - 1)
    members = [row]
    for _ in range(together - 1):
        last = members[-1]
        members.append(jnp.where(last < rows, following[jnp.minimum(last, rows - 1), index], rows))
    return SharedItems(ends, row, index, jnp.stack([jnp.where(one < rows, one, -1) for one in members], axis=1))


def _leaders(chunks: Chunks, page_table: jax.Array, page_size: int, longest: int) -> jax.Array:
    """For each chunk int32 [R, C], the first row that reads the same, which may be its own."""
    rows = chunks.first.shape[0]
    number = jnp.arange(rows, dtype=jnp.int32)
    most = page_table.shape[1] - 1
    begin = chunks.first // page_size
    page = jnp.take_along_axis(page_table, jnp.minimum(begin, most), axis=1)
    alike = chunks.exists[:, :, None] & chunks.exists.T[None]
    for one in (chunks.first, chunks.last, chunks.oldest, page):
        alike &= one[:, :, None] == one.T[None]
    leader = jnp.min(jnp.where(alike, number, rows - 1), axis=2)
    # All pages of the chunk, of which there are at most one more than its positions fill: [R, C, P].
    pages = begin[:, :, None] + jnp.arange((longest - 1) // page_size + 2, dtype=jnp.int32)
    where = jnp.minimum(pages, most)
    own, other = page_table[number[:, None, None], where], page_table[leader[:, :, None], where]
    agrees = jnp.all((own == other) | (pages * page_size >= chunks.last[:, :, None]), axis=2)
    return jnp.where(agrees, leader, number[:, None])
