"""Inner loops of attention and of the KV write on CPUs, as LLVM's vector instructions.

They take addresses and numbers as int64. Nothing is reassociated or contracted, so the order of every sum is the one
written here. Vectors have 16 numbers; on a CPU with shorter ones, LLVM uses several.
"""

# The builder is llvmlite's, which has no types.
# pyright: basic, reportAttributeAccessIssue=false

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir

from jaxserve.pallas_kernels.cpu.emitter import FLOATS, INT, INTS, LANES, SINGLE, WORD
from jaxserve.pallas_kernels.cpu.native_calls import FLOATING
from jaxserve.pallas_kernels.cpu.native_functions import Emit, Inline, Routine
from jaxserve.pallas_kernels.paged_attention.cpu import vector_math
from jaxserve.pallas_kernels.paged_attention.cpu.elements import Element

BLOCK = 64
"""Positions that the online softmax takes at once, counted from position 0."""

_VECTORS = BLOCK // LANES
_LOG2_E = math.log2(math.e)


def _for_each_count(body: Callable[..., None]) -> Callable[..., None]:
    """The body of a routine whose first argument is a number of rows: one for each number there can be."""

    def emit_all(emit: Emit, rows: Any, *arguments: Any) -> None:
        builder, function = emit.builder, emit.builder.function
        otherwise = function.append_basic_block("otherwise")
        choice = builder.switch(rows, otherwise)
        for count in range(1, emit.parameters.max_rows + 1):
            case = function.append_basic_block(f"rows_{count}")
            choice.add_case(WORD(count), case)
            builder.position_at_end(case)
            body(emit, count, *arguments)
            builder.ret_void()
        builder.position_at_end(otherwise)
        builder.unreachable()

    return emit_all


def _add_unit(emit: Emit, total: Any, one: Any, units: Any) -> Any:
    """Adds to each lane the product of `one` unit, of 4 bytes, and the lane's, as `read_units` gives them."""
    element: Element = emit.parameters
    if element.together == 2:
        return emit.dot(total, emit.splat(emit.load(one, INT, 4)), units)
    return vector_math.add_product(emit, total, emit.splat(emit.load(one, SINGLE, 4)), units)


def _emit_score(emit: Emit, rows: int, query: Any, units: Any, keys: Any, key_step: Any, scores: Any) -> None:
    """Multiplies queries by BLOCK keys.

    Addresses: query, units of 4 bytes [rows, units]; keys, four addresses of LANES positions each, whose units of the
    head dimension lie key_step bytes apart, then four of the block that is read next, which is asked for; scores,
    float32 [rows, BLOCK], which are written.
    """
    builder, element = emit.builder, emit.parameters
    bases, ahead = (
        [emit.load(emit.at(keys, 8 * (start + part)), WORD, 8) for part in range(_VECTORS)] for start in (0, _VECTORS)
    )
    query_step = builder.mul(units, WORD(4))

    def take_unit(index: Any, sums: list[Any]) -> list[Any]:
        offset = builder.mul(index, key_step)
        for base in ahead:
            emit.prefetch(emit.at(base, offset))
        vectors = [vector_math.read_units(emit, element, emit.at(base, offset)) for base in bases]
        results = []
        for row in range(rows):
            place = builder.add(query, builder.add(builder.mul(query_step, WORD(row)), builder.shl(index, WORD(2))))
            results += [_add_unit(emit, sums[row * _VECTORS + part], place, vectors[part]) for part in range(_VECTORS)]
        return results

    sums = emit.loop(units, [emit.constant(0.0)] * (rows * _VECTORS), take_unit)
    for number, total in enumerate(sums):
        emit.store(total, emit.at(scores, 4 * LANES * number), 4)


def _emit_weigh(emit: Emit, rows: Any, *arguments: Any) -> None:
    """Takes BLOCK scores into the softmax of each query, and stores what to weigh their values with in their place.

    A weight is 2^(score - exponent), where the exponent is the greatest score so far, rounded up to an integer: so
    rescaling multiplies by a power of two, which is exact.

    Numbers: rows; first, the position that the block begins with. Addresses: places, int32 [rows], the queries'
    positions. Numbers: window, positions that a query sees; scale and cap, float32: a score in base 2 is the product
    times scale, or, where cap is not 0, cap times the hyperbolic tangent of that. Addresses: exponents, float32 [rows],
    and totals, float32 [rows, LANES], which are updated; decays, float32 [rows], which are written; weights: scores,
    float32 [rows, BLOCK], and then BLOCK weights in the place of each row.
    """
    first, places, window, scale, cap, exponents, totals, decays, weights = arguments
    builder, element = emit.builder, emit.parameters
    lanes = ir.Constant(INTS, list(range(LANES)))
    first = emit.splat(builder.trunc(first, INT))
    positions = [
        builder.add(builder.add(first, lanes), ir.Constant(INTS, [part * LANES] * LANES)) for part in range(_VECTORS)
    ]
    window, capped = builder.trunc(window, INT), builder.fcmp_ordered(">", cap, SINGLE(0.0))
    scale, cap = emit.splat(scale), emit.splat(cap)

    def take_row(row: Any) -> None:
        offset = builder.shl(row, WORD(2))
        held = emit.at(weights, builder.mul(row, WORD(4 * BLOCK)))
        scores = [
            builder.fmul(emit.load(emit.at(held, 4 * LANES * part), FLOATS, 4), scale) for part in range(_VECTORS)
        ]
        scores = vector_math.capped(emit, scores, cap, capped)
        place = emit.load(emit.at(places, offset), INT, 4)
        last, before = emit.splat(place), emit.splat(builder.sub(place, window))
        for part, position in enumerate(positions):
            seen = builder.and_(builder.icmp_signed("<=", position, last), builder.icmp_signed(">", position, before))
            scores[part] = builder.select(seen, scores[part], emit.constant(-math.inf))
        greatest = emit.larger(emit.larger(scores[0], scores[1]), emit.larger(scores[2], scores[3]))
        greatest = emit.call("llvm.ceil.f32", SINGLE, emit.largest(greatest))
        exponent = emit.load(emit.at(exponents, offset), SINGLE, 4)
        raised = emit.larger(greatest, exponent)
        emit.store(raised, emit.at(exponents, offset), 4)
        decay = emit.power_of_two(builder.fsub(exponent, raised))
        emit.store(decay, emit.at(decays, offset), 4)
        raised = emit.splat(raised)
        powers = [vector_math.exp2(emit, element, builder.fsub(score, raised)) for score in scores]
        sums = emit.at(totals, builder.mul(row, WORD(4 * LANES)))
        total = builder.fmul(emit.load(sums, FLOATS, 4), emit.splat(decay))
        emit.store(_store_weights(emit, powers, held, total), sums, 4)

    emit.times(rows, take_row)


def _store_weights(emit: Emit, powers: list[Any], weights: Any, total: Any) -> Any:
    """Stores weights in units of 4 bytes, and returns the total with them, as they are rounded."""
    if emit.parameters.together == 2:
        ones = emit.splat(INT(0x3F803F80))  # pairs of 1 in bfloat16
        for half in range(_VECTORS // 2):
            rounded = emit.to_bfloat(powers[2 * half], powers[2 * half + 1])
            total = emit.dot(total, rounded, ones)
            emit.store(rounded, emit.at(weights, 4 * LANES * half))
        return total
    for part, power in enumerate(powers):
        emit.store(power, emit.at(weights, 4 * LANES * part), 4)
    add = emit.builder.fadd
    return add(total, add(add(powers[0], powers[1]), add(powers[2], powers[3])))


def _emit_gather(emit: Emit, rows: int, *arguments: Any) -> None:
    """Multiplies outputs by their decay and adds weighed values, one unit of positions after the other.

    Addresses: out, float32 [rows, vectors * LANES], rows out_step bytes apart, updated; weights, units of 4 bytes in
    rows 4 * BLOCK bytes apart; decays, float32 [rows]; values, four addresses of LANES positions each, whose units lie
    value_step bytes apart, then four of the block that is read next, which is asked for. Numbers: offset, bytes into a
    unit of positions; first and count, the units of the block, at least one.
    """
    builder, element = emit.builder, emit.parameters
    vectors = element.vectors
    out, out_step, weights, decays, values, value_step, offset, first, count = arguments
    places = [
        emit.at(builder.add(out, builder.mul(out_step, WORD(row))), 4 * LANES * part)
        for row in range(rows)
        for part in range(vectors)
    ]
    decayed = []
    for row in range(rows):
        decay = emit.splat(emit.load(emit.at(decays, 4 * row), SINGLE, 4))
        decayed += [
            builder.fmul(emit.load(place, FLOATS, 4), decay) for place in places[row * vectors : (row + 1) * vectors]
        ]
    units = LANES // element.together

    def take_unit(index: Any, sums: list[Any]) -> list[Any]:
        unit = builder.add(first, index)
        chunk = builder.lshr(unit, WORD(units.bit_length() - 1))
        place = emit.at(values, builder.shl(chunk, WORD(3)))
        inside = builder.mul(builder.and_(unit, WORD(units - 1)), value_step)
        base, ahead = (
            builder.add(builder.add(emit.load(emit.at(place, start), WORD, 8), inside), offset)
            for start in (0, 8 * _VECTORS)
        )
        step = element.unit * LANES
        for part in range(vectors):
            emit.prefetch(emit.at(ahead, step * part))
        operands = [vector_math.read_units(emit, element, emit.at(base, step * part)) for part in range(vectors)]
        results = []
        for row in range(rows):
            weight = emit.at(builder.add(weights, builder.shl(unit, WORD(2))), 4 * BLOCK * row)
            results += [_add_unit(emit, sums[row * vectors + part], weight, operands[part]) for part in range(vectors)]
        return results

    sums = emit.loop(count, decayed, take_unit)
    for value, place in zip(sums, places, strict=True):
        emit.store(value, place, 4)


def _emit_finish(emit: Emit, out: Any, pairs: Any, totals: Any, exponent: Any, sink: Any, written: Any) -> None:
    """Divides a query's weighed sum by its total, the sink's weight included, and writes it.

    Addresses: out, float32 [2 * LANES * pairs]; totals, float32 [LANES]; exponent, float32; written, in the dtype of
    results. Numbers: pairs, of vectors; sink, float32, -inf for none.
    """
    builder = emit.builder
    total = emit.sum_lanes(emit.load(totals, FLOATS, 4))
    before = builder.block
    joined, after = builder.append_basic_block("sink"), builder.append_basic_block("divide")
    builder.cbranch(builder.fcmp_ordered(">", sink, SINGLE(-math.inf)), joined, after)
    builder.position_at_end(joined)
    # One more score, whose value is 0.
    sink = builder.fmul(sink, SINGLE(_LOG2_E))
    exponent = emit.load(exponent, SINGLE, 4)
    raised = emit.larger(exponent, emit.call("llvm.ceil.f32", SINGLE, sink))
    decay = emit.power_of_two(builder.fsub(exponent, raised))
    weight = builder.extract_element(vector_math.exp2_float32(emit, emit.splat(builder.fsub(sink, raised))), INT(0))
    more = builder.fadd(builder.fmul(total, decay), weight)
    builder.branch(after)
    builder.position_at_end(after)
    total = emit.merged((total, before), (more, joined))
    decay = emit.merged((SINGLE(1.0), before), (decay, joined))
    total, decay = emit.splat(total), emit.splat(decay)
    size = FLOATING[emit.parameters.computed]

    def write_pair(index: Any) -> None:
        parts = []
        for part in range(2):
            place = emit.at(emit.at(out, builder.mul(index, WORD(8 * LANES))), 4 * LANES * part)
            product = builder.fmul(emit.load(place, FLOATS, 4), decay)
            # The 0 makes a sum that is -0 the same as one that is 0: which of the two it is may depend on positions
            # whose weight is 0.
            parts.append(builder.fadd(builder.fdiv(product, total), emit.constant(0.0)))
        vector_math.store(
            emit, emit.parameters.computed, parts, emit.at(written, builder.mul(index, WORD(2 * size * LANES)))
        )

    emit.times(pairs, write_pair)


def _rows_routine(name: str, words: int, body: Callable[..., None]) -> Routine:
    return Routine((WORD,) * (1 + words), _for_each_count(body), name)


score = _rows_routine("score", 5, _emit_score)
weigh = Routine((*[WORD] * 4, SINGLE, SINGLE, *[WORD] * 4), _emit_weigh, "weigh")
gather = _rows_routine("gather", 9, _emit_gather)
finish = Routine((*[WORD] * 4, SINGLE, WORD), _emit_finish, "finish")


def _rotate(dtype: Callable[[Element], str]) -> Inline:
    """Rotates LANES pairs (x[i], x[i + half]) from i = lane on, and rounds them to out[i] and out[i + half].

    Addresses: x, cos and sin, float32; out, of a dtype.
    """

    def emit_rotation(emit: Emit, x: Any, cos: Any, sin: Any, half: Any, lane: Any, out: Any) -> None:
        builder, name = emit.builder, dtype(emit.parameters)
        size = FLOATING[name]
        offset, apart = builder.shl(lane, WORD(2)), builder.shl(half, WORD(2))
        low, high = (emit.load(emit.at(place, offset), FLOATS, 4) for place in (x, emit.at(x, apart)))
        cos, sin = (emit.load(emit.at(place, offset), FLOATS, 4) for place in (cos, sin))
        turned = (
            builder.fsub(builder.fmul(low, cos), builder.fmul(high, sin)),
            builder.fadd(builder.fmul(high, cos), builder.fmul(low, sin)),
        )
        for value, first in zip(turned, (lane, builder.add(lane, half)), strict=True):
            vector_math.store(emit, name, [value], emit.at(out, builder.mul(first, WORD(size))))

    return Inline(emit_rotation)


rotate_query = _rotate(lambda element: element.computed)
rotate_key = _rotate(lambda element: element.stored)


@Inline
def round_value(emit: Emit, x: Any, out: Any) -> None:
    """Writes 2 LANES numbers in the dtype of pages; x and out are addresses, x float32."""
    parts = [emit.load(emit.at(x, 4 * LANES * part), FLOATS, 4) for part in range(2)]
    vector_math.store(emit, emit.parameters.stored, parts, out)
