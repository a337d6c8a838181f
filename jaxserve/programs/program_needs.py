"""Computes the device memory that the closed set of programs needs besides its arguments."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection

from jax.sharding import Mesh

from jaxserve.programs.compiler import ProgramMemory, compile_program, program_memory
from jaxserve.programs.step_programs import ProgramKey, Shapes, program_keys

CODE_BYTES = 4 * 1024 * 1024
"""Allowance for a program's code and command buffer where the compiler reports none, as for GPUs: an 8B model's
programs serialize to at most 2 MB."""

LOADED_TIMES = 22
"""Resident bytes per serialized byte of a program that XLA's CPU backend has loaded: measured 20 to 23, for programs of
0.3 and of 1.2 MB."""


@dataclasses.dataclass(frozen=True)
class ProgramNeeds:
    """Bytes on one device that the closed set of programs needs besides its arguments.

    Attributes:
        temporaries: of the largest program, with results that alias no argument.
        code: of all programs.
        together: the sum of the temporaries of all programs.
    """

    temporaries: int
    code: int
    together: int = 0

    @classmethod
    def of(cls, programs: Collection[ProgramMemory]) -> ProgramNeeds:
        """Computes the needs of programs that were all compiled."""
        return cls(
            temporaries=max((program.extra for program in programs), default=0),
            code=sum(_code(program) for program in programs),
            together=sum(program.extra for program in programs),
        )

    @classmethod
    def from_largest(cls, programs: dict[ProgramKey, ProgramMemory], shapes: Shapes) -> ProgramNeeds:
        """Estimates the needs of the whole set from the largest program of each kind: the others need no more, and
        temporaries in proportion to their sizes.
        """
        counts = Counter(key.kind for key in program_keys(shapes))
        sizes = {kind: sum(key.size for key in program_keys(shapes) if key.kind == kind) for kind in counts}
        return cls(
            temporaries=max(program.extra for program in programs.values()),
            code=sum(_code(program) * counts[key.kind] for key, program in programs.items()),
            together=sum(-(-program.extra * sizes[key.kind] // key.size) for key, program in programs.items()),
        )


def largest_keys(shapes: Shapes) -> list[ProgramKey]:
    """Returns the program of each kind that needs the most memory: its largest bucket."""
    largest: dict[str, ProgramKey] = {}
    for key in program_keys(shapes):
        if key.kind not in largest or key.size > largest[key.kind].size:
            largest[key.kind] = key
    return list(largest.values())


def servable_keys(shapes: Shapes) -> list[ProgramKey]:
    """Returns the programs that can serve every request, if necessary with more padding: the largest of each kind,
    since any smaller step can be padded to it, and all that copy pages or fill penalty rows, which are never replaced
    by a larger one.

    The one that has room for a token of every row is included: padded to the largest, decodes would take so much longer
    that a busy server would be overwhelmed.
    """
    exact = ("swap_in", "swap_out", "penalty_write")
    wanted = [*largest_keys(shapes), ProgramKey("forward", shapes.buckets.decode_tokens[-1])]
    return [key for key in program_keys(shapes) if key in wanted or key.kind in exact]


def loaded(needs: ProgramNeeds, mesh: Mesh) -> ProgramNeeds:
    """Returns `needs`, plus on a CPU the additional memory of loaded programs.

    A loaded program's resident size is many times its code (LOADED_TIMES). The allocator retains freed memory
    (runner/freed_memory.py) and reuses it for requests of any size: in the end each program's temporaries have memory
    of their own.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return needs
    return dataclasses.replace(
        needs, temporaries=max(needs.temporaries, needs.together), code=needs.code * LOADED_TIMES
    )


def compiled_needs(shapes: Shapes, mesh: Mesh) -> ProgramNeeds:
    """Returns the needs of the closed set, from compiling its largest programs over a pool of two pages."""
    probe = dataclasses.replace(shapes, num_pages=2)
    programs = {key: program_memory(compile_program(key, probe, mesh)) for key in largest_keys(shapes)}
    return ProgramNeeds.from_largest(programs, shapes)


def _code(program: ProgramMemory) -> int:
    return program.code if program.code > 0 else CODE_BYTES
