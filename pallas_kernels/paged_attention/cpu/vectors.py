"""Inner loops of attention and of the KV write on CPUs with AVX512_BF16, as LLVM's vector instructions.

They take addresses and numbers as int64. Nothing is reassociated or contracted, so the order of every sum is the one
written here.
"""

# numba reads these functions itself; pyright knows neither its types nor its intrinsics.
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from jaxserve.pallas_kernels.cpu.emitter import FLOATS, INT, INTS, LANES, SINGLE, WORD, Emitter

BLOCK = 64
"""Positions that the online softmax takes at once, counted from position 0."""

MAX_ROWS = 6
"""The most queries computed together: with four vectors each, their sums leave room for operands in 32 registers."""

# A function of a kernel. Nobody calls it from Python, and what numba makes for that would double the time it takes.
compiled = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)

_VECTORS = BLOCK // LANES


def _emit_weigh(builder: Any, rows: int, arguments: Any) -> None:
    """Takes BLOCK positions into the softmax of each query, and stores what to weigh their values with.

    A weight is 2^(score - exponent), where the exponent is the greatest score so far, rounded up to an integer: so
    rescaling multiplies by a power of two, which is exact.

    Addresses: query, bfloat16 [rows, 2 pairs]; keys, four addresses of LANES positions each, whose pairs of the
    head dimension lie key_step bytes apart, then four of the block that is read next, which is asked for; places,
    int32 [rows], the queries' positions; exponents, float32 [rows], and totals, float32 [rows, LANES], which are
    updated; decays, float32 [rows], and weights, bfloat16 [rows, BLOCK], which are written. Numbers: first, the
    position that the block begins with; window, positions that a query sees; scale, float32, of the scores in base 2.
    """
    emitter = Emitter(builder)
    query, pairs, keys, key_step, first, places, window, scale, exponents, totals, decays, weights = arguments
    bases, ahead = (
        [emitter.load(emitter.at(keys, 8 * (start + part)), WORD, 8) for part in range(_VECTORS)]
        for start in (0, _VECTORS)
    )
    query_step = builder.mul(pairs, WORD(4))

    def take_pair(index: Any, sums: list[Any]) -> list[Any]:
        offset = builder.mul(index, key_step)
        for base in ahead:
            emitter.prefetch(emitter.at(base, offset))
        vectors = [emitter.load(emitter.at(base, offset), INTS, 4) for base in bases]
        results = []
        for row in range(rows):
            place = builder.add(query, builder.add(builder.mul(query_step, WORD(row)), builder.shl(index, WORD(2))))
            pair = emitter.splat(emitter.load(place, INT, 4))
            results += [emitter.dot(sums[row * _VECTORS + part], pair, vectors[part]) for part in range(_VECTORS)]
        return results

    sums = emitter.loop(pairs, [emitter.constant(0.0)] * (rows * _VECTORS), take_pair)
    lanes = ir.Constant(INTS, list(range(LANES)))
    first = emitter.splat(builder.trunc(first, INT))
    positions = [
        builder.add(builder.add(first, lanes), ir.Constant(INTS, [part * LANES] * LANES)) for part in range(_VECTORS)
    ]
    window, scale = builder.trunc(window, INT), emitter.splat(scale)
    for row in range(rows):
        place = emitter.load(emitter.at(places, 4 * row), INT, 4)
        last, before = emitter.splat(place), emitter.splat(builder.sub(place, window))
        scores = []
        for part, position in enumerate(positions):
            seen = builder.and_(builder.icmp_signed("<=", position, last), builder.icmp_signed(">", position, before))
            score = builder.fmul(sums[row * _VECTORS + part], scale)
            scores.append(builder.select(seen, score, emitter.constant(-math.inf)))
        greatest = emitter.larger(emitter.larger(scores[0], scores[1]), emitter.larger(scores[2], scores[3]))
        greatest = emitter.call("llvm.ceil.f32", SINGLE, emitter.largest(greatest))
        exponent = emitter.load(emitter.at(exponents, 4 * row), SINGLE, 4)
        raised = emitter.larger(greatest, exponent)
        emitter.store(raised, emitter.at(exponents, 4 * row), 4)
        decay = emitter.power_of_two(builder.fsub(exponent, raised))
        emitter.store(decay, emitter.at(decays, 4 * row), 4)
        raised = emitter.splat(raised)
        powers = [emitter.exp2(builder.fsub(score, raised)) for score in scores]
        total = builder.fmul(emitter.load(emitter.at(totals, 4 * LANES * row), FLOATS, 4), emitter.splat(decay))
        ones = emitter.splat(INT(0x3F803F80))  # pairs of 1 in bfloat16
        for half in range(_VECTORS // 2):
            rounded = emitter.to_bfloat(powers[2 * half], powers[2 * half + 1])
            total = emitter.dot(total, rounded, ones)
            emitter.store(rounded, emitter.at(weights, 2 * BLOCK * row + 4 * LANES * half))
        emitter.store(total, emitter.at(totals, 4 * LANES * row), 4)


def _emit_gather(builder: Any, rows: int, arguments: Any, vectors: int) -> None:
    """Multiplies outputs by their decay and adds weighed values, one pair of positions after the other.

    Addresses: out, float32 [rows, vectors * LANES], rows out_step bytes apart, updated; weights, bfloat16 [rows,
    BLOCK]; decays, float32 [rows]; values, four addresses of LANES positions each, whose pairs lie value_step bytes
    apart, then four of the block that is read next, which is asked for. Numbers: offset, bytes into a pair of
    positions; first and count, the pairs of the block, at least one.
    """
    emitter = Emitter(builder)
    out, out_step, weights, decays, values, value_step, offset, first, count = arguments
    places = [
        emitter.at(builder.add(out, builder.mul(out_step, WORD(row))), 4 * LANES * part)
        for row in range(rows)
        for part in range(vectors)
    ]
    sums = []
    for row in range(rows):
        decay = emitter.splat(emitter.load(emitter.at(decays, 4 * row), SINGLE, 4))
        sums += [
            builder.fmul(emitter.load(place, FLOATS, 4), decay) for place in places[row * vectors : (row + 1) * vectors]
        ]

    def take_pair(index: Any, sums: list[Any]) -> list[Any]:
        pair = builder.add(first, index)
        chunk = builder.lshr(pair, WORD((LANES // 2).bit_length() - 1))
        place = emitter.at(values, builder.shl(chunk, WORD(3)))
        inside = builder.mul(builder.and_(pair, WORD(LANES // 2 - 1)), value_step)
        base, ahead = (
            builder.add(builder.add(emitter.load(emitter.at(place, start), WORD, 8), inside), offset)
            for start in (0, 8 * _VECTORS)
        )
        for part in range(vectors):
            emitter.prefetch(emitter.at(ahead, 4 * LANES * part))
        operands = [emitter.load(emitter.at(base, 4 * LANES * part), INTS, 4) for part in range(vectors)]
        results = []
        for row in range(rows):
            place = emitter.at(builder.add(weights, builder.shl(pair, WORD(2))), 2 * BLOCK * row)
            weight = emitter.splat(emitter.load(place, INT, 4))
            results += [emitter.dot(sums[row * vectors + part], weight, operands[part]) for part in range(vectors)]
        return results

    for value, place in zip(emitter.loop(count, sums, take_pair), places, strict=True):
        emitter.store(value, place, 4)


_FUNCTIONS: dict[str, tuple[tuple[Any, ...], Callable[..., None]]] = {
    "weigh": ((*[WORD] * 7, SINGLE, *[WORD] * 4), _emit_weigh),
    "gather": ((WORD,) * 9, functools.partial(_emit_gather, vectors=2)),
    "gather_wide": ((WORD,) * 9, functools.partial(_emit_gather, vectors=4)),
}


def _symbol(name: str) -> str:
    return f"jaxserve_attention_{name}"


@functools.cache
def compile_functions() -> Any:
    """Compiles `weigh`, `gather` and `gather_wide`, on which numba would spend ten times as long, and makes them known
    to the linker. Returns what keeps them in memory. It must come before functions that call them are compiled."""
    module = ir.Module("attention")
    module.triple = binding.get_process_triple()
    for name, (kinds, emit) in _FUNCTIONS.items():
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [WORD, *kinds]), _symbol(name))
        builder = ir.IRBuilder(function.append_basic_block("entry"))
        otherwise = function.append_basic_block("otherwise")
        choice = builder.switch(function.args[0], otherwise)
        for rows in range(1, MAX_ROWS + 1):
            case = function.append_basic_block(f"rows_{rows}")
            choice.add_case(WORD(rows), case)
            builder.position_at_end(case)
            emit(builder, rows, function.args[1:])
            builder.ret_void()
        builder.position_at_end(otherwise)
        builder.unreachable()
    features = binding.get_host_cpu_features().flatten()
    machine = binding.Target.from_triple(module.triple).create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features, opt=3
    )
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), machine)
    engine.finalize_object()
    for name in _FUNCTIONS:
        binding.add_symbol(_symbol(name), engine.get_function_address(_symbol(name)))
    return engine


def _call(name: str) -> Callable[..., Any]:
    """The code generator of an intrinsic that calls the function `name`."""

    def codegen(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [WORD, *_FUNCTIONS[name][0]])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, _symbol(name)), args)
        return context.get_dummy_value()

    return codegen


@intrinsic
def weigh(
    typingctx, rows, query, pairs, keys, key_step, first, places, window, scale, exponents, totals, decays, weights
):
    """`_emit_weigh` for a number of rows up to MAX_ROWS."""
    words, more = (types.int64,) * 8, (types.int64,) * 4
    return types.void(*words, types.float32, *more), _call("weigh")


@intrinsic
def gather(typingctx, rows, out, out_step, weights, decays, values, value_step, offset, first, count):
    """`_emit_gather` for a number of rows up to MAX_ROWS and two vectors of the head dimension."""
    words = (types.int64,) * 10
    return types.void(*words), _call("gather")


@intrinsic
def gather_wide(typingctx, rows, out, out_step, weights, decays, values, value_step, offset, first, count):
    """`_emit_gather` for a number of rows up to MAX_ROWS and four vectors of the head dimension."""
    words = (types.int64,) * 10
    return types.void(*words), _call("gather_wide")


@intrinsic
def rotate_lanes(typingctx, x, cos, sin, half, out):
    """Rotates LANES pairs (x[i], x[i + half bytes]) and rounds them to bfloat16 out[i] and out[i + half / 2 bytes].

    Addresses: x, cos and sin, float32; out, bfloat16.
    """

    def codegen(context, builder, signature, args):
        emitter = Emitter(builder)
        x, cos, sin, half, out = args
        low, high = emitter.load(x, FLOATS, 4), emitter.load(emitter.at(x, half), FLOATS, 4)
        cos, sin = emitter.load(cos, FLOATS, 4), emitter.load(sin, FLOATS, 4)
        turned = emitter.to_bfloat(
            builder.fsub(builder.fmul(low, cos), builder.fmul(high, sin)),
            builder.fadd(builder.fmul(high, cos), builder.fmul(low, sin)),
        )
        turned = builder.bitcast(turned, ir.VectorType(WORD, 8))
        for place, start in ((out, 0), (emitter.at(out, builder.lshr(half, WORD(1))), 4)):
            lanes = ir.Constant(ir.VectorType(INT, 4), list(range(start, start + 4)))
            emitter.store(builder.shuffle_vector(turned, ir.Constant(turned.type, ir.Undefined), lanes), place)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def round_lanes(typingctx, x, factor, divisor, out):
    """Writes 2 LANES numbers x * factor / divisor + 0 as bfloat16; x and out are addresses, x float32.

    The 0 makes a sum that is -0 the same as one that is 0: which of the two it is may depend on positions whose weight
    is 0.
    """

    def codegen(context, builder, signature, args):
        emitter = Emitter(builder)
        x, factor, divisor, out = args
        factor, divisor = emitter.splat(factor), emitter.splat(divisor)
        parts = []
        for offset in (0, 4 * LANES):
            product = builder.fmul(emitter.load(emitter.at(x, offset), FLOATS, 4), factor)
            parts.append(builder.fadd(builder.fdiv(product, divisor), emitter.constant(0.0)))
        emitter.store(emitter.to_bfloat(*parts), out)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.float32, types.int64), codegen
