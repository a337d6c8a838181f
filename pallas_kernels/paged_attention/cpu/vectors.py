"""Inner loops of attention and of the KV write on CPUs with AVX512_BF16, as LLVM's vector instructions.

Each is an intrinsic of numba: it takes addresses and numbers as int64 and emits straight code and one loop. Nothing is
reassociated or contracted, so the order of every sum is the one written here.
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

LANES = 16
"""float32 numbers of a vector."""

BLOCK = 64
"""Positions that the online softmax takes at once, counted from position 0."""

MAX_ROWS = 6
"""The most queries computed together: with four vectors each, their sums leave room for operands in 32 registers."""

# A function of a kernel. Nobody calls it from Python, and what numba makes for that would double the time it takes.
compiled = njit(error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)

_VECTORS = BLOCK // LANES
_WORD, _INT, _SINGLE = ir.IntType(64), ir.IntType(32), ir.FloatType()
_FLOATS, _INTS = ir.VectorType(_SINGLE, LANES), ir.VectorType(_INT, LANES)

# 2^x for x in [-1/2, 1/2] by Taylor's series: off by less than 3e-6 of it, where weights keep 2^-9.
_EXP2 = [math.log(2) ** power / math.factorial(power) for power in range(6)]
_LEAST_EXPONENT = -200.0  # 2 to its power is 0


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name."""

    intrinsic_name = "bf16"

    def _to_string(self):
        return "bfloat"

    def __eq__(self, other):
        return isinstance(other, _BFloat)

    def __hash__(self):
        return hash(_BFloat)


_BFLOATS = ir.VectorType(_BFloat(), 2 * LANES)


class _Emitter:
    """Emits instructions through a builder, with the vector types of this module."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def function(self, name: str, result: Any, *arguments: Any) -> Any:
        return cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(result, arguments), name)

    def call(self, name: str, result: Any, *values: Any) -> Any:
        return self.builder.call(self.function(name, result, *(value.type for value in values)), values)

    def at(self, address: Any, offset: Any = 0) -> Any:
        return self.builder.add(address, _WORD(offset) if isinstance(offset, int) else offset)

    def load(self, address: Any, kind: Any, align: int = 2) -> Any:
        return self.builder.load(self.builder.inttoptr(address, kind.as_pointer()), align=align)

    def store(self, value: Any, address: Any, align: int = 2) -> None:
        self.builder.store(value, self.builder.inttoptr(address, value.type.as_pointer()), align=align)

    def splat(self, value: Any, lanes: int = LANES) -> Any:
        kind = ir.VectorType(value.type, lanes)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, _INT(0))
        zeros = ir.Constant(ir.VectorType(_INT, lanes), None)
        return self.builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), zeros)

    def constant(self, value: float) -> Any:
        return ir.Constant(_FLOATS, [value] * LANES)

    def dot(self, total: Any, one: Any, other: Any) -> Any:
        """Adds to each lane the products of its two pairs of bfloat16: the second pair first."""
        one, other = self.builder.bitcast(one, _BFLOATS), self.builder.bitcast(other, _BFLOATS)
        return self.call("llvm.x86.avx512bf16.dpbf16ps.512", _FLOATS, total, one, other)

    def larger(self, one: Any, other: Any) -> Any:
        """The larger of two; `other` where one of them is no number."""
        return self.builder.select(self.builder.fcmp_ordered(">", one, other), one, other)

    def largest(self, vector: Any) -> Any:
        """The largest lane."""
        lanes = LANES
        while lanes > 1:
            lanes //= 2
            halves = [
                self.builder.shuffle_vector(
                    vector,
                    ir.Constant(vector.type, ir.Undefined),
                    ir.Constant(ir.VectorType(_INT, lanes), list(range(start, start + lanes))),
                )
                for start in (0, lanes)
            ]
            vector = self.larger(*halves)
        return self.builder.extract_element(vector, _INT(0))

    def exp2(self, x: Any) -> Any:
        """2^x for x up to 0; 0 from 2^-150 on, minus infinity included."""
        least = self.constant(_LEAST_EXPONENT)
        x = self.builder.select(self.builder.fcmp_ordered("<", x, least), least, x)
        whole = self.call("llvm.rint.v16f32", _FLOATS, x)
        rest = self.builder.fsub(x, whole)
        power = self.constant(_EXP2[-1])
        for coefficient in reversed(_EXP2[:-1]):
            power = self.call("llvm.fma.v16f32", _FLOATS, power, rest, self.constant(coefficient))
        all_lanes, as_set = ir.IntType(16)(-1), _INT(4)
        return self.call("llvm.x86.avx512.mask.scalef.ps.512", _FLOATS, power, whole, power, all_lanes, as_set)

    def power_of_two(self, exponent: Any) -> Any:
        """2^exponent for an integer of at most 0 held as float32; 0 below the range of normal numbers."""
        exponent = self.larger(exponent, ir.Constant(_SINGLE, -127.0))
        biased = self.builder.add(self.builder.fptosi(exponent, _INT), _INT(127))
        return self.builder.bitcast(self.builder.shl(biased, _INT(23)), _SINGLE)

    def to_bfloat(self, low: Any, high: Any) -> Any:
        """Two vectors rounded to the nearest bfloat16 (ties to even), side by side."""
        return self.call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", _BFLOATS, high, low)

    def loop(self, count: Any, initial: list[Any], body: Callable[[Any, list[Any]], list[Any]]) -> list[Any]:
        """Runs body(index, values) for each index below count, at least once; the values it ends with."""
        builder, before = self.builder, self.builder.block
        block, after = builder.append_basic_block("loop"), builder.append_basic_block("loop.end")
        builder.branch(block)
        builder.position_at_end(block)
        index = builder.phi(_WORD)
        index.add_incoming(_WORD(0), before)
        values = [builder.phi(value.type) for value in initial]
        for phi, value in zip(values, initial, strict=True):
            phi.add_incoming(value, before)
        results = body(index, values)
        following = builder.add(index, _WORD(1))
        index.add_incoming(following, block)
        for phi, value in zip(values, results, strict=True):
            phi.add_incoming(value, block)
        builder.cbranch(builder.icmp_signed("<", following, count), block, after)
        builder.position_at_end(after)
        return results


def _emit_weigh(builder: Any, rows: int, arguments: Any) -> None:
    """Takes BLOCK positions into the softmax of each query, and stores what to weigh their values with.

    A weight is 2^(score - exponent), where the exponent is the greatest score so far, rounded up to an integer: so
    rescaling multiplies by a power of two, which is exact.

    Addresses: query, bfloat16 [rows, 2 pairs]; keys, four addresses of LANES positions each, whose pairs of the
    head dimension lie key_step bytes apart; places, int32 [rows], the queries' positions; exponents, float32
    [rows], and totals, float32 [rows, LANES], which are updated; decays, float32 [rows], and weights, bfloat16
    [rows, BLOCK], which are written. Numbers: first, the position that the block begins with; window, positions
    that a query sees; scale, float32, of the scores in base 2.
    """
    emitter = _Emitter(builder)
    query, pairs, keys, key_step, first, places, window, scale, exponents, totals, decays, weights = arguments
    bases = [emitter.load(emitter.at(keys, 8 * part), _WORD, 8) for part in range(_VECTORS)]
    query_step = builder.mul(pairs, _WORD(4))

    def take_pair(index: Any, sums: list[Any]) -> list[Any]:
        offset = builder.mul(index, key_step)
        vectors = [emitter.load(emitter.at(base, offset), _INTS, 4) for base in bases]
        results = []
        for row in range(rows):
            place = builder.add(query, builder.add(builder.mul(query_step, _WORD(row)), builder.shl(index, _WORD(2))))
            pair = emitter.splat(emitter.load(place, _INT, 4))
            results += [emitter.dot(sums[row * _VECTORS + part], pair, vectors[part]) for part in range(_VECTORS)]
        return results

    sums = emitter.loop(pairs, [emitter.constant(0.0)] * (rows * _VECTORS), take_pair)
    lanes = ir.Constant(_INTS, list(range(LANES)))
    first = emitter.splat(builder.trunc(first, _INT))
    positions = [
        builder.add(builder.add(first, lanes), ir.Constant(_INTS, [part * LANES] * LANES)) for part in range(_VECTORS)
    ]
    window, scale = builder.trunc(window, _INT), emitter.splat(scale)
    for row in range(rows):
        place = emitter.load(emitter.at(places, 4 * row), _INT, 4)
        last, before = emitter.splat(place), emitter.splat(builder.sub(place, window))
        scores = []
        for part, position in enumerate(positions):
            seen = builder.and_(builder.icmp_signed("<=", position, last), builder.icmp_signed(">", position, before))
            score = builder.fmul(sums[row * _VECTORS + part], scale)
            scores.append(builder.select(seen, score, emitter.constant(-math.inf)))
        greatest = emitter.larger(emitter.larger(scores[0], scores[1]), emitter.larger(scores[2], scores[3]))
        greatest = emitter.call("llvm.ceil.f32", _SINGLE, emitter.largest(greatest))
        exponent = emitter.load(emitter.at(exponents, 4 * row), _SINGLE, 4)
        raised = emitter.larger(greatest, exponent)
        emitter.store(raised, emitter.at(exponents, 4 * row), 4)
        decay = emitter.power_of_two(builder.fsub(exponent, raised))
        emitter.store(decay, emitter.at(decays, 4 * row), 4)
        raised = emitter.splat(raised)
        powers = [emitter.exp2(builder.fsub(score, raised)) for score in scores]
        total = builder.fmul(emitter.load(emitter.at(totals, 4 * LANES * row), _FLOATS, 4), emitter.splat(decay))
        ones = emitter.splat(_INT(0x3F803F80))  # pairs of 1 in bfloat16
        for half in range(_VECTORS // 2):
            rounded = emitter.to_bfloat(powers[2 * half], powers[2 * half + 1])
            total = emitter.dot(total, rounded, ones)
            emitter.store(rounded, emitter.at(weights, 2 * BLOCK * row + 4 * LANES * half))
        emitter.store(total, emitter.at(totals, 4 * LANES * row), 4)


def _emit_gather(builder: Any, rows: int, arguments: Any, vectors: int) -> None:
    """Multiplies outputs by their decay and adds weighed values, one pair of positions after the other.

    Addresses: out, float32 [rows, vectors * LANES], rows out_step bytes apart, updated; weights, bfloat16 [rows,
    BLOCK]; decays, float32 [rows]; values, four addresses of LANES positions each, whose pairs lie value_step bytes
    apart. Numbers: offset, bytes into a pair of positions; first and count, the pairs of the block, at least one.
    """
    emitter = _Emitter(builder)
    out, out_step, weights, decays, values, value_step, offset, first, count = arguments
    places = [
        emitter.at(builder.add(out, builder.mul(out_step, _WORD(row))), 4 * LANES * part)
        for row in range(rows)
        for part in range(vectors)
    ]
    sums = []
    for row in range(rows):
        decay = emitter.splat(emitter.load(emitter.at(decays, 4 * row), _SINGLE, 4))
        sums += [
            builder.fmul(emitter.load(place, _FLOATS, 4), decay)
            for place in places[row * vectors : (row + 1) * vectors]
        ]

    def take_pair(index: Any, sums: list[Any]) -> list[Any]:
        pair = builder.add(first, index)
        chunk = builder.lshr(pair, _WORD((LANES // 2).bit_length() - 1))
        base = emitter.load(emitter.at(values, builder.shl(chunk, _WORD(3))), _WORD, 8)
        inside = builder.and_(pair, _WORD(LANES // 2 - 1))
        base = builder.add(builder.add(base, builder.mul(inside, value_step)), offset)
        operands = [emitter.load(emitter.at(base, 4 * LANES * part), _INTS, 4) for part in range(vectors)]
        results = []
        for row in range(rows):
            place = emitter.at(builder.add(weights, builder.shl(pair, _WORD(2))), 2 * BLOCK * row)
            weight = emitter.splat(emitter.load(place, _INT, 4))
            results += [emitter.dot(sums[row * vectors + part], weight, operands[part]) for part in range(vectors)]
        return results

    for value, place in zip(emitter.loop(count, sums, take_pair), places, strict=True):
        emitter.store(value, place, 4)


_FUNCTIONS: dict[str, tuple[tuple[Any, ...], Callable[..., None]]] = {
    "weigh": ((*[_WORD] * 7, _SINGLE, *[_WORD] * 4), _emit_weigh),
    "gather": ((_WORD,) * 9, functools.partial(_emit_gather, vectors=2)),
    "gather_wide": ((_WORD,) * 9, functools.partial(_emit_gather, vectors=4)),
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
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_WORD, *kinds]), _symbol(name))
        builder = ir.IRBuilder(function.append_basic_block("entry"))
        otherwise = function.append_basic_block("otherwise")
        choice = builder.switch(function.args[0], otherwise)
        for rows in range(1, MAX_ROWS + 1):
            case = function.append_basic_block(f"rows_{rows}")
            choice.add_case(_WORD(rows), case)
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
        kind = ir.FunctionType(ir.VoidType(), [_WORD, *_FUNCTIONS[name][0]])
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
        emitter = _Emitter(builder)
        x, cos, sin, half, out = args
        low, high = emitter.load(x, _FLOATS, 4), emitter.load(emitter.at(x, half), _FLOATS, 4)
        cos, sin = emitter.load(cos, _FLOATS, 4), emitter.load(sin, _FLOATS, 4)
        turned = emitter.to_bfloat(
            builder.fsub(builder.fmul(low, cos), builder.fmul(high, sin)),
            builder.fadd(builder.fmul(high, cos), builder.fmul(low, sin)),
        )
        turned = builder.bitcast(turned, ir.VectorType(_WORD, 8))
        for place, start in ((out, 0), (emitter.at(out, builder.lshr(half, _WORD(1))), 4)):
            lanes = ir.Constant(ir.VectorType(_INT, 4), list(range(start, start + 4)))
            emitter.store(builder.shuffle_vector(turned, ir.Constant(turned.type, ir.Undefined), lanes), place)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def round_lanes(typingctx, x, scale, out):
    """Writes 2 LANES numbers x / scale + 0 as bfloat16; x and out are addresses, x and scale float32.

    The 0 makes a sum that is -0 the same as one that is 0: which of the two it is may depend on positions whose weight
    is 0.
    """

    def codegen(context, builder, signature, args):
        emitter = _Emitter(builder)
        x, scale, out = args
        scale = emitter.splat(scale)
        parts = [
            builder.fadd(builder.fdiv(emitter.load(emitter.at(x, offset), _FLOATS, 4), scale), emitter.constant(0.0))
            for offset in (0, 4 * LANES)
        ]
        emitter.store(emitter.to_bfloat(*parts), out)
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64), codegen


@intrinsic
def prefetch(typingctx, address, lines):
    """Asks for cache lines from an address on, at least one."""

    def codegen(context, builder, signature, args):
        emitter = _Emitter(builder)
        pointer = ir.IntType(8).as_pointer()
        function = emitter.function("llvm.prefetch.p0", ir.VoidType(), pointer, _INT, _INT, _INT)

        def one(index: Any, values: list[Any]) -> list[Any]:
            place = builder.add(args[0], builder.shl(index, _WORD(6)))
            builder.call(function, [builder.inttoptr(place, pointer), _INT(0), _INT(3), _INT(1)])
            return values

        emitter.loop(args[1], [], one)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen
