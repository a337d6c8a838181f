"""Functions compiled by numba as targets of XLA's foreign function interface on CPUs.

XLA hands a target one pointer, to a call frame (xla/ffi/api/c_api.h, of which jaxlib ships the header): the buffers of
the arguments and results are found through it. Its layout is part of an ABI that XLA extends at the end only.
"""

# numba reads these functions itself; pyright knows neither its types nor its intrinsics.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import threading
from typing import Any

import jax
import numpy as np
from llvmlite import ir
from numba import cfunc, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

# Places in the structs of c_api.h, in words of 8 bytes.
FRAME_EXTENSION, FRAME_API, FRAME_CONTEXT, FRAME_ARGUMENTS, FRAME_RESULTS = 1, 2, 3, 9, 14
API_SCHEDULE, API_NUM_THREADS = 17, 18
BUFFER_DATA = 3
EXTENSION_METADATA = 3
METADATA_VERSION, API_VERSION = 3, 4

# Places in what the threads of one call share, likewise.
_STATE_NEXT, _STATE_DONE, _STATE_USERS, _STATE_ITEMS, _STATE_FRAME, _STATE_WORDS = 0, 1, 2, 3, 4, 8


@intrinsic
def words_at(typingctx, address):
    """The memory from an address on as int64 words, unbounded."""

    def codegen(context, builder, signature, args):
        return _view(context, builder, signature.return_type, args[0], context.get_constant(types.intp, 1 << 40))

    return types.Array(types.int64, 1, "C")(types.int64), codegen


@intrinsic
def array_at(typingctx, address, size, dtype):
    """`size` elements of `dtype` from an address on."""

    def codegen(context, builder, signature, args):
        return _view(context, builder, signature.return_type, args[0], args[1])

    return types.Array(dtype.dtype, 1, "C")(types.int64, types.int64, dtype), codegen


def _view(context: Any, builder: Any, kind: Any, address: Any, size: Any) -> Any:
    array = context.make_array(kind)(context, builder)
    item = context.get_data_type(kind.dtype)
    itemsize = context.get_constant(types.intp, context.get_abi_sizeof(item))
    context.populate_array(
        array,
        data=builder.inttoptr(address, item.as_pointer()),
        shape=cgutils.pack_array(builder, [size]),
        strides=cgutils.pack_array(builder, [itemsize]),
        itemsize=itemsize,
        meminfo=None,
    )
    return array._getvalue()


@njit
def argument(frame, number, size, dtype):
    """Argument `number` of a call as a flat array."""
    buffers = words_at(words_at(frame)[FRAME_ARGUMENTS])
    return array_at(words_at(buffers[number])[BUFFER_DATA], size, dtype)


@njit
def result(frame, number, size, dtype):
    """Result `number` of a call as a flat array."""
    buffers = words_at(words_at(frame)[FRAME_RESULTS])
    return array_at(words_at(buffers[number])[BUFFER_DATA], size, dtype)


@njit
def asked_for_metadata(frame):
    """Whether the call only asks which version of the interface the target speaks; it is answered then."""
    words = words_at(frame)
    if words[FRAME_EXTENSION] == 0:
        return False
    metadata = words_at(words_at(words[FRAME_EXTENSION])[EXTENSION_METADATA])
    metadata[METADATA_VERSION] = words_at(words[FRAME_API])[API_VERSION]  # major and minor, 4 bytes each
    return True


@intrinsic
def atomic_add(typingctx, address, number):
    """Adds to the int64 at an address, seen by all threads in one order; what it was before."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", pointer, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def call_function(typingctx, function, argument):
    """Calls the C function at an address with one word and returns its word."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(64)
        pointer = builder.inttoptr(args[0], ir.FunctionType(word, [word]).as_pointer())
        return builder.call(pointer, [args[1]])

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def allocate(typingctx, size):
    """C's malloc."""

    def codegen(context, builder, signature, args):
        word = ir.IntType(64)
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(word, [word]), "malloc")
        return builder.call(function, args)

    return types.int64(types.int64), codegen


@intrinsic
def release(typingctx, address):
    """C's free."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(64)])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "free"), args)
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def address_of(typingctx, array):
    """Where an array's elements begin."""

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return builder.ptrtoint(data, ir.IntType(64))

    return types.int64(array), codegen


@njit
def num_threads(frame):
    """Threads of XLA's pool."""
    words, place = words_at(frame), allocate(40)
    scratch = words_at(place)
    scratch[0], scratch[1], scratch[2], scratch[3] = 32, 0, words[FRAME_CONTEXT], place + 32
    scratch[4] = 1
    call_function(words_at(words[FRAME_API])[API_NUM_THREADS], place)
    threads = scratch[4]
    release(place)
    return threads


@njit
def _schedule(frame, task, data, scratch):
    """Hands a task to XLA's pool; whether it was taken."""
    words = words_at(frame)
    scratch[0], scratch[1], scratch[2], scratch[3], scratch[4] = 40, 0, words[FRAME_CONTEXT], task, data
    return call_function(words_at(words[FRAME_API])[API_SCHEDULE], address_of(scratch)) == 0


def target(num_items: Any, work: Any) -> Any:
    """The C function of a call frame that does `work(frame, item)` for each item of `num_items(frame)`.

    Both are njit functions. Items are shared among the calling thread and those of XLA's pool, each taking the next one
    that nobody has: which thread computes an item, and when, must not matter.
    """

    @njit
    def take(state):
        words = words_at(state)
        frame, items = words[_STATE_FRAME], words[_STATE_ITEMS]
        while True:
            item = atomic_add(state + 8 * _STATE_NEXT, 1)
            if item >= items:
                break
            work(frame, item)
            atomic_add(state + 8 * _STATE_DONE, 1)
        # A task may start when all is done, and even after the call: who comes last frees what they share.
        if atomic_add(state + 8 * _STATE_USERS, -1) == 1:
            release(state)

    @cfunc(types.void(types.int64))
    def task(state):
        take(state)

    task_address = task.address

    @cfunc(types.int64(types.int64))
    def handler(frame):
        if asked_for_metadata(frame):
            return 0
        items = num_items(frame)
        scratch = np.empty(8, np.int64)
        helpers = min(items, num_threads(frame)) - 1
        if helpers <= 0:
            for item in range(items):
                work(frame, item)
            return 0
        state = allocate(8 * _STATE_WORDS)
        words = words_at(state)
        words[_STATE_NEXT], words[_STATE_DONE], words[_STATE_ITEMS], words[_STATE_FRAME] = 0, 0, items, frame
        words[_STATE_USERS] = helpers + 2  # this function looks at the state when its own share is done
        for _ in range(helpers):
            if not _schedule(frame, task_address, state, scratch):
                atomic_add(state + 8 * _STATE_USERS, -1)
        take(state)
        while atomic_add(state + 8 * _STATE_DONE, 0) < items:
            pass
        if atomic_add(state + 8 * _STATE_USERS, -1) == 1:
            release(state)
        return 0

    return handler


def register(name: str, num_items: Any, work: Any) -> None:
    """Makes `target(num_items, work)` known to XLA under a name, for good; does nothing where it is.

    Before a program that calls it is compiled or loaded. Threads may call it at once.
    """
    with _LOCK:
        if name not in _HANDLERS:
            handler = target(num_items, work)
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(handler.address), platform="cpu", api_version=1)
            _HANDLERS[name] = handler


_LOCK = threading.Lock()
_HANDLERS: dict[str, Any] = {}
"""The functions that XLA knows, kept from being freed."""
