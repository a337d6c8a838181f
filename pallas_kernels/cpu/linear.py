"""bfloat16 matrix products on CPUs with AVX512_BF16, from weights packed once: fast for few rows and for many.

Every sum is one chain over the contracted axis, two products at a time, from the first to the last, in vectors
(`vdpbf16ps`) or, where the CPU has AMX, in tiles: the bits of a result depend on its row and its column alone, never on
how many rows there are. XLA's own dots pack the weights in every call, which is most of their time below a hundred
rows.

Packed, a matrix [N, K] keeps its shape and its bytes take another order: panels of PANEL columns of the result, in
each the columns side by side in pairs along K, [N / PANEL, K / 2, PANEL, 2].

With vectors, for few rows a panel is read in pieces that stay in the first cache while all rows are multiplied by them;
each piece asks for the next one, so that memory works while the sums are computed.
"""

# numba reads the functions itself; pyright knows neither its types nor its intrinsics.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from jaxserve.pallas_kernels.cpu import features, ffi, tiles
from jaxserve.pallas_kernels.cpu.emitter import FLOATS, INT, INTS, WORD, Emitter

ROWS = 8
"""Rows computed together in vectors; fewer are filled up with zeros."""

PANEL = 32
"""Columns computed together: two vectors of 16 float32."""

_PIECE, _FEW_BLOCKS = 64, 4
"""Pairs of a panel, 8 KiB, that all rows are multiplied by before the next ones, up to so many blocks of rows. More
leave memory time enough, and would have more sums to take up again."""

_GROUP, _ALL = 256, 1 << 30
"""Rows that tiles multiply by all panels of a work item before the next ones, to find them in the second cache; and the
number that vectors never have."""

_PAIR_BYTES, _SUM_BYTES = 4 * PANEL, 4 * PANEL
"""Bytes of a pair of all columns of a panel, and of a row of their sums."""

_VECTORS, _TILES = "vectors_3", "tiles_1"
"""Part of the targets' names. The number changes with what they compute or how weights are packed: a program that was
kept from an earlier release must not meet them."""


def fits(out_features: int, in_features: int) -> bool:
    """Whether a matrix [N, K] can be packed: whole panels of whole pairs, or of whole steps of tiles."""
    return out_features % PANEL == 0 and in_features % (2 * tiles.PAIRS if tiles.usable() else 2) == 0


def runs_here() -> bool:
    """Whether this CPU has the instructions."""
    return features.has("avx512_bf16")


def prepare() -> None:
    """Compiles the functions and makes them known to XLA, once a process; before a program that calls them is loaded
    or run."""
    chosen = kernels()
    num_runs, linear_run, swiglu_pair = _works(chosen)
    ffi.register(_name("linear", chosen), num_runs, linear_run)
    ffi.register(_name("swiglu", chosen), _num_pairs_of_panels, swiglu_pair)


def kernels() -> str:
    """Which of the kernels run here, by name; a program compiled with others cannot call them."""
    return _TILES if tiles.usable() else _VECTORS


def _name(function: str, chosen: str) -> str:
    return f"jaxserve_{function}_{chosen}"


def pack(matrix: jax.Array) -> jax.Array:
    """[N, K] in the order that `linear` reads."""
    n, k = matrix.shape
    return matrix.reshape(n // PANEL, PANEL, k // 2, 2).transpose(0, 2, 1, 3).reshape(n, k)


def pack_gate_up(gate_up: jax.Array) -> jax.Array:
    """[2, I, K] in the order that `swiglu` reads: a panel holds 16 columns of the gate and the same 16 of up."""
    _, wide, k = gate_up.shape
    half = PANEL // 2
    mixed = gate_up.reshape(2, wide // half, half, k).transpose(1, 0, 2, 3)
    return pack(mixed.reshape(2 * wide, k)).reshape(gate_up.shape)


def linear(x: jax.Array, packed: jax.Array) -> jax.Array:
    """x [T, K] times the transposed matrix that `pack` packed, bfloat16 both: float32 [T, N]."""
    n, k = packed.shape
    return _call("linear", x, packed, k, n, jnp.float32)


def swiglu(x: jax.Array, packed: jax.Array) -> jax.Array:
    """silu(x gate^T) * (x up^T), computed in float32, for x [T, K] and what `pack_gate_up` packed: bfloat16 [T, I]."""
    _, wide, k = packed.shape
    return _call("swiglu", x, packed, k, wide, jnp.bfloat16)


def _call(
    function: str, x: jax.Array, packed: jax.Array, k: int, columns: int, dtype: jax.typing.DTypeLike
) -> jax.Array:
    prepare()
    rows, chosen = x.shape[0], kernels()
    together = tiles.ROWS if chosen == _TILES and rows > ROWS else ROWS
    filled = math.ceil(rows / together) * together
    if filled != rows:
        x = jnp.pad(x, ((0, filled - rows), (0, 0)))
    result = jax.ShapeDtypeStruct((filled, columns), dtype)
    return jax.ffi.ffi_call(_name(function, chosen), result)(np.array([filled, k, columns], np.int32), x, packed)[:rows]


def _emit_product(emit, x, x_step, weights, pairs, out, out_step, sums=None, ahead=None, ahead_step=None):
    """Emits ROWS rows of x times some pairs of a panel into rows of out, float32 [PANEL].

    With `sums` [ROWS, PANEL] they are added to these; with `ahead` the two cache lines there are asked for, and it
    moves on by `ahead_step` a pair. All but `pairs` are addresses, and bytes from one row or pair to the next.
    """
    builder = emit.builder

    def add_pair(index, totals):
        if ahead is not None:
            place = emit.at(ahead, builder.mul(index, ahead_step))
            emit.prefetch(place)
            emit.prefetch(emit.at(place, 64))
        base = emit.at(weights, builder.mul(index, WORD(_PAIR_BYTES)))
        columns = [emit.load(emit.at(base, 64 * part), INTS, 64) for part in range(2)]
        new = []
        for row in range(ROWS):
            place = emit.at(x, builder.add(builder.mul(x_step, WORD(row)), builder.mul(index, WORD(4))))
            pair = emit.splat(emit.load(place, INT, 4))
            new += [emit.dot(totals[2 * row + part], pair, columns[part]) for part in range(2)]
        return new

    before = [emit.constant(0.0)] * (2 * ROWS)
    if sums is not None:
        before = [emit.load(emit.at(sums, 64 * number), FLOATS, 64) for number in range(2 * ROWS)]
    for number, total in enumerate(emit.loop(pairs, before, add_pair)):
        row, part = divmod(number, 2)
        emit.store(total, emit.at(out, builder.add(builder.mul(out_step, WORD(row)), WORD(64 * part))))


@intrinsic
def _multiply(typingctx, x, x_step, weights, pairs, out, out_step):
    """`_emit_product` of all pairs."""

    def codegen(context, builder, signature, args):
        _emit_product(Emitter(builder), *args)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 6), codegen


@intrinsic
def _add_piece(typingctx, x, x_step, weights, pairs, out, out_step, sums, ahead, ahead_step):
    """`_emit_product` of a piece, which asks for the next one."""

    def codegen(context, builder, signature, args):
        _emit_product(Emitter(builder), *args)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 9), codegen


@intrinsic
def _gate_row(typingctx, sums, out):
    """silu(gate) * up as bfloat16 to out [16], for a row of sums: those of the gate, then those of up."""

    def codegen(context, builder, signature, args):
        emit = Emitter(builder)
        gate, up = (emit.load(emit.at(args[0], 64 * part), FLOATS, 64) for part in range(2))
        values = builder.fmul(emit.silu(gate), up)
        emit.store(emit.half(emit.to_bfloat(values, values)), args[1])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@njit
def _sizes(frame):
    """Rows, length of the contracted axis, columns of the result."""
    sizes = ffi.argument(frame, 0, 3, np.int32)
    return np.int64(sizes[0]), np.int64(sizes[1]), np.int64(sizes[2])


@njit
def _multiply_panel(x, rows, k, weights, out, out_step, sums):
    """All rows, a multiple of ROWS, times one panel, into rows of out; sums is memory for as many."""
    blocks, step = rows // ROWS, ROWS * out_step
    if blocks > _FEW_BLOCKS:
        for block in range(blocks):
            _multiply(x + block * ROWS * k * 2, 2 * k, weights, k // 2, out + block * step, out_step)
        return
    ffi.array_at(sums, rows * _SUM_BYTES // 8, np.int64)[:] = 0
    share = (_PAIR_BYTES + blocks - 1) // blocks  # of the next piece, asked for by a block for each pair
    for first in range(0, k // 2, _PIECE):
        pairs = min(_PIECE, k // 2 - first)
        piece = weights + first * _PAIR_BYTES
        for block in range(blocks):
            part, totals = x + (block * ROWS * k + 2 * first) * 2, sums + block * ROWS * _SUM_BYTES
            ahead = piece + _PIECE * (_PAIR_BYTES + block * share)
            if first + _PIECE < k // 2:
                _add_piece(part, 2 * k, piece, pairs, totals, _SUM_BYTES, totals, ahead, share)
            else:
                _add_piece(part, 2 * k, piece, pairs, out + block * step, out_step, totals, ahead, share)


@njit
def _panels_of_run(k, columns):
    """Panels of a work item of `linear`: two that are short, one after the other, where that leaves enough items."""
    return 2 if columns >= 64 * PANEL and k * PANEL * 2 <= 2**18 else 1


@njit
def _panels_of_run_in_tiles(k, columns):
    """The same in tiles, which ask memory for what comes next, in the next panel of the item too."""
    return 4 if columns >= 64 * PANEL else 1


@njit
def _aligned(address):
    """The start of the next cache line."""
    return (address + 63) // 64 * 64


@njit
def _num_pairs_of_panels(frame):
    _, _, columns = _sizes(frame)
    return (columns + PANEL - 1) // PANEL


@njit
def _opened(frame):
    """Sizes, the addresses of x and weights, and memory to release: for the sums of a panel, from a cache line on, and
    behind them for what shapes the tiles."""
    rows, k, columns = _sizes(frame)
    x = ffi.address_of(ffi.argument(frame, 1, 1, np.uint16))
    weights = ffi.address_of(ffi.argument(frame, 2, 1, np.uint16))
    scratch = ffi.allocate(rows * _SUM_BYTES + tiles.CONFIGURATION_BYTES + 64)
    return rows, k, columns, x, weights, scratch, _aligned(scratch)


@njit
def _no_begin(rows, configuration):
    pass


@njit
def _no_end():
    pass


@njit
def _multiply_tiles(x, rows, k, weights, out, out_step, sums):
    tiles.multiply_panel(x, rows, k, weights, out, out_step)


def panel_products(chosen):
    """What multiplies rows by a panel, with vectors or in tiles: what shapes the registers for so many rows before, the
    product, what gives the registers back, and the rows that are multiplied by a panel before the next ones."""
    if chosen == _TILES:
        return tiles.begin, _multiply_tiles, tiles.end, _GROUP
    return _no_begin, _multiply_panel, _no_end, _ALL


@functools.cache
def _works(chosen):
    """What `linear` and `swiglu` do for an item, with vectors or in tiles."""
    begin, multiply, end, group = panel_products(chosen)
    run_of = _panels_of_run_in_tiles if chosen == _TILES else _panels_of_run

    @njit
    def num_runs(frame):
        _, k, columns = _sizes(frame)
        run = run_of(k, columns)
        return (columns // PANEL + run - 1) // run

    @njit
    def linear_run(frame, item):
        """Some panels of `linear` for all rows."""
        rows, k, columns, x, weights, scratch, sums = _opened(frame)
        run = run_of(k, columns)
        out = ffi.address_of(ffi.result(frame, 0, 1, np.float32))
        begin(rows, sums + rows * _SUM_BYTES)
        for first in range(0, rows, group):
            count, place = min(group, rows - first), x + 2 * first * k
            for panel in range(item * run, min(item * run + run, columns // PANEL)):
                target = out + 4 * (first * columns + panel * PANEL)
                multiply(place, count, k, weights + panel * PANEL * k * 2, target, 4 * columns, sums)
        end()
        ffi.release(scratch)

    @njit
    def swiglu_pair(frame, pair):
        """Two panels of `swiglu`, which give a cache line of the result (one panel at the end of an odd number)."""
        rows, k, columns, x, weights, scratch, sums = _opened(frame)
        half = PANEL // 2
        out = ffi.address_of(ffi.result(frame, 0, 1, np.uint16))
        begin(rows, sums + rows * _SUM_BYTES)
        for first in range(0, rows, group):
            count, place = min(group, rows - first), x + 2 * first * k
            for panel in range(2 * pair, min(2 * pair + 2, columns // half)):
                multiply(place, count, k, weights + panel * PANEL * k * 2, sums, _SUM_BYTES, sums)
                for row in range(count):
                    _gate_row(sums + row * _SUM_BYTES, out + 2 * ((first + row) * columns + panel * half))
        end()
        ffi.release(scratch)

    return num_runs, linear_run, swiglu_pair
