"""The inner routine of both attention kernels: softmax over a range of positions, gathered page by page.

Flash attention's online softmax (Dao et al., FlashAttention-2, arXiv 2307.08691) in float32. A tile holds M rows, each
one query head of one token; all share a key-value head. Weights are 2^(score - exponent), where the exponent is the
greatest score so far, rounded up to an integer: then rescaling multiplies by a power of two, which is exact.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.pallas_kernels.paged_attention.spec import AttentionSpec
from jaxserve.pallas_kernels.paged_attention.triton.backend import triton
from jaxserve.pallas_kernels.paged_attention.triton.limits import addressable

LOG2_E = math.log2(math.e)
# Below every exponent of a score; finite, so that differences of exponents are never NaN.
LOWEST_EXPONENT = -(2.0**126)


class State(NamedTuple):
    """Running softmax of a tile: greatest exponent [M], sum of weights [M], weighted values, in float32.

    `output` has one [M, lanes] for each part of a head, see `Tile`.
    """

    exponent: jax.Array
    total: jax.Array
    output: tuple[jax.Array, ...]


class Queries(NamedTuple):
    """A tile of queries.

    Attributes:
        values: for each part of a head [M, lanes], zero past the head dimension and in unused rows.
        newest: int32 [M] or scalar, the last position that a row sees.
        oldest: int32 [M] or scalar, the first one; None without a sliding window.
        scale: float32 scalar or a number, multiplies the scores: the layer's scale, times that of quantized keys.
    """

    values: tuple[jax.Array, ...]
    newest: jax.Array
    oldest: jax.Array | None
    scale: Any


class Pages(NamedTuple):
    """Where a row's keys and values of one head are: refs of the pool and the page table, scalars that index them.

    Attributes:
        pool: [num_pages, 2, K, page_size, D], or uint16 [num_pages, 2, K, page_size, D / 2] where a tile has parts.
        table: int32 [R, max_pages].
        row: of the table.
        head: key-value head.
        begin: int32 scalar, positions before it are not read; None without a sliding window.
        end: int32 scalar, positions from it on are not read.
    """

    pool: Any
    table: Any
    row: jax.Array
    head: jax.Array
    begin: jax.Array | None
    end: jax.Array


@dataclasses.dataclass(frozen=True)
class Tile:
    """Static sizes.

    Attributes:
        rows: M, of a tile of queries.
        block: positions that a step of the loop takes.
        head_dim: D.
        pair: None, or the one-byte dtype of which each uint16 of the pool holds two numbers. A head is then worked on
            in two parts, its even and its odd numbers, so that nothing has to change places.
    """

    rows: int
    block: int
    head_dim: int
    pair: jnp.dtype | None = None

    @property
    def parts(self) -> int:
        """Parts that a head is worked on in."""
        return 1 if self.pair is None else 2

    @property
    def part_dim(self) -> int:
        """Numbers of a head in a part."""
        return self.head_dim // self.parts

    @property
    def lanes(self) -> int:
        """The power of two that holds a part and that a tensor core takes."""
        return max(16, 1 << (self.part_dim - 1).bit_length())

    def places(self) -> list[jax.Array]:
        """For each part int32 [lanes], where its numbers are in a head."""
        lane = jnp.arange(self.lanes, dtype=jnp.int32)
        return [lane * self.parts + part for part in range(self.parts)]


def addressed(pool: jax.Array, pairs: bool) -> tuple[jax.Array, jnp.dtype | None]:
    """The pool as a kernel reads it, and what `Tile.pair` says of it.

    Args:
        pool: [num_pages, 2, K, page_size, D].
        pairs: read one-byte elements in pairs always, not only where the backend addresses single ones wrongly.

    Returns:
        (pool, None), or the same bytes as uint16 [num_pages, 2, K, page_size, D / 2], a view that costs nothing on a
        GPU, and the dtype of each half.
    """
    if pool.dtype.itemsize > 1 or not (pairs or not addressable(pool)):
        return pool, None
    view = pool.reshape(*pool.shape[:-1], pool.shape[-1] // 2, 2)
    return jax.lax.bitcast_convert_type(view, jnp.uint16), pool.dtype


def initial_state(tile: Tile, sink: jax.Array | None = None) -> State:
    """The state before any position; `sink` float32 [M] are scores that join the sum and have no value."""
    output = tuple(jnp.zeros((tile.rows, tile.lanes), jnp.float32) for _ in range(tile.parts))
    if sink is None:
        exponent = jnp.full((tile.rows,), LOWEST_EXPONENT, jnp.float32)
        return State(exponent, jnp.zeros((tile.rows,), jnp.float32), output)
    score = sink * LOG2_E
    exponent = jnp.maximum(jnp.ceil(score), LOWEST_EXPONENT)
    return State(exponent, jnp.exp2(score - exponent), output)


def attend(
    state: State,
    begin: jax.Array | int,
    end: jax.Array,
    queries: Queries,
    pages: Pages,
    spec: AttentionSpec,
    tile: Tile,
    *,
    masked: bool = True,
) -> State:
    """Takes blocks `begin` to `end` of positions into the state.

    Args:
        state: before.
        begin: first block, in blocks of `tile.block` positions from position 0 of the row.
        end: the block past the last.
        queries: the tile of queries.
        pages: keys and values.
        spec: soft cap.
        tile: static sizes.
        masked: False promises that every row of the tile sees every position of these blocks.

    Returns:
        The state after. Blocks of which a tile row sees no position leave its state unchanged to the bit.
    """

    def one(index: jax.Array, carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        page, state = carry
        # Read one step ahead: the loads of keys and values then depend on no load of their own step, which would halve
        # the depth of their pipeline.
        following = _pages(pages, index + 1, tile)
        return following, _attend_block(index, page, state, queries, pages, spec, tile, masked)

    return jax.lax.fori_loop(begin, end, one, (_pages(pages, begin, tile), state))[1]


def _attend_block(
    index: jax.Array,
    page: jax.Array,
    state: State,
    queries: Queries,
    pages: Pages,
    spec: AttentionSpec,
    tile: Tile,
    masked: bool,
) -> State:
    position = index * tile.block + jnp.arange(tile.block, dtype=jnp.int32)
    dtype = queries.values[0].dtype
    keys = _numbers(_load(pages, 0, page, position, tile, masked), tile, dtype)
    values = _numbers(_load(pages, 1, page, position, tile, masked), tile, dtype)
    products = [_dot(query, key, transpose=True) for query, key in zip(queries.values, keys, strict=True)]
    score = _scale(sum(products[1:], products[0]), queries.scale, spec.soft_cap)
    if masked:
        seen = position[None, :] <= jnp.broadcast_to(queries.newest, (tile.rows,))[:, None]
        if queries.oldest is not None:
            seen &= position[None, :] >= jnp.broadcast_to(queries.oldest, (tile.rows,))[:, None]
        score = jnp.where(seen, score, -jnp.inf)
    exponent = jnp.maximum(state.exponent, jnp.ceil(jnp.max(score, axis=1)))
    decay = jnp.exp2(state.exponent - exponent)
    # The sum sees the weights as the product with the values does, so that their rounding cancels.
    weight = jnp.exp2(score - exponent[:, None]).astype(dtype)
    total = state.total * decay + jnp.sum(weight.astype(jnp.float32), axis=1)
    output = tuple(
        before * decay[:, None] + _dot(weight, value) for before, value in zip(state.output, values, strict=True)
    )
    return State(exponent, total, output)


def _pages(pages: Pages, index: jax.Array | int, tile: Tile) -> jax.Array:
    """Page ids of a block: one where it lies within a page, else one a position [block]."""
    _, _, _, page_size, _ = pages.pool.shape
    last = pages.table.shape[1] - 1
    if page_size % tile.block == 0:
        return pages.table[pages.row, jnp.minimum(index * tile.block // page_size, last)]
    position = index * tile.block + jnp.arange(tile.block, dtype=jnp.int32)
    return triton.load(pages.table.at[pages.row, jnp.minimum(position // page_size, last)])


def _load(pages: Pages, side: int, page: jax.Array, position: jax.Array, tile: Tile, masked: bool) -> jax.Array:
    """Reads keys (side 0) or values (1) at `position` as [block, lanes] of the pool's array, zero where not read."""
    lane = jnp.arange(tile.lanes, dtype=jnp.int32)
    offset = position % pages.pool.shape[3]
    if page.ndim:
        page = page[:, None]
    shape = (tile.block, tile.lanes)
    mask = None
    if masked:
        read = position < pages.end
        if pages.begin is not None:
            read &= position >= pages.begin
        mask = jnp.broadcast_to(read[:, None], shape)
    if tile.lanes != tile.part_dim:
        inside = jnp.broadcast_to((lane < tile.part_dim)[None, :], shape)
        mask = inside if mask is None else mask & inside
    where = pages.pool.at[page, side, pages.head, offset[:, None], lane[None, :]]
    return triton.load(where, mask=mask, other=None if mask is None else jnp.zeros((), pages.pool.dtype))


def _numbers(stored: jax.Array, tile: Tile, dtype: jnp.dtype) -> list[jax.Array]:
    """The parts of `stored` [block, lanes] in the dtype of the queries."""
    if tile.pair is None:
        return [stored.astype(dtype)]
    if tile.pair == jnp.int8:
        word = jax.lax.bitcast_convert_type(stored, jnp.int16)
        return [((word << 8) >> 8).astype(dtype), (word >> 8).astype(dtype)]
    halves = (stored.astype(jnp.uint8), (stored >> 8).astype(jnp.uint8))
    return [jax.lax.bitcast_convert_type(half, tile.pair).astype(dtype) for half in halves]


def _scale(score: jax.Array, scale: Any, soft_cap: float | None) -> jax.Array:
    """Scores in powers of two: scaled, capped, times log2(e)."""
    if soft_cap is None:
        return score * (scale * LOG2_E)
    # tanh(x) = 1 - 2 / (e^(2 x) + 1): an absolute error of one rounding of 1, without tanh's branches.
    power = jnp.exp2(score * (scale * (2 * LOG2_E / soft_cap)))
    return (soft_cap * LOG2_E) - (2 * soft_cap * LOG2_E) / (power + 1)


def _dot(a: jax.Array, b: jax.Array, transpose: bool = False) -> jax.Array:
    """a [M, C] times b [C, N] (or b [N, C] transposed) in float32; float32 operands at full precision."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((1,), (1 if transpose else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
