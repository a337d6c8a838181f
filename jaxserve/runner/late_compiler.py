"""Compiles programs into the compilation cache for an engine that serves meanwhile: `python -m
jaxserve.runner.late_compiler`, started by `LatePrograms`.

The task comes on standard input, as msgpack. For each program a line `KIND SIZE` goes to standard output as soon as the
cache has it, or `KIND SIZE ERROR` where it cannot be compiled. When standard input ends, the engine has ended, and so
does this process.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import sys
import threading
from typing import IO, NoReturn

import msgpack

from jaxserve.config.settings import EngineConfig
from jaxserve.config.wire_config import config_from_bytes, config_to_bytes
from jaxserve.models.params import make_mesh
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.programs.aot.program_cache import ProgramCache
from jaxserve.programs.build_set import SetBuilder
from jaxserve.programs.step_programs import ProgramKey, products_of

_LENGTH_BYTES = 8


@dataclasses.dataclass(frozen=True)
class CompileTask:
    """Describes programs to compile.

    keys: the programs, in this order. config, num_pages: the engine and its pool's number of pages. directory: the
    cache to fill, which is not pruned.
    """

    config: EngineConfig
    num_pages: int
    directory: str
    keys: tuple[ProgramKey, ...]

    def write(self, file: IO[bytes]) -> None:
        """Writes the task, its length before it."""
        keys = [(key.kind, key.size) for key in self.keys]
        fields = [config_to_bytes(self.config), self.num_pages, self.directory, keys]
        data: bytes = msgpack.packb(fields)  # pyright: ignore[reportAssignmentType]  the stubs allow None
        file.write(len(data).to_bytes(_LENGTH_BYTES, "big") + data)
        file.flush()

    @classmethod
    def read(cls, file: IO[bytes]) -> CompileTask | None:
        """Reads the task that `write` wrote; returns None if the other end closes before it is complete."""
        length = int.from_bytes(file.read(_LENGTH_BYTES), "big")
        data = file.read(length)
        if not length or len(data) < length:
            return None
        config, num_pages, directory, keys = msgpack.unpackb(data, use_list=False)
        return cls(config_from_bytes(config), num_pages, directory, tuple(ProgramKey(*key) for key in keys))


def run(task: CompileTask) -> None:
    """Compiles the programs and reports each as soon as it is available."""
    mesh = make_mesh()
    shapes = dataclasses.replace(resolve_shapes(task.config, mesh.devices.flat[0].platform), num_pages=task.num_pages)
    products_of(shapes, mesh).prepare()
    with SetBuilder(mesh, ProgramCache.open(task.directory, sys.maxsize, mesh), progress=False) as builder:
        futures = {builder.ask(key, shapes, (0, place)): key for place, key in enumerate(task.keys)}
        for future in concurrent.futures.as_completed(futures):
            key, error = futures[future], future.exception()
            text = "" if error is None else f" {type(error).__name__}: {' '.join(str(error).split())}"
            print(f"{key.kind} {key.size}{text}", flush=True)


def _end_with(file: IO[bytes]) -> None:
    """Ends this process when the other end of the file is closed."""
    file.read()
    os._exit(0)


def main() -> NoReturn:
    """Performs the task on standard input and ends the process."""
    task = CompileTask.read(sys.stdin.buffer)
    if task is not None:
        threading.Thread(target=_end_with, args=(sys.stdin.buffer,), daemon=True).start()
        run(task)
    sys.stdout.flush()
    os._exit(0)  # the thread that waits for the engine's end holds standard input, and would keep the interpreter


if __name__ == "__main__":
    main()
