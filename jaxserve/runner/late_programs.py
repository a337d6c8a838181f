"""Compiles the missing programs of the closed set while the engine serves.

A process of its own compiles them into the compilation cache, with a low priority: neither the interpreter lock
nor the compiler's threads, which know no priorities, ever hold up a step. From the cache this process loads each as
soon as it is there, which takes some milliseconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterable

from jaxserve.config.settings import EngineConfig
from jaxserve.programs.aot.program_cache import ProgramCache
from jaxserve.programs.compiler import ProgramSet
from jaxserve.programs.step_programs import ProgramKey, Shapes
from jaxserve.runner.late_compiler import CompileTask

_NICE = 10
"""Niceness of the compiling process: a step preempts it at once, and when no core is ever idle it gets a tenth of each.
With the lowest priority, 19, a server that is busy from its first second on would go on padding for half an hour."""

_log = logging.getLogger(__name__)


def most_useful_first(keys: Iterable[ProgramKey]) -> list[ProgramKey]:
    """Orders programs for compilation while larger ones stand in for them.

    The smallest of each kind first, which serves a single request; then always the middle of the longest run of sizes
    that are still missing, which saves most padding for all others.
    """
    sizes: dict[str, list[ProgramKey]] = {}
    for key in sorted(keys):
        sizes.setdefault(key.kind, []).append(key)
    turns = [_halved(of_kind) for of_kind in sizes.values()]
    longest = max((len(turn) for turn in turns), default=0)
    return [turn[place] for place in range(longest) for turn in turns if place < len(turn)]


def _halved(keys: list[ProgramKey]) -> list[ProgramKey]:
    order, runs = keys[:1], [keys[1:]]
    while runs:
        run = runs.pop(0)
        if run:
            middle = len(run) // 2
            order.append(run[middle])
            runs += [run[:middle], run[middle + 1 :]]
    return order


class LatePrograms:
    """Has the missing programs of a set compiled, and adds them to it; ends when the set is no longer used."""

    def __init__(self, config: EngineConfig, shapes: Shapes, programs: ProgramSet, cache: ProgramCache):
        """Starts at once and returns.

        Args:
            config: of the engine.
            shapes: of the programs, with the pool's number of pages.
            programs: the set, some of whose programs are missing.
            cache: where the other process leaves programs for this one.
        """
        self._shapes, self._cache, self._start = shapes, cache, time.perf_counter()
        self._programs = weakref.ref(programs)  # the thread must not keep alive what it works for
        keys = tuple(most_useful_first(programs.missing))
        command = [sys.executable, "-m", "jaxserve.runner.late_compiler"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        os.setpriority(os.PRIO_PROCESS, self._process.pid, _NICE)  # its threads inherit it
        weakref.finalize(programs, self._process.kill)
        task = CompileTask(config, shapes.num_pages, str(cache.directory), keys)
        threading.Thread(target=self._follow, args=(task,), daemon=True).start()

    def _follow(self, task: CompileTask) -> None:
        """Loads each program that the process reports, until it ends."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        process = self._process
        with contextlib.suppress(BrokenPipeError), process:  # of one that has died its exit code tells
            task.write(self._process.stdin)
            for line in self._process.stdout:
                kind, size, *error = line.decode().split(maxsplit=2)
                self._join(ProgramKey(kind, int(size)), "".join(error).strip())
            self._process.stdin.close()
        programs = self._programs()
        if programs is None:
            return  # the rest is no longer needed
        self._cache.prune()
        there, seconds = len(programs.executables), time.perf_counter() - self._start
        if not programs.missing:
            _log.info("all %d programs are there after %.1f s more", there, seconds)
        else:
            _log.error(
                "%d of %d programs are there after %.1f s more; the process that compiled the others ended with exit "
                "code %d. Larger programs stand in for them until the next start",
                there,
                there + len(programs.missing),
                seconds,
                process.returncode,
            )

    def _join(self, key: ProgramKey, error: str) -> None:
        programs = self._programs()
        if programs is None:
            return
        found = None if error else self._cache.load(key, self._shapes)
        if found is None:
            _log.error("%s %d was not compiled: %s", key.kind, key.size, error or "the compilation cache has it not")
        else:
            programs.join(key, *found)
