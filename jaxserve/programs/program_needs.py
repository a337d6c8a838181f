"""What the closed set of programs needs of a device's memory beside its arguments."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection

from jax.sharding import Mesh

from jaxserve.programs.compiler import ProgramMemory, compile_program, program_memory
from jaxserve.programs.step_programs import ProgramKey, Shapes, program_keys

CODE_BYTES = 4 * 1024 * 1024
"""Allowance for a program's code and command buffer where the compiler states none, as those for GPUs do: an 8B model's
programs serialize to at most 2 MB."""

LOADED_TIMES = 22
"""Resident bytes of a program that XLA's CPU backend has loaded, for each byte that it serializes to: measured 20 to
23, for programs of 0.3 and of 1.2 MB."""


@dataclasses.dataclass(frozen=True)
class ProgramNeeds:
    """Bytes on one device that the closed set of programs needs beside its arguments.

    temporaries: of the largest program, with results that alias no argument. code: of all programs. together: the
    temporaries of all programs, one beside the other.
    """

    temporaries: int
    code: int
    together: int = 0

    @classmethod
    def of(cls, programs: Collection[ProgramMemory]) -> ProgramNeeds:
        """Of programs that were all compiled."""
        return cls(
            temporaries=max((program.extra for program in programs), default=0),
            code=sum(_code(program) for program in programs),
            together=sum(program.extra for program in programs),
        )

    @classmethod
    def from_largest(cls, programs: dict[ProgramKey, ProgramMemory], shapes: Shapes) -> ProgramNeeds:
        """Of the whole set, when only the largest program of each kind was compiled: the others need no more, and
        temporaries in proportion to their sizes."""
        counts = Counter(key.kind for key in program_keys(shapes))
        sizes = {kind: sum(key.size for key in program_keys(shapes) if key.kind == kind) for kind in counts}
        return cls(
            temporaries=max(program.extra for program in programs.values()),
            code=sum(_code(program) * counts[key.kind] for key, program in programs.items()),
            together=sum(-(-program.extra * sizes[key.kind] // key.size) for key, program in programs.items()),
        )


def largest_keys(shapes: Shapes) -> list[ProgramKey]:
    """The program of each kind that needs the most memory: its largest bucket."""
    largest: dict[str, ProgramKey] = {}
    for key in program_keys(shapes):
        if key.kind not in largest or key.size > largest[key.kind].size:
            largest[key.kind] = key
    return list(largest.values())


def servable_keys(shapes: Shapes) -> list[ProgramKey]:
    """Programs that can serve every request, if need be with more padding: the largest of each kind, since any smaller
    step can be padded to it, and all that copy pages, which pad nothing.

    With them the one that has room for a token of every row: padded to the largest, decodes would take so many times
    longer that a server with much to do would be overwhelmed.
    """
    wanted = [*largest_keys(shapes), ProgramKey("forward", shapes.buckets.decode_tokens[-1])]
    return [key for key in program_keys(shapes) if key in wanted or key.kind in ("swap_in", "swap_out")]


def loaded(needs: ProgramNeeds, mesh: Mesh) -> ProgramNeeds:
    """`needs`, and on a CPU what programs take there beyond it.

    What is resident of a loaded program is many times its code (LOADED_TIMES). The allocator keeps what is freed
    (runner/freed_memory.py) and gives it to the next that asks, of any size: in the end each program's temporaries have
    a place of their own.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return needs
    return dataclasses.replace(
        needs, temporaries=max(needs.temporaries, needs.together), code=needs.code * LOADED_TIMES
    )


def compiled_needs(shapes: Shapes, mesh: Mesh) -> ProgramNeeds:
    """What the closed set needs, from compiling its largest programs over a pool of two pages."""
    probe = dataclasses.replace(shapes, num_pages=2)
    programs = {key: program_memory(compile_program(key, probe, mesh)) for key in largest_keys(shapes)}
    return ProgramNeeds.from_largest(programs, shapes)


def _code(program: ProgramMemory) -> int:
    return program.code if program.code > 0 else CODE_BYTES
