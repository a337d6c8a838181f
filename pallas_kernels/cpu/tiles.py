"""Matrix products in tiles, for CPUs with AMX: 16 rows by 16 columns of float32 sums in a register.

A step takes 16 pairs of the contracted axis of one or two tiles of rows and of both halves of a panel of 32 columns (as
`linear` packs it), and adds to the sums pair by pair, from the first to the last: the bits of a result depend on its
row and its column alone, as with vectors.

The kernel keeps threads of a process from tiles until the process has asked for them, once.
"""

# numba reads the functions itself; pyright knows neither its types nor its intrinsics.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import ctypes
import functools
import platform

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from jaxserve.pallas_kernels.cpu import features, ffi
from jaxserve.pallas_kernels.cpu.emitter import WORD, Emitter

ROWS, PAIRS = 16, 16
"""Rows of a tile, and pairs of the contracted axis that a step takes."""

CONFIGURATION_BYTES = 64

# System call 158 of Linux on x86-64 (arch_prctl), its request for a feature of the CPU, and that of tiles.
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18

_LINE = 64
_STEP_BYTES = PAIRS * 2 * _LINE
"""Bytes of a step of a panel: a line for each pair of each half."""

_AHEAD = 4
"""Steps from one that is computed to the one that memory is asked for, while the first rows are multiplied."""

# Registers: sums of (tile of rows, half of the panel), rows, halves of the panel.
_SUMS, _ROWS_OF_X, _HALVES = ((0, 1), (2, 3)), (4, 5), (6, 7)


@functools.cache
def usable() -> bool:
    """Whether this CPU has tiles of bfloat16 and the kernel lets this process use them."""
    if not features.has("amx_bf16") or platform.machine() != "x86_64":
        return False
    return ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) == 0


def _tile(number):
    return ir.Constant(ir.IntType(8), number)


def _pointer(emit, address):
    return emit.builder.inttoptr(address, ir.IntType(8).as_pointer())


@intrinsic
def _configure(typingctx, configuration):
    """Shapes the registers of this thread as 64 bytes at an address say."""

    def codegen(context, builder, signature, args):
        emit = Emitter(builder)
        emit.call("llvm.x86.ldtilecfg", ir.VoidType(), _pointer(emit, args[0]))
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def end(typingctx):
    """Gives the registers of this thread back."""

    def codegen(context, builder, signature, args):
        Emitter(builder).call("llvm.x86.tilerelease", ir.VoidType())
        return context.get_dummy_value()

    return types.void(), codegen


def _multiply(tiles, ask):
    """The function that multiplies so many tiles of rows by a panel; ask: for what of it memory still has."""

    @intrinsic
    def multiply(typingctx, x, x_step, weights, steps, out, out_step):
        """x, weights, out: addresses. x_step, out_step: bytes from one row to the next. steps: of PAIRS pairs."""

        def codegen(context, builder, signature, args):
            emit = Emitter(builder)
            x, x_step, weights, steps, out, out_step = args
            none = ir.VoidType()

            def row(address, step, tile):
                return builder.add(address, builder.mul(step, WORD(tile * ROWS)))

            def add_step(index, values):
                place = builder.add(x, builder.mul(index, WORD(4 * PAIRS)))
                panel = builder.add(weights, builder.mul(index, WORD(_STEP_BYTES)))
                if ask:
                    for line in range(0, _STEP_BYTES, _LINE):
                        emit.prefetch(emit.at(panel, _AHEAD * _STEP_BYTES + line))
                for half, register in enumerate(_HALVES):
                    pointer = _pointer(emit, emit.at(panel, half * _LINE))
                    emit.call("llvm.x86.tileloadd64", none, _tile(register), pointer, WORD(2 * _LINE))
                for tile in range(tiles):
                    pointer = _pointer(emit, row(place, x_step, tile))
                    emit.call("llvm.x86.tileloadd64", none, _tile(_ROWS_OF_X[tile]), pointer, x_step)
                    for total, half in zip(_SUMS[tile], _HALVES, strict=True):
                        registers = (_tile(number) for number in (total, _ROWS_OF_X[tile], half))
                        emit.call("llvm.x86.tdpbf16ps", none, *registers)
                return values

            for total in sum(_SUMS[:tiles], ()):
                emit.call("llvm.x86.tilezero", none, _tile(total))
            emit.loop(steps, [], add_step)
            for tile in range(tiles):
                for half, total in enumerate(_SUMS[tile]):
                    pointer = _pointer(emit, emit.at(row(out, out_step, tile), half * _LINE))
                    emit.call("llvm.x86.tilestored64", none, _tile(total), pointer, out_step)
            return context.get_dummy_value()

        return types.void(*(types.int64,) * 6), codegen

    return multiply


_first_tile, _first_tiles, _tile_after, _tiles_after = (
    _multiply(tiles, ask) for ask in (True, False) for tiles in (1, 2)
)


@njit
def begin(rows, configuration):
    """Shapes the registers for products of so many rows; configuration is memory of CONFIGURATION_BYTES."""
    height = min(rows, ROWS)
    words = ffi.array_at(configuration, 8, types.int64)
    words[:] = 0
    words[0] = 1  # palette
    words[2] = words[3] = 0x0040004000400040  # bytes of a row, of each register
    words[6] = 0x1010000000000000 + height * 0x010101010101  # rows of each register; halves have one a pair
    _configure(configuration)


@njit
def multiply_panel(x, rows, k, weights, out, out_step):
    """All rows times one panel, into rows of out. rows: at most ROWS, or a multiple of it; k: one of 2 * PAIRS."""
    steps = k // (2 * PAIRS)
    if rows <= ROWS:
        _first_tile(x, 2 * k, weights, steps, out, out_step)
        return
    _first_tiles(x, 2 * k, weights, steps, out, out_step)
    for first in range(2 * ROWS, rows, 2 * ROWS):
        place, target = x + first * k * 2, out + first * out_step
        if rows - first > ROWS:
            _tiles_after(place, 2 * k, weights, steps, target, out_step)
        else:
            _tile_after(place, 2 * k, weights, steps, target, out_step)
