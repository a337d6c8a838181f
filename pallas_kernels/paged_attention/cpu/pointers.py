"""Memory by address in compiled functions, and what they find in a call of XLA.

Addresses count bytes, and indices elements.
"""

# The builder is llvmlite's, which has no types.
# pyright: basic, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

from llvmlite import ir

from jaxserve.pallas_kernels.cpu import native_calls
from jaxserve.pallas_kernels.cpu.emitter import INT, LANES, SINGLE, WORD
from jaxserve.pallas_kernels.cpu.native_functions import Emit, Inline


def _place(emit: Emit, address: Any, index: Any, size: int) -> Any:
    return emit.builder.add(address, emit.builder.mul(index, WORD(size)))


@Inline
def int32_at(emit: Emit, address: Any, index: Any) -> Any:
    """An int32 as an int64."""
    return emit.builder.sext(emit.load(_place(emit, address, index, 4), INT, 4), WORD)


@Inline
def int64_at(emit: Emit, address: Any, index: Any) -> Any:
    """An int64."""
    return emit.load(_place(emit, address, index, 8), WORD, 8)


@Inline
def float32_at(emit: Emit, address: Any, index: Any) -> Any:
    """A float32."""
    return emit.load(_place(emit, address, index, 4), SINGLE, 4)


@Inline
def bits_at(emit: Emit, address: Any, index: Any, size: Any) -> Any:
    """The bits of an element of a constant number of bytes."""
    kind = ir.IntType(8 * size.constant)
    return emit.builder.zext(emit.load(_place(emit, address, index, size.constant), kind, size.constant), WORD)


@Inline
def set_bits(emit: Emit, address: Any, index: Any, bits: Any, size: Any) -> None:
    """Stores as many low bits of an int64 as an element of a constant number of bytes has."""
    value = emit.builder.trunc(bits, ir.IntType(8 * size.constant))
    emit.store(value, _place(emit, address, index, size.constant), size.constant)


@Inline
def set_int32(emit: Emit, address: Any, index: Any, number: Any) -> None:
    """Stores the low 32 bits of an int64."""
    emit.store(emit.builder.trunc(number, INT), _place(emit, address, index, 4), 4)


@Inline
def set_int64(emit: Emit, address: Any, index: Any, number: Any) -> None:
    """Stores an int64."""
    emit.store(number, _place(emit, address, index, 8), 8)


@Inline
def atomic_add(emit: Emit, address: Any, number: Any) -> None:
    """Adds to an int64 that threads share."""
    pointer = emit.builder.inttoptr(address, WORD.as_pointer())
    emit.builder.atomic_rmw("add", pointer, number, "monotonic")


@Inline
def fill(emit: Emit, address: Any, count: Any, value: Any) -> None:
    """Sets `count` float32 numbers."""
    emit.times(count, lambda index: emit.store(value, _place(emit, address, index, 4), 4))


@Inline
def copy_masked(emit: Emit, source: Any, target: Any, count: Any, mask: Any) -> None:
    """Copies `count` vectors of LANES int32, and keeps the bits of the mask alone."""
    mask = emit.splat(emit.builder.trunc(mask, INT))

    def one(index: Any) -> None:
        held = emit.load(_place(emit, source, index, 4 * LANES), mask.type, 4)
        emit.store(emit.builder.and_(held, mask), _place(emit, target, index, 4 * LANES), 4)

    emit.times(count, one)


@Inline
def argument(emit: Emit, frame: Any, number: Any) -> Any:
    """The address of an argument's first element."""
    return emit.data(emit.argument(frame, number.constant))


@Inline
def result(emit: Emit, frame: Any, number: Any) -> Any:
    """The address of a result's first element."""
    return emit.data(emit.result(frame, number.constant))


@Inline
def num_threads(emit: Emit, frame: Any) -> Any:
    """Threads of XLA's pool."""
    return native_calls.num_threads(emit, frame, emit.memory(5))


@Inline
def allocate(emit: Emit, size: Any) -> Any:
    """C's malloc."""
    return emit.call("malloc", WORD, size)


@Inline
def release(emit: Emit, address: Any) -> None:
    """C's free."""
    emit.call("free", ir.VoidType(), address)
