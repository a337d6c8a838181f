"""Which tiles `xla.py` works off in a step: queries of one sequence cut into tiles, sorted by the length they read."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

# The smallest and the largest number of rows of a dot for which rows were measured to be bit-identical.
MIN_DOT_ROWS = 2
MAX_DOT_ROWS = 32


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Static sizes of the two passes.

    The block size fixes the order of every sum; the group sizes decide what is compiled.

    Attributes:
        block: key positions read at a time, a multiple of the page size.
        decode_tile: query tokens of a decode tile, of which one is real.
        decode_group: decode tiles worked off together.
        prefill_tile: query tokens of a prefill tile.
        prefill_group: prefill tiles worked off together.
    """

    block: int
    decode_tile: int
    decode_group: int
    prefill_tile: int
    prefill_group: int


class TilePass(NamedTuple):
    """The tiles of one pass, longest first; N is a multiple of the group size and unused tiles come last.

    Attributes:
        row: int32 [N], the sequence's row in the page table.
        first_token: int32 [N], place of the tile's first token on the token axis.
        first_position: int32 [N], that token's position in its sequence.
        num_tokens: int32 [N], real tokens of the tile, 0 where unused.
        block_begin: int32 [N / group], first key-value block that a group reads.
        block_end: int32 [N / group], one past the last block that a group reads.
        num_groups: int32 [], groups with at least one real token.
    """

    row: jax.Array
    first_token: jax.Array
    first_position: jax.Array
    num_tokens: jax.Array
    block_begin: jax.Array
    block_end: jax.Array
    num_groups: jax.Array


class TilePlan(NamedTuple):
    """All tiles of a step and, for every token, the row of the tile outputs that holds its result.

    Attributes:
        decode: the tiles of sequences that compute one token.
        prefill: the tiles of sequences that compute more; None for a step of decodes alone.
        output_row: int32 [T]; padding tokens point at the last row, which stays zero.
    """

    decode: TilePass
    prefill: TilePass | None
    output_row: jax.Array


def tiling_for(group_heads: int) -> Tiling:
    """Returns the tile sizes for `group_heads` query heads a key-value head.

    They depend on nothing else: with smaller groups for smaller buckets, other loops are compiled, and rows were seen
    to change in their last bits.
    """
    return Tiling(
        block=128,
        decode_tile=-(-MIN_DOT_ROWS // group_heads),
        decode_group=8,
        prefill_tile=MAX_DOT_ROWS // group_heads,
        prefill_group=8,
    )


def _max_prefill_tiles(num_tokens: int, num_rows: int, tile: int) -> int:
    """The most tiles that sequences of two or more tokens can need; at least 1 to keep shapes non-empty."""
    rows = min(num_rows, num_tokens // 2)
    return max(1, rows + (num_tokens - rows) // tile)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _plan_pass(
    query_lens: jax.Array,
    kv_lens: jax.Array,
    starts: jax.Array,
    capacity: int,
    tile: int,
    group: int,
    block: int,
    window: int | None,
) -> tuple[TilePass, jax.Array, jax.Array]:
    """Cuts each row's `query_lens` [R] tokens into tiles; returns the pass, [R] first tile and [N] place of a tile."""
    tiles_of_row = -(-query_lens // tile)
    ends = jnp.cumsum(tiles_of_row)
    number = jnp.arange(_round_up(capacity, group), dtype=jnp.int32)
    # A comparison with every end vectorises; a binary search would be a loop.
    row = jnp.minimum(jnp.sum(ends[None, :] <= number[:, None], axis=1, dtype=jnp.int32), query_lens.shape[0] - 1)
    first_tile = ends - tiles_of_row
    first = (number - first_tile[row]) * tile
    used = number < ends[-1]
    num_tokens = jnp.where(used, jnp.minimum(query_lens[row] - first, tile), 0)
    first_position = jnp.where(used, kv_lens[row] - query_lens[row] + first, 0)
    needed = first_position + num_tokens
    order = jnp.argsort(-needed, stable=True).astype(jnp.int32)
    needed = needed[order].reshape(-1, group)
    first_position = first_position[order]
    begin = jnp.zeros(needed.shape[0], jnp.int32)
    if window is not None:
        oldest = jnp.where(needed > 0, first_position.reshape(-1, group), jnp.iinfo(jnp.int32).max)
        begin = jnp.maximum(oldest.min(axis=1) - window + 1, 0) // block
    tile_pass = TilePass(
        row=row[order],
        first_token=(starts[row] + first)[order],
        first_position=first_position,
        num_tokens=num_tokens[order],
        block_begin=begin,
        block_end=-(-needed.max(axis=1) // block),
        num_groups=-(-ends[-1] // group),
    )
    return tile_pass, first_tile, jnp.argsort(order).astype(jnp.int32)


def plan_tiles(
    kv_lens: jax.Array,
    query_start_loc: jax.Array,
    num_tokens: int,
    tiling: Tiling,
    window: int | None,
    decode_only: bool,
) -> TilePlan:
    """Plans the tiles of a step.

    The same for each layer with the same window, so XLA's common subexpression elimination computes it once a step.

    Args:
        kv_lens: int32 [R], sequence lengths, this step's tokens included.
        query_start_loc: int32 [R + 1], where each row's tokens start.
        num_tokens: T, the length of the token axis.
        tiling: static sizes.
        window: positions that a token may attend to, itself included; None for all.
        decode_only: no row has more than one token, and row r's is token r.

    Returns:
        The plan.
    """
    num_rows = kv_lens.shape[0]
    starts = query_start_loc[:-1]
    query_lens = query_start_loc[1:] - starts
    decode, decode_tile, decode_place = _plan_pass(
        jnp.where(query_lens == 1, 1, 0),
        kv_lens,
        starts,
        num_rows,
        tiling.decode_tile,
        tiling.decode_group,
        tiling.block,
        window,
    )
    decode_rows = decode_place.shape[0] * tiling.decode_tile
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    if decode_only:
        row = jnp.minimum(token, num_rows - 1)
        output_row = jnp.where(
            token < query_start_loc[-1], decode_place[decode_tile[row]] * tiling.decode_tile, decode_rows
        )
        return TilePlan(decode, None, output_row)
    prefill, prefill_tile, prefill_place = _plan_pass(
        jnp.where(query_lens > 1, query_lens, 0),
        kv_lens,
        starts,
        _max_prefill_tiles(num_tokens, num_rows, tiling.prefill_tile),
        tiling.prefill_tile,
        tiling.prefill_group,
        tiling.block,
        window,
    )
    row = jnp.sum(query_start_loc[None, 1:] <= token[:, None], axis=1, dtype=jnp.int32)
    padding = row >= num_rows
    row = jnp.minimum(row, num_rows - 1)
    ahead = token - starts[row]
    prefill_rows = prefill_place.shape[0] * tiling.prefill_tile
    place = prefill_place[jnp.minimum(prefill_tile[row] + ahead // tiling.prefill_tile, prefill_place.shape[0] - 1)]
    output_row = jnp.where(
        query_lens[row] == 1,
        decode_place[decode_tile[row]] * tiling.decode_tile,
        decode_rows + place * tiling.prefill_tile + ahead % tiling.prefill_tile,
    )
    return TilePlan(decode, prefill, jnp.where(padding, decode_rows + prefill_rows, output_row))
