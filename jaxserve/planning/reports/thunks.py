"""Parses XLA's dump of a GPU program's thunk sequence: its launches in order.

Each line is one launch: its number, kind, dependencies in brackets, then the kernel's name, grid, threads of a block
and bytes of dynamic shared memory. What a loop, a conditional or a command buffer (a CUDA graph) holds is indented
below it.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections import Counter

_LINE = re.compile(r"^( *)\d+: (k\w+)\s+\[[^\]]*\]\s*(.*)$")
_LAUNCH = re.compile(
    r"(?P<name>\S+) grid: \[(?P<grid>[^\]]*)\] threads: \[(?P<threads>[^\]]*)\]\s+shared_memory: (?P<shared>\d+) bytes"
)
_COMMAND_BUFFER = "kCommandBuffer"
_CONTAINERS = (_COMMAND_BUFFER, "kSequential", "kWhile", "kConditional")


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel's launch dimensions; shared_memory_bytes: dynamic, of a block."""

    name: str
    grid: tuple[int, ...]
    threads: tuple[int, ...]
    shared_memory_bytes: int


@dataclasses.dataclass(frozen=True)
class Thunks:
    """Lists a program's launches.

    Attributes:
        command_buffers: CUDA graphs.
        outside: launches of any kind (kernels, library calls, copies) that are in none.
        launches: number of places in the program that launch a kernel in this way.
        others: the same for library calls and copies, by XLA's name for the kind.
    """

    command_buffers: int
    outside: int
    launches: Counter[Launch]
    others: Counter[str]


def parse(text: str) -> Thunks:
    """Parses a thunk sequence.

    Raises ValueError for a text without any of its lines, or a kernel without dimensions.
    """
    buffers = outside = 0
    launches: Counter[Launch] = Counter()
    others: Counter[str] = Counter()
    within: list[tuple[int, str]] = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        indent, kind, rest = len(match[1]), match[2], match[3]
        while within and within[-1][0] >= indent:
            within.pop()
        in_buffer = any(container == _COMMAND_BUFFER for _, container in within)
        within.append((indent, kind))
        if kind == _COMMAND_BUFFER:
            buffers += 1
        if kind in _CONTAINERS:
            continue
        outside += not in_buffer
        launch = _LAUNCH.match(rest)
        if launch is not None:
            launches[_launch(launch)] += 1
        elif kind in ("kCustomKernel", "kKernel"):
            raise ValueError(f"thunk sequence has a kernel without launch dimensions: {line.strip()}")
        else:
            others[kind] += 1
    if not within:
        raise ValueError("thunk sequence is empty or in a format that is not known")
    return Thunks(buffers, outside, launches, others)


def read(directory: pathlib.Path) -> Thunks:
    """Reads the thunks of the single program that was dumped to `directory`, after all passes."""
    for suffix in ("thunk_sequence_after_thunk_passes.txt", "thunk_sequence.txt"):
        found = sorted(directory.glob(f"*.{suffix}"))
        if len(found) == 1:
            return parse(found[0].read_text())
        if found:
            raise ValueError(f"dump {directory} holds {len(found)} programs; one was expected")
    raise ValueError(f"dump {directory} holds no thunk sequence: the compiler wrote none")


def _launch(match: re.Match[str]) -> Launch:
    return Launch(
        name=match["name"],
        grid=tuple(int(one) for one in match["grid"].split(",")),
        threads=tuple(int(one) for one in match["threads"].split(",")),
        shared_memory_bytes=int(match["shared"]),
    )
