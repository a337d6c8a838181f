"""Parses the text of an optimized XLA program, as printed by `Compiled.as_text()`."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

_ITEM_BITS = {
    "pred": 8,
    "token": 0,
    "opaque": 0,
    "bf16": 16,
    "tf32": 32,
}
_ARRAY = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\]")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')
_ALIAS = re.compile(r"\{([0-9,]*)\}: \((\d+), \{\}\)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_KERNEL = re.compile(r'\bname = "([^"]*)"')

FREE = frozenset(
    "parameter constant get-tuple-element tuple bitcast optimization-barrier after-all copy-done partition-id".split()
)
"""Opcodes that move nothing: aliases of existing values."""


@dataclasses.dataclass(frozen=True)
class ArrayShape:
    """Shape of an array: dtype as XLA names it ("bf16", "s32"), dims in order."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return -(-self.size * item_bits(self.dtype) // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Represents one line. shapes: of its result, the leaves of a tuple in order; text: what follows the operands."""

    name: str
    opcode: str
    shapes: tuple[ArrayShape, ...]
    operands: tuple[str, ...]
    text: str

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @property
    def called(self) -> list[str]:
        """Returns the computations it calls: the body and condition of a loop, the branches of a conditional."""
        found = _CALLED.findall(self.text)
        for branches in _BRANCHES.findall(self.text):
            found += _NAME.findall(branches) or [name.strip() for name in branches.split(",")]
        return found

    @property
    def custom_call_target(self) -> str:
        match = _TARGET.search(self.text)
        return match[1] if match else ""

    @property
    def kernel(self) -> str:
        """Name of the Pallas kernel that a custom call runs; "" for other instructions."""
        if self.custom_call_target != TRITON_KERNEL:
            return ""
        match = _KERNEL.search(self.text.partition("backend_config=")[2])
        return match[1] if match else ""

    @property
    def aliases(self) -> dict[int, int]:
        """Returns the operand that each result of a custom call (by index; 0 for a single one) is written to."""
        text = self.text.partition("output_to_operand_aliasing=")[2].partition("}}")[0] + "}"
        return {int(result or 0): int(operand) for result, operand in _ALIAS.findall(text)}

    @property
    def trip_count(self) -> int:
        """Trip count of a loop, 1 where the compiler does not know it."""
        match = _TRIPS.search(self.text)
        return int(match[1]) if match else 1


TRITON_KERNEL = "__gpu$xla.gpu.triton"
"""Custom call target of a Pallas kernel on the Triton backend."""

CUBLASLT = "__cublas$lt$matmul"
"""Prefix of the custom call targets of cuBLASLt."""

CUBLAS = "__cublas$gemm"


@dataclasses.dataclass(frozen=True)
class Computation:
    """Represents a function: its instructions by name, in order; the last one printed as ROOT."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    def parameters(self) -> list[Instruction]:
        """Returns the parameters in order of their numbers."""
        found = [one for one in self.instructions.values() if one.opcode == "parameter"]
        return sorted(found, key=lambda one: int(one.text.split(")")[0]))

    def users(self, name: str) -> list[Instruction]:
        return [one for one in self.instructions.values() if name in one.operands]

    def origin(self, name: str) -> Instruction:
        """Returns the instruction that a value is an alias of: follows bitcasts."""
        one = self.instructions[name]
        while one.opcode == "bitcast":
            one = self.instructions[one.operands[0]]
        return one


@dataclasses.dataclass(frozen=True)
class Module:
    """Holds the computations by name; execution starts at entry."""

    computations: dict[str, Computation]
    entry: Computation

    def executed(self) -> Iterator[tuple[Computation, Instruction]]:
        """Yields every instruction of the entry and of the bodies and branches that it calls, not those within
        fusions.
        """
        pending = [self.entry]
        while pending:
            computation = pending.pop()
            for one in computation.instructions.values():
                yield computation, one
                if one.opcode in ("while", "conditional", "call"):
                    pending += [self.computations[name] for name in one.called]


def item_bits(dtype: str) -> int:
    """Returns the bits of one element: "bf16" has 16, "f8e4m3fn" 8, "s4" 4."""
    if dtype in _ITEM_BITS:
        return _ITEM_BITS[dtype]
    match = re.match(r"[a-z]+(\d+)", dtype)
    if match is None:
        raise ValueError(f"optimized program has an array of unknown dtype {dtype!r}")
    return int(match[1])


def parse(text: str) -> Module:
    """Parses the module that `text` prints. Raises ValueError where it has no entry computation."""
    computations: dict[str, Computation] = {}
    entry: Computation | None = None
    name = ""
    is_entry = False
    instructions: dict[str, Instruction] = {}
    root: Instruction | None = None
    for line in text.splitlines():
        if not name:
            header = None if line.startswith((" ", "HloModule")) else _HEADER.match(line)
            if header:
                name, is_entry, instructions, root = header[2], bool(header[1]), {}, None
            continue
        if line.startswith("}"):
            assert root is not None, name
            computations[name] = Computation(name, instructions, root)
            if is_entry:
                entry = computations[name]
            name = ""
            continue
        match = _INSTRUCTION.match(line)
        if match is None:
            continue  # the continuation of a long constant
        one = _instruction(match[2], line[match.end() :])
        instructions[one.name] = one
        if match[1]:
            root = one
    if entry is None:
        raise ValueError("optimized program has no ENTRY computation")
    return Module(computations, entry)


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shapes = tuple(
        ArrayShape(dtype, tuple(int(one) for one in dims.split(",") if one))
        for dtype, dims in _ARRAY.findall(rest[:end])
    )
    opening = rest.index("(", end)
    opcode = rest[end:opening].strip()
    if opcode in ("constant", "parameter"):
        return Instruction(name, opcode, shapes, (), rest[opening + 1 :])
    closing = _closing(rest, opening)
    return Instruction(name, opcode, shapes, tuple(_NAME.findall(rest[opening:closing])), rest[closing + 1 :])


def _closing(text: str, opening: int) -> int:
    """Returns the index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"optimized program has a line that cannot be read: {text[:80]!r}")
