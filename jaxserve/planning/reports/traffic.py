"""Counts the bytes and operations of an optimized program, assuming no cache.

Each instruction reads its operands and writes its result. Less is counted where it touches less: a gather or slice
reads what it returns, an update in place writes what it is given. A fusion is one pass: what its computation does to
each of its parameters counts, not what lies between. A loop counts as often as the compiler says that it runs, a
conditional as its cheapest branch (the sampler's branches compute what a request asked for, and greedy requests ask for
nothing). Attention reads the pages of its rows, whose contexts are in no program: the caller states them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable

from jaxserve.programs.aot.hlo import CUBLAS, CUBLASLT, FREE, ArrayShape, Computation, Instruction, Module

SLICING = ("gather", "dynamic-slice", "slice")
# Within a fusion these are computed element by element, where an element is wanted.
ELEMENTWISE = ("bitcast", "bitcast-convert", "convert", "copy", "reshape", "transpose")

_DIMENSIONS = re.compile(r'"?lhs_contracting_dim(?:ension)?s"?[=:][\[{]([^\]}]*)[\]}]')


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Counts memory traffic and operations.

    Attributes:
        read: bytes.
        written: bytes.
        flops: operations of matmuls by dtype, a multiply-add as two.
    """

    read: int = 0
    written: int = 0
    flops: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def bytes(self) -> int:
        return self.read + self.written

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.read + other.read, self.written + other.written, self.flops + other.flops)

    def __mul__(self, times: int) -> Traffic:
        return Traffic(self.read * times, self.written * times, Counter({k: v * times for k, v in self.flops.items()}))


KernelTraffic = Callable[[Instruction, list[ArrayShape]], Traffic | None]
"""Returns a Pallas kernel's traffic from its custom call and the shapes of its operands; None where it is not known."""


def program_traffic(module: Module, kernel_traffic: KernelTraffic) -> Traffic:
    """Counts the traffic and operations of one run of a program."""
    return _Counting(module, kernel_traffic).of(module.entry)


class _Counting:
    def __init__(self, module: Module, kernel_traffic: KernelTraffic):
        self._module = module
        self._kernel_traffic = kernel_traffic

    def of(self, computation: Computation) -> Traffic:
        total = Traffic()
        for one in computation.instructions.values():
            total += self._instruction(computation, one)
        return total

    def _instruction(self, computation: Computation, one: Instruction) -> Traffic:
        if one.opcode in FREE:
            return Traffic()
        called = [self._module.computations[name] for name in one.called]
        operands = [computation.instructions[name] for name in one.operands]
        match one.opcode:
            case "while":
                return sum((self.of(each) for each in called), Traffic()) * one.trip_count
            case "conditional":
                return min((self.of(each) for each in called), key=lambda traffic: traffic.bytes)
            case "call":
                return self.of(called[0])
            case "fusion":
                return self._fusion(one, called[0])
            case "custom-call":
                return self._custom_call(one, operands)
            case "dot":
                return Traffic(sum(each.bytes for each in operands), one.bytes, _dot_flops(one, operands[0]))
        read = sum(_read_by(one, place, operand) for place, operand in enumerate(operands))
        return Traffic(read, _written_by(computation, one))

    def _fusion(self, one: Instruction, body: Computation) -> Traffic:
        read = sum(parameter_read(body, parameter) for parameter in body.parameters())
        flops: Counter[str] = Counter()
        for inner in body.instructions.values():
            if inner.opcode == "dot":
                flops += _dot_flops(inner, body.instructions[inner.operands[0]])
        return Traffic(read, _written_by(body, body.root), flops)

    def _custom_call(self, one: Instruction, operands: list[Instruction]) -> Traffic:
        target = one.custom_call_target
        if target.startswith((CUBLASLT, CUBLAS)):
            # The results after the first are the library's workspace.
            return Traffic(sum(each.bytes for each in operands), one.shapes[0].bytes, _dot_flops(one, operands[0]))
        known = self._kernel_traffic(one, [each.shapes[0] for each in operands]) if one.kernel else None
        if known is not None:
            return known
        aliases = one.aliases
        brought = sum(each.bytes for place, each in enumerate(operands) if place not in aliases.values())
        written = sum(shape.bytes for place, shape in enumerate(one.shapes) if place not in aliases)
        # A result that is written to an operand is an update in place, by no more than what is left to write.
        updated = sum(shape.bytes for place, shape in enumerate(one.shapes) if place in aliases)
        written += min(updated, max(0, brought - written))
        return Traffic(brought, written)


def parameter_read(body: Computation, parameter: Instruction) -> int:
    """Returns the bytes of a fusion's parameter that its computation reads; at most all of it."""
    read = 0
    pending = [parameter]
    while pending:
        value = pending.pop()
        for user in body.users(value.name):
            if user.opcode in ELEMENTWISE and user is not body.root:
                pending.append(user)
                continue
            for place, operand in enumerate(user.operands):
                if operand == value.name:
                    read += _read_by(user, place, parameter)
    return min(read, parameter.bytes)


def _read_by(user: Instruction, place: int, operand: Instruction) -> int:
    """Returns the bytes that an instruction reads of its operand number `place`."""
    if place == 0 and user.opcode in SLICING:
        return min(operand.bytes, _items(user) * operand.bytes // max(1, _items(operand)))
    if place == 0 and user.opcode in ("dynamic-update-slice", "scatter"):
        return 0
    return operand.bytes


def _items(one: Instruction) -> int:
    return sum(shape.size for shape in one.shapes)


def _written_by(computation: Computation, one: Instruction) -> int:
    """Returns the bytes that an instruction, or the root of a fusion, writes."""
    if one.opcode == "tuple":
        return sum(_written_by(computation, computation.instructions[name]) for name in one.operands)
    source = computation.origin(one.name)
    if source.opcode == "dynamic-update-slice":
        return computation.instructions[source.operands[1]].bytes
    if source.opcode == "scatter":
        updates = source.operands[(len(source.operands) + 1) // 2 :]
        return sum(computation.instructions[name].bytes for name in updates)
    return one.bytes


def _dot_flops(one: Instruction, lhs: Instruction) -> Counter[str]:
    match = _DIMENSIONS.search(one.text)
    if match is None:
        return Counter()
    shape = lhs.shapes[0]
    contracted = math.prod(shape.dims[int(number)] for number in re.findall(r"\d+", match[1]))
    return Counter({shape.dtype: 2 * contracted * one.shapes[0].size})


def pool_copies(module: Module, pool: ArrayShape) -> list[str]:
    """Returns the names of instructions that create an array of a layer's pool's size other than by an in-place update.

    pool: one layer's pool. Arrays of as many elements or as many bytes count, whatever their dtype and dims: converted,
    transposed, reshaped. A program should have none.
    """

    def of_its_size(shape: ArrayShape) -> bool:
        return shape.size == pool.size or shape.bytes == pool.bytes

    def pool_shaped(one: Instruction) -> bool:
        return any(of_its_size(shape) for shape in one.shapes)

    found = []
    for computation, one in module.executed():
        if one.opcode in FREE or one.opcode in ("while", "conditional", "call") or not pool_shaped(one):
            continue
        if one.opcode == "fusion":
            body = module.computations[one.called[0]]
            roots = (
                [body.instructions[name] for name in body.root.operands] if body.root.opcode == "tuple" else [body.root]
            )
            in_place = all(_in_place(body, root) for root in roots if pool_shaped(root))
        elif one.opcode == "custom-call":
            places = [place for place, shape in enumerate(one.shapes) if of_its_size(shape)]
            in_place = all(place in one.aliases for place in places)
        else:
            in_place = _in_place(computation, one)
        if not in_place:
            found.append(one.name)
    return found


def _in_place(computation: Computation, one: Instruction) -> bool:
    """Returns whether a value is an in-place update: of a parameter, or of another such update."""
    source = computation.origin(one.name)
    while source.opcode in ("dynamic-update-slice", "scatter"):
        source = computation.origin(source.operands[0])
        if source.opcode in FREE:
            return True
    return source.opcode == "parameter"
