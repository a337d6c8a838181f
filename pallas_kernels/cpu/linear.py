"""bfloat16 matrix products on CPUs with AVX512_BF16, from weights packed once: fast for few rows and for many.

Every sum is one chain of `vdpbf16ps` over the contracted axis, two products at a time, from the first to the last: the
bits of a result depend on its row and its column alone, never on how many rows there are. XLA's own dots pack the
weights in every call, which is most of their time below a hundred rows.

Packed, a matrix [N, K] keeps its shape and its bytes take another order: panels of PANEL columns of the result, in
each the columns side by side in pairs along K, [N / PANEL, K / 2, PANEL, 2].
"""

# numba reads the functions itself; pyright knows neither its types nor its intrinsics.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from pallas_kernels.cpu import features, ffi
from pallas_kernels.cpu.emitter import INT, INTS, WORD, Emitter

ROWS = 8
"""Rows computed together; fewer are filled up with zeros."""

PANEL = 32
"""Columns computed together: two vectors of 16 float32."""

_LINEAR, _SWIGLU = "jaxserve_linear_1", "jaxserve_swiglu_1"
"""Names of the targets. The number changes with what they compute or how weights are packed: a program that was kept
from an earlier release must not meet them."""


def fits(out_features: int, in_features: int) -> bool:
    """Whether a matrix [N, K] can be packed: whole panels of whole pairs."""
    return out_features % PANEL == 0 and in_features % 2 == 0


def runs_here() -> bool:
    """Whether this CPU has the instructions, and no faster ones that XLA's dots use (AMX)."""
    return features.has("avx512_bf16") and not features.has("amx_bf16")


def prepare() -> None:
    """Compiles the functions and makes them known to XLA, once a process; before a program that calls them is loaded
    or run."""
    ffi.register(_LINEAR, _num_panels, _linear_panel)
    ffi.register(_SWIGLU, _num_pairs_of_panels, _swiglu_pair)


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
    return _call(_LINEAR, x, packed, k, n, jnp.float32)


def swiglu(x: jax.Array, packed: jax.Array) -> jax.Array:
    """silu(x gate^T) * (x up^T), computed in float32, for x [T, K] and what `pack_gate_up` packed: bfloat16 [T, I]."""
    _, wide, k = packed.shape
    return _call(_SWIGLU, x, packed, k, wide, jnp.bfloat16)


def _call(name: str, x: jax.Array, packed: jax.Array, k: int, columns: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    prepare()
    rows = x.shape[0]
    filled = math.ceil(rows / ROWS) * ROWS
    if filled != rows:
        x = jnp.pad(x, ((0, filled - rows), (0, 0)))
    result = jax.ShapeDtypeStruct((filled, columns), dtype)
    return jax.ffi.ffi_call(name, result)(np.array([filled, k, columns], np.int32), x, packed)[:rows]


@intrinsic
def multiply_panel(typingctx, x, x_stride, weights, pairs, out, out_stride):
    """ROWS rows of x times one panel of weights, into out. All are addresses, strides are bytes a row, pairs is half
    the length of the contracted axis. x is bfloat16, out float32; out takes all PANEL columns."""

    def codegen(context, builder, signature, args):
        emit = Emitter(builder)
        for place, sums in _multiply(emit, *args):
            for part, values in enumerate(sums):
                emit.store(values, emit.at(place, 64 * part))
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 6), codegen


@intrinsic
def gate_panel(typingctx, x, x_stride, weights, pairs, out, out_stride):
    """As `multiply_panel` for a panel of 16 columns of the gate and the same 16 of up: silu(gate) * up as bfloat16 into
    out, which takes PANEL / 2 columns."""

    def codegen(context, builder, signature, args):
        emit = Emitter(builder)
        for place, (gate, up) in _multiply(emit, *args):
            values = builder.fmul(emit.silu(gate), up)
            emit.store(emit.half(emit.to_bfloat(values, values)), place)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 6), codegen


def _multiply(emit, x, x_step, weights, count, out, out_step):
    """Emits the loop over pairs: for each row its address in out and its sums, two vectors."""
    builder = emit.builder

    def add_pair(index, sums):
        base = emit.at(weights, builder.mul(index, WORD(PANEL * 4)))
        columns = [emit.load(emit.at(base, 64 * part), INTS, 64) for part in range(2)]
        new = []
        for row in range(ROWS):
            place = emit.at(x, builder.add(builder.mul(x_step, WORD(row)), builder.mul(index, WORD(4))))
            pair = emit.splat(emit.load(place, INT, 4))
            new += [emit.dot(sums[2 * row + part], pair, columns[part]) for part in range(2)]
        return new

    sums = emit.loop(count, [emit.constant(0.0)] * (2 * ROWS), add_pair)
    return [(emit.at(out, builder.mul(out_step, WORD(row))), sums[2 * row : 2 * row + 2]) for row in range(ROWS)]


@njit
def _sizes(frame):
    """Rows, length of the contracted axis, columns of the result."""
    sizes = ffi.argument(frame, 0, 3, np.int32)
    return np.int64(sizes[0]), np.int64(sizes[1]), np.int64(sizes[2])


@njit
def _num_panels(frame):
    _, _, columns = _sizes(frame)
    return columns // PANEL


@njit
def _linear_panel(frame, panel):
    """One panel of `linear` for all rows."""
    rows, k, columns = _sizes(frame)
    x = ffi.address_of(ffi.argument(frame, 1, 1, np.uint16))
    weights = ffi.address_of(ffi.argument(frame, 2, 1, np.uint16)) + panel * PANEL * k * 2
    out = ffi.address_of(ffi.result(frame, 0, 1, np.float32)) + panel * PANEL * 4
    for row in range(0, rows, ROWS):
        multiply_panel(x + row * k * 2, k * 2, weights, k // 2, out + row * columns * 4, columns * 4)


@njit
def _num_pairs_of_panels(frame):
    _, _, columns = _sizes(frame)
    return (columns + PANEL - 1) // PANEL


@njit
def _swiglu_pair(frame, pair):
    """Two panels of `swiglu`, which give a cache line of the result (one panel at the end of an odd number)."""
    rows, k, columns = _sizes(frame)
    half = PANEL // 2
    x = ffi.address_of(ffi.argument(frame, 1, 1, np.uint16))
    weights = ffi.address_of(ffi.argument(frame, 2, 1, np.uint16)) + pair * 2 * PANEL * k * 2
    out = ffi.address_of(ffi.result(frame, 0, 1, np.uint16)) + pair * PANEL * 2
    for row in range(0, rows, ROWS):
        for part in range(min(2, columns // half - 2 * pair)):
            target = out + row * columns * 2 + part * half * 2
            gate_panel(x + row * k * 2, k * 2, weights + part * PANEL * k * 2, k // 2, target, columns * 2)
