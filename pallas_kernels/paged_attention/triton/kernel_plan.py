"""Work lists of a step, computed by XLA from the lengths of its rows.

They are the same for each layer with the same window, so XLA's common subexpression elimination computes them once a
step. Comparisons and sums stand in for sorts and binary searches, which become loops that a CUDA graph cannot hold.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.paged_attention.triton.shared_plan import Chunks, share_chunks
from jaxserve.pallas_kernels.paged_attention.triton.tuning import DecodeConfig, PrefillConfig

# Columns of `DecodePlan.items`.
ITEM_ROW, ITEM_TOKEN, ITEM_BEGIN, ITEM_END, ITEM_OLDEST, ITEM_SLOT = range(6)
# Columns of `PrefillPlan.tiles`.
TILE_ROW, TILE_TOKEN, TILE_COUNT, TILE_POSITION = range(4)
# `TILE_POSITION` of a tile of padding tokens.
PADDING = -1


class DecodePlan(NamedTuple):
    """The chunks of context of all rows that compute one token.

    Attributes:
        items: int32 [R * splits, 6], of which the first ends[-1] count. A chunk's row in the page table, its token, its
            first position and the one past its last, the oldest position that the token sees, the slot of its partial
            result (row * splits + number of the chunk).
        ends: int32 [R], the running sum of the items that begin with each row.
        chunks: int32 [R], chunks of each row, 0 where the row does not decode.
        splits: the most chunks a row can have.
        members: where items have several rows each, int32 [R * splits, 2, S]: their tokens, and the slots of their
            partial results; -1 past the last. None where every item has one row.
    """

    items: jax.Array
    ends: jax.Array
    chunks: jax.Array
    splits: int
    members: jax.Array | None = None


class PrefillPlan(NamedTuple):
    """The query tiles of all rows that compute more than one token, and of the padding tokens.

    Attributes:
        tiles: int32 [N, 4]: a tile's row in the page table, its first token, its number of tokens (0 where unused), the
            position of its first token or `PADDING`.
    """

    tiles: jax.Array


def max_splits(max_len: int, window: int | None, config: DecodeConfig) -> int:
    """The most chunks that a row of up to `max_len` positions is cut into."""
    span = max_len if window is None else min(max_len, window + config.block - 1)
    return min(config.splits, -(-span // config.chunk))


def chunk_lengths(span: jax.Array, max_len: int, config: DecodeConfig) -> jax.Array:
    """Length of the chunks of a row that sees `span` int32 [R] positions.

    `config.chunk`, doubled until `config.splits` chunks suffice. So it depends on the row alone: not on the batch, nor
    on how long rows may become.
    """
    length = config.chunk
    chunk = jnp.full(span.shape, length, jnp.int32)
    while length * config.splits < max_len:
        chunk = jnp.where(span > length * config.splits, 2 * length, chunk)
        length *= 2
    return chunk


def longest_chunk(max_len: int, config: DecodeConfig) -> int:
    """The length of the chunks of a row of `max_len` positions."""
    length = config.chunk
    while length * config.splits < max_len:
        length *= 2
    return length


def plan_decode(
    kv_lens: jax.Array,
    query_start_loc: jax.Array,
    page_table: jax.Array,
    page_size: int,
    window: int | None,
    config: DecodeConfig,
) -> DecodePlan:
    """Cuts the context of each row with exactly one token into chunks.

    Args:
        kv_lens: int32 [R], lengths of the rows, this step's tokens included.
        query_start_loc: int32 [R + 1], where each row's tokens start.
        page_table: int32 [R, max_pages]; what it holds matters only where items have several rows.
        page_size: positions a page.
        window: positions that a token sees, itself included; None for all. Chunks before it are not in the list.
        config: chunk length, most chunks, rows of an item.

    Returns:
        The plan.
    """
    rows, max_len = kv_lens.shape[0], page_table.shape[1] * page_size
    splits = max_splits(max_len, window, config)
    starts = query_start_loc[:-1]
    decodes = query_start_loc[1:] - starts == 1
    oldest = jnp.zeros_like(kv_lens) if window is None else jnp.maximum(kv_lens - window, 0)
    # The first chunk starts at a whole block, so that blocks lie where they would without a window.
    begin = oldest // config.block * config.block
    chunk = chunk_lengths(kv_lens - begin, max_len, config)
    chunks = jnp.where(decodes, _ceil_divide(kv_lens - begin, chunk), 0)
    if config.together > 1:
        place = jnp.arange(splits, dtype=jnp.int32)
        first = begin[:, None] + place * chunk[:, None]
        last = jnp.minimum(first + chunk[:, None], kv_lens[:, None])
        seen = jnp.maximum(first, oldest[:, None])
        shared = share_chunks(
            Chunks(first, last, seen, place < chunks[:, None]),
            page_table,
            page_size,
            longest_chunk(max_len, config),
            config.together,
        )
        ends, row, index = shared.ends, shared.row, shared.chunk
        members = jnp.stack([starts[shared.rows], shared.rows * splits + index[:, None]], axis=1)
        members = jnp.where(shared.rows[:, None] < 0, -1, members)
    else:
        ends, members = _running_sum(chunks), None
        number = jnp.arange(rows * splits, dtype=jnp.int32)
        row = jnp.minimum(_count_up_to(ends, number), rows - 1)
        index = number - (ends - chunks)[row]
    first = begin[row] + index * chunk[row]
    last = jnp.minimum(first + chunk[row], kv_lens[row])
    items = jnp.stack([row, starts[row], first, last, oldest[row], row * splits + index], axis=1)
    return DecodePlan(items, ends, chunks, splits, members)


def plan_prefill(
    kv_lens: jax.Array, query_start_loc: jax.Array, num_tokens: int, group_heads: int, config: PrefillConfig
) -> PrefillPlan:
    """Cuts the tokens of each row with two or more, and the padding tokens, into tiles.

    A row's last tiles come first: they see the most positions, so that short ones are left for the end.

    Args:
        kv_lens: int32 [R].
        query_start_loc: int32 [R + 1].
        num_tokens: T, the length of the token axis.
        group_heads: G.
        config: rows of a tile.

    Returns:
        The plan.
    """
    rows = kv_lens.shape[0]
    tokens = config.tile // group_heads
    starts = query_start_loc[:-1]
    lengths = query_start_loc[1:] - starts
    # The padding tokens are one more row.
    lengths = jnp.append(jnp.where(lengths > 1, lengths, 0), num_tokens - query_start_loc[-1])
    tiles = _ceil_divide(lengths, tokens)
    ends = _running_sum(tiles)
    number = jnp.arange(max_tiles(num_tokens, rows, tokens), dtype=jnp.int32)
    row = jnp.minimum(_count_up_to(ends, number), rows)
    first = (ends[row] - 1 - number) * tokens
    count = jnp.where(number < ends[-1], jnp.minimum(lengths[row] - first, tokens), 0)
    positions = (kv_lens - (query_start_loc[1:] - starts))[jnp.minimum(row, rows - 1)] + first
    position = jnp.where(row < rows, positions, PADDING)
    tile = [jnp.minimum(row, rows - 1), query_start_loc[row] + first, count, position]
    return PrefillPlan(jnp.stack(tile, axis=1))


def max_tiles(num_tokens: int, rows: int, tokens: int) -> int:
    """The most tiles of `tokens` that `rows` rows of two or more tokens and the padding can need."""
    return num_tokens // tokens + min(rows, num_tokens // 2) + 1


def _running_sum(counts: jax.Array) -> jax.Array:
    number = jnp.arange(counts.shape[0], dtype=jnp.int32)
    return jnp.sum(jnp.where(number[None, :] <= number[:, None], counts[None, :], 0), axis=1, dtype=jnp.int32)


def _count_up_to(ends: jax.Array, number: jax.Array) -> jax.Array:
    """For each of `number`, how many of `ends` are not above it."""
    return jnp.sum(ends[None, :] <= number[:, None], axis=1, dtype=jnp.int32)


def _ceil_divide(value: jax.Array, divisor: jax.Array | int) -> jax.Array:
    return (value + divisor - 1) // divisor
