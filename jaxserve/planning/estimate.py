"""Computes an upper bound of a program's temporaries from its trace, where its compiler is not available.

The program's operations are taken in the order in which they were traced, each result in a buffer of its own until its
last use. The compiler fuses operations, so that most of these results never exist, and orders them for memory; it adds
little but workspace of libraries. Only what it is sure to do in place (updates of a donated array) is counted so here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

WORKSPACE_BYTES = 64 * 1024 * 1024
"""Allowance for libraries' workspace; cuBLASLt asks for up to 32 MiB a product on devices of compute capability 9."""

_UPDATES = frozenset({"scatter", "dynamic_update_slice"})
_BARE = frozenset({"pallas_call"})  # its inner program runs in registers and shared memory


@dataclasses.dataclass
class _Operation:
    """Represents one operation. Values are numbered; `sizes` are the bytes of the results.

    in_place: pairs of an operand and a result that takes over its buffer. extra: bytes needed only while it runs.
    """

    operands: list[int]
    results: list[int]
    sizes: list[int]
    in_place: list[tuple[int, int]]
    extra: int = 0


def temporary_bytes(traced: jax.stages.Traced) -> int:
    """Returns the maximum bytes a program needs besides its arguments, workspace included, on a mesh of one device."""
    arguments = jax.tree.leaves(traced.args_info)
    donated = {place: 0 for place, argument in enumerate(arguments) if argument.donated}
    return _peak(traced.jaxpr.jaxpr, donated) + WORKSPACE_BYTES


def _peak(jaxpr: core.Jaxpr, owned: dict[int, int]) -> int:
    """Returns the peak of bytes alive at once.

    owned: arguments whose buffers may be updated, with the bytes they count.
    """
    program = _Program()
    numbers = [program.number() for _ in jaxpr.invars]
    results = program.flatten(jaxpr, numbers)
    end = len(program.operations)
    last_use = {value: place for place, operation in enumerate(program.operations) for value in operation.operands}
    last_use |= dict.fromkeys(results, end)
    held = {numbers[place]: size for place, size in owned.items()}  # bytes of the buffers that can be freed or updated
    live = peak = sum(held.values())
    for place, operation in enumerate(program.operations):
        taken = {
            result: held[operand]
            for operand, result in operation.in_place
            if operand in held and last_use[operand] == place
        }
        for result, size in zip(operation.results, operation.sizes, strict=True):
            held[result] = taken.get(result, size)
            live += 0 if result in taken else size
        for operand, result in operation.in_place:
            if result in taken:
                held[operand] = 0
        peak = max(peak, live + operation.extra)
        for value in {*operation.operands, *operation.results}:
            if last_use.get(value, place) <= place:
                live -= held.pop(value, 0)
    return peak


class _Program:
    """Flattens a program into a list of operations, with calls of inner functions replaced by their operations."""

    def __init__(self) -> None:
        self.operations: list[_Operation] = []
        self._count = 0

    def number(self) -> int:
        self._count += 1
        return self._count

    def flatten(self, jaxpr: core.Jaxpr, arguments: Sequence[int]) -> list[int]:
        """Adds the operations of `jaxpr`; returns the numbers of its results."""
        values: dict[Any, int] = dict(zip(jaxpr.invars, arguments, strict=True))
        values |= {constant: self.number() for constant in jaxpr.constvars}

        def read(atom: Any) -> int:
            return self.number() if isinstance(atom, core.Literal) else values[atom]

        for equation in jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            inner = _called(equation)
            if inner is not None:
                results = self.flatten(inner, operands)
            else:
                results = [self.number() for _ in equation.outvars]
                self.operations.append(_operation(equation, operands, results))
            values |= zip(equation.outvars, results, strict=True)
        return [read(atom) for atom in jaxpr.outvars]


def _called(equation: Any) -> core.Jaxpr | None:
    """Returns the function that an equation calls exactly once with its own operands, or None."""
    if equation.primitive.name in _BARE:
        return None
    for name in ("jaxpr", "call_jaxpr"):
        inner = equation.params.get(name)
        if inner is not None:
            inner = _open(inner)
            if len(inner.invars) == len(equation.invars) and len(inner.outvars) == len(equation.outvars):
                return inner if equation.primitive.name != "scan" else None
    return None


def _operation(equation: Any, operands: list[int], results: list[int]) -> _Operation:
    sizes = [_bytes(variable.aval) for variable in equation.outvars]
    operation = _Operation(operands, results, sizes, [])
    name, params = equation.primitive.name, equation.params
    if name in _UPDATES:
        operation.in_place = [(operands[0], results[0])]
    elif name == "pallas_call":
        operation.in_place = [(operands[i], results[o]) for i, o in params["input_output_aliases"]]
    elif name == "while":
        carry = len(results)
        consts = len(operands) - carry
        operation.in_place = list(zip(operands[consts:], results, strict=True))
        body, cond = _open(params["body_jaxpr"]), _open(params["cond_jaxpr"])
        first = params["body_nconsts"]
        inner = _peak(body, {first + place: size for place, size in enumerate(sizes)})
        operation.extra = max(inner - sum(sizes), _peak(cond, {}))
    else:
        operation.extra = max((max(0, _peak(inner, {}) - sum(sizes)) for inner in _branches(equation)), default=0)
    return operation


def _branches(equation: Any) -> Iterator[core.Jaxpr]:
    """Yields the functions that a `cond` chooses from, or the body of a `scan`, whose carry is not counted as in
    place.
    """
    if equation.primitive.name == "cond":
        yield from map(_open, equation.params["branches"])
    elif equation.primitive.name == "scan":
        yield _open(equation.params["jaxpr"])


def _open(jaxpr: Any) -> core.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _bytes(aval: Any) -> int:
    return aval.size * aval.dtype.itemsize if hasattr(aval, "dtype") else 0
