"""Making the closed set of programs at start: each from the compilation cache, or compiled where that has it not."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import heapq
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

import jax
from jax.sharding import Mesh
from tqdm import tqdm

from jaxserve.programs.aot.program_cache import ProgramCache
from jaxserve.programs.compiler import ProgramMemory, ProgramSet, compile_program, fresh_compilations, program_memory
from jaxserve.programs.program_needs import ProgramNeeds, largest_keys, loaded, servable_keys
from jaxserve.programs.step_programs import ProgramKey, Shapes, program_keys, program_shapes

PROGRESS_SECONDS = 5.0
"""How often the log tells how far compiling is, where standard error is no terminal."""

_KINDS = ("forward", "decode", "sample", "swap_in", "swap_out", "table_write", "mask_write")
"""Kinds of programs, from those that take longest to compile to those that take least."""

_AT_ONCE = (-1, 0)
"""Rank of a look into the cache, which takes milliseconds."""

_log = logging.getLogger(__name__)


def longest_first(keys: Iterable[ProgramKey]) -> list[ProgramKey]:
    """Programs in the order in which to compile them, so that no long one is left when the other cores are done."""
    return sorted(keys, key=_rank)


def _rank(key: ProgramKey) -> tuple[int, int]:
    return _KINDS.index(key.kind), -key.size


class _Workers:
    """Threads, one a core, that take the most urgent task first; a task that was added later may come before others."""

    def __init__(self) -> None:
        self._tasks: list[tuple[tuple[int, int], int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(os.cpu_count() or 1)]
        for thread in self._threads:
            thread.start()

    def add(self, rank: tuple[int, int], call: Callable[[], Any]) -> concurrent.futures.Future:
        """The future result of `call`; a lower rank is more urgent."""
        future: concurrent.futures.Future = concurrent.futures.Future()

        def run() -> None:
            try:
                future.set_result(call())
            except BaseException as error:
                future.set_exception(error)

        with self._changed:
            heapq.heappush(self._tasks, (rank, next(self._numbers), run))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Drops what nobody has begun and waits for the rest."""
        with self._changed:
            self._closed = True
            self._tasks.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._tasks and not self._closed:
                    self._changed.wait()
                if not self._tasks:
                    return
                _, _, task = heapq.heappop(self._tasks)
            task()


class SetBuilder:
    """Makes programs on every core, those that take longest first; use it in a `with`.

    Programs may be asked for more than once and are made once. Within the `with`, jax's own cache is out of use.
    """

    def __init__(self, mesh: Mesh, cache: ProgramCache | None, *, progress: bool):
        """progress: shows a bar on standard error, or, where that is no terminal, logs a line now and then."""
        self.mesh = mesh
        self._cache = cache
        self._progress = progress
        self._start = time.perf_counter()
        self._made: dict[tuple[ProgramKey, Shapes], concurrent.futures.Future] = {}
        self._fresh = fresh_compilations()
        self._compiled = 0
        self._lock = threading.Lock()

    def __enter__(self) -> SetBuilder:
        self._fresh.__enter__()
        self._workers = _Workers()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._workers.close()
        self._fresh.__exit__(kind, error, traceback)
        if self._cache is not None and self._compiled:
            self._cache.prune()

    def ask(self, key: ProgramKey, shapes: Shapes, rank: tuple[int, int] | None = None) -> concurrent.futures.Future:
        """The program, its memory and whether it is from the cache, in the future.

        rank: programs of a lower one are made before it; None has those come first that take longest.
        """
        shapes = program_shapes(key, shapes)
        rank = _rank(key) if rank is None else rank
        with self._lock:
            if (key, shapes) not in self._made:
                self._made[key, shapes] = self._workers.add(rank, lambda: self._make(key, shapes))
            return self._made[key, shapes]

    def needs(self, shapes: Shapes) -> ProgramNeeds:
        """What the closed set needs, from its largest programs over a pool of two pages: all that is made twice.

        Cores that have none of these make programs that do not depend on the size of the pool meanwhile.
        """
        probe = dataclasses.replace(shapes, num_pages=2)
        largest = {key: self.ask(key, probe) for key in longest_first(largest_keys(shapes))}
        for key in longest_first(program_keys(shapes)):
            if not key.uses_pools:
                self.ask(key, shapes)
        needs = ProgramNeeds.from_largest({key: future.result()[1] for key, future in largest.items()}, shapes)
        return loaded(needs, self.mesh)

    def build(self, shapes: Shapes, *, servable: bool = False) -> ProgramSet:
        """The closed set of `shapes`. The first program that cannot be compiled ends it with its error.

        servable: compiles those programs alone that can serve every request; of the others only those are there that
            the cache has, and the rest is missing in the set.
        """
        keys = longest_first(program_keys(shapes))
        now = servable_keys(shapes) if servable else keys
        kept = {
            key: self._workers.add(_AT_ONCE, functools.partial(self._cached, key, shapes))
            for key in keys
            if key not in now
        }
        futures = {self.ask(key, shapes): key for key in now}
        made: dict[ProgramKey, tuple[Any, ProgramMemory, bool]] = {}
        for future in self._shown(futures):
            made[futures[future]] = future.result()
        made |= {key: found for key, future in kept.items() if (found := future.result()) is not None}
        there = [key for key in keys if key in made]
        return ProgramSet(
            executables={key: made[key][0] for key in there},
            memory={key: made[key][1] for key in there},
            seconds=time.perf_counter() - self._start,
            num_cached=sum(cached for _, _, cached in made.values()),
            missing=set(keys) - set(made),
        )

    def _cached(self, key: ProgramKey, shapes: Shapes) -> tuple[Any, ProgramMemory, bool] | None:
        """The program from the cache; None where that has it not."""
        found = None if self._cache is None else self._cache.load(key, shapes)
        return None if found is None else (*found, True)

    def _make(self, key: ProgramKey, shapes: Shapes) -> tuple[Any, ProgramMemory, bool]:
        if (found := self._cached(key, shapes)) is not None:
            return found
        compiled: jax.stages.Compiled = compile_program(key, shapes, self.mesh)
        if self._cache is not None:
            self._cache.keep(key, shapes, compiled)
        with self._lock:
            self._compiled += 1
        return compiled, program_memory(compiled), False

    def _shown(self, futures: Iterable[concurrent.futures.Future]) -> Iterator[concurrent.futures.Future]:
        """The futures as they are done, with progress."""
        pending = set(futures)
        total = len(pending)
        shown = time.perf_counter()
        with tqdm(total=total, desc="programs", unit="program", disable=None if self._progress else True) as bar:
            while pending:
                done, pending = concurrent.futures.wait(
                    pending, PROGRESS_SECONDS, return_when=concurrent.futures.FIRST_COMPLETED
                )
                bar.update(len(done))
                yield from done
                now = time.perf_counter()
                if self._progress and bar.disable and pending and now - shown >= PROGRESS_SECONDS:
                    shown = now
                    _log.info("%d of %d programs are ready, %.0f s", total - len(pending), total, now - self._start)
