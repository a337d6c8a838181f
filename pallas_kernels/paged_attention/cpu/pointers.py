"""Memory by address in functions that numba compiles: less to compile than arrays, of which each costs milliseconds.

Addresses count bytes, and indices elements.
"""

# numba reads these functions itself; pyright knows neither its types nor its intrinsics.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from jaxserve.pallas_kernels.cpu import ffi
from jaxserve.pallas_kernels.cpu.emitter import INT, LANES, SINGLE, WORD, Emitter


def _place(builder: Any, address: Any, index: Any, size: int) -> Any:
    return builder.add(address, builder.mul(index, WORD(size)))


@intrinsic
def int32_at(typingctx, address, index):
    """An int32 as an int64."""

    def codegen(context, builder, signature, args):
        return builder.sext(Emitter(builder).load(_place(builder, *args, 4), INT, 4), WORD)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def int64_at(typingctx, address, index):
    """An int64."""

    def codegen(context, builder, signature, args):
        return Emitter(builder).load(_place(builder, *args, 8), WORD, 8)

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def float32_at(typingctx, address, index):
    """A float32."""

    def codegen(context, builder, signature, args):
        return Emitter(builder).load(_place(builder, *args, 4), SINGLE, 4)

    return types.float32(types.int64, types.int64), codegen


@intrinsic
def set_int16(typingctx, address, index, number):
    """Stores the low 16 bits of an int64."""

    def codegen(context, builder, signature, args):
        kind = ir.IntType(16)
        Emitter(builder).store(builder.trunc(args[2], kind), _place(builder, *args[:2], 2))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def set_int32(typingctx, address, index, number):
    """Stores the low 32 bits of an int64."""

    def codegen(context, builder, signature, args):
        Emitter(builder).store(builder.trunc(args[2], INT), _place(builder, *args[:2], 4), 4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def set_int64(typingctx, address, index, number):
    """Stores an int64."""

    def codegen(context, builder, signature, args):
        Emitter(builder).store(args[2], _place(builder, *args[:2], 8), 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


@intrinsic
def fill(typingctx, address, count, value):
    """Sets `count` float32 numbers."""

    def codegen(context, builder, signature, args):
        emitter = Emitter(builder)
        address, count, value = args

        def one(index: Any, values: list[Any]) -> list[Any]:
            emitter.store(value, _place(builder, address, index, 4), 4)
            return values

        with builder.if_then(builder.icmp_signed(">", count, WORD(0))):
            emitter.loop(count, [], one)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.float32), codegen


@intrinsic
def copy_masked(typingctx, source, target, count, mask):
    """Copies `count` vectors of 16 int32, and keeps the bits of the mask alone."""

    def codegen(context, builder, signature, args):
        emitter = Emitter(builder)
        source, target, count, mask = args
        mask = emitter.splat(builder.trunc(mask, INT))

        def one(index: Any, values: list[Any]) -> list[Any]:
            held = emitter.load(_place(builder, source, index, 4 * LANES), ir.VectorType(INT, LANES), 4)
            emitter.store(builder.and_(held, mask), _place(builder, target, index, 4 * LANES), 4)
            return values

        emitter.loop(count, [], one)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


def _buffer(place: int) -> Any:
    """The code generator of the address of buffer `number` among those that a call frame lists in word `place`."""

    def codegen(context, builder, signature, args):
        emitter = Emitter(builder)
        frame, number = args
        buffers = emitter.load(emitter.at(frame, 8 * place), WORD, 8)
        buffer = emitter.load(_place(builder, buffers, number, 8), WORD, 8)
        return emitter.load(emitter.at(buffer, 8 * ffi.BUFFER_DATA), WORD, 8)

    return codegen


@intrinsic
def argument(typingctx, frame, number):
    """The address of an argument's first element."""
    return types.int64(types.int64, types.int64), _buffer(ffi.FRAME_ARGUMENTS)


@intrinsic
def result(typingctx, frame, number):
    """The address of a result's first element."""
    return types.int64(types.int64, types.int64), _buffer(ffi.FRAME_RESULTS)
