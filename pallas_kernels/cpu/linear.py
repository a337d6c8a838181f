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
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from pallas_kernels.cpu import features, ffi, simd

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


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    intrinsic_name = "bf16"

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat)

    def __hash__(self):
        return hash(_BFloat)


@intrinsic
def multiply_panel(typingctx, x, x_stride, weights, pairs, out, out_stride):
    """ROWS rows of x times one panel of weights, into out. All are addresses, strides are bytes a row, pairs is half
    the length of the contracted axis. x is bfloat16, out float32; out takes all PANEL columns."""

    def codegen(context, builder, signature, args):
        for place, sums in zip(*_multiply(builder, *args), strict=True):
            for part, values in enumerate(sums):
                target = builder.inttoptr(builder.add(place, _WORD(64 * part)), values.type.as_pointer())
                builder.store(values, target, align=4)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 6), codegen


@intrinsic
def gate_panel(typingctx, x, x_stride, weights, pairs, out, out_stride):
    """As `multiply_panel` for a panel of 16 columns of the gate and 16 of up: silu(gate) * up as bfloat16 into out,
    which takes PANEL / 2 columns."""

    def codegen(context, builder, signature, args):
        for place, (gate, up) in zip(*_multiply(builder, *args), strict=True):
            values = simd.bfloat16_vector(builder, builder.fmul(simd.silu_vector(builder, gate), up))
            builder.store(values, builder.inttoptr(place, values.type.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(*(types.int64,) * 6), codegen


_WORD = ir.IntType(64)


def _multiply(builder, x, x_step, weights, count, out, out_step):
    """Emits the loop over pairs; returns the ROWS addresses in out and, for each, the sums of its row: two vectors."""
    single, pair_of = ir.FloatType(), ir.IntType(32)
    accumulator, operand, broadcast = (
        ir.VectorType(single, 16),
        ir.VectorType(_BFloat(), 32),
        ir.VectorType(pair_of, 16),
    )
    dot = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(accumulator, [accumulator, operand, operand]),
        "llvm.x86.avx512bf16.dpbf16ps.512",
    )
    before, loop, after = builder.block, builder.append_basic_block("pairs"), builder.append_basic_block("pairs.end")
    builder.branch(loop)
    builder.position_at_end(loop)
    index = builder.phi(_WORD)
    sums = [[builder.phi(accumulator) for _ in range(2)] for _ in range(ROWS)]
    base = builder.add(weights, builder.mul(index, _WORD(PANEL * 4)))
    columns = [
        builder.load(builder.inttoptr(builder.add(base, _WORD(64 * part)), operand.as_pointer()), align=64)
        for part in range(2)
    ]
    new = []
    for row in range(ROWS):
        place = builder.add(x, builder.add(builder.mul(x_step, _WORD(row)), builder.mul(index, _WORD(4))))
        pair = builder.load(builder.inttoptr(place, pair_of.as_pointer()), align=4)
        lanes = builder.insert_element(ir.Constant(broadcast, ir.Undefined), pair, pair_of(0))
        lanes = builder.shuffle_vector(lanes, ir.Constant(broadcast, ir.Undefined), ir.Constant(broadcast, None))
        lanes = builder.bitcast(lanes, operand)
        new.append([builder.call(dot, [sums[row][part], lanes, columns[part]]) for part in range(2)])
    following = builder.add(index, _WORD(1))
    index.add_incoming(_WORD(0), before)
    index.add_incoming(following, loop)
    for row in range(ROWS):
        for part in range(2):
            sums[row][part].add_incoming(ir.Constant(accumulator, None), before)
            sums[row][part].add_incoming(new[row][part], loop)
    builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
    builder.position_at_end(after)
    return [builder.add(out, builder.mul(out_step, _WORD(row))) for row in range(ROWS)], new


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
