"""Builds the closed set of programs at start: each from the compilation cache, or compiled on a miss."""

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
"""Interval of log lines on compile progress, where standard error is no terminal."""

_KINDS = (
    "forward",
    "decode",
    "sample",
    "score",
    "swap_in",
    "swap_out",
    "page_copy",
    "penalty_write",
    "table_write",
    "option_write",
    "mask_write",
)
"""Kinds of programs, in descending order of compile time."""

_AT_ONCE = (-1, 0)
"""Rank of a cache lookup, which takes milliseconds."""

_log = logging.getLogger(__name__)


def longest_first(keys: Iterable[ProgramKey]) -> list[ProgramKey]:
    """Orders programs for compilation, so that no long one is left when the other cores are done."""
    return sorted(keys, key=_rank)


def _rank(key: ProgramKey) -> tuple[int, int]:
    return _KINDS.index(key.kind), -key.size


class _Workers:
    """Runs threads, one a core, that take the most urgent task first."""

    def __init__(self) -> None:
        self._tasks: list[tuple[tuple[int, int], int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(os.cpu_count() or 1)]
        for thread in self._threads:
            thread.start()

    def add(self, rank: tuple[int, int], call: Callable[[], Any]) -> concurrent.futures.Future:
        """Queues `call` and returns its future result; a lower rank is more urgent."""
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
        """Drops tasks that have not started and waits for the rest."""
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
    """Builds programs on every core, the slowest to compile first; use it as a context manager.

    Programs may be requested more than once and are built once. Within the context, jax's own cache is disabled.
    """

    def __init__(self, mesh: Mesh, cache: ProgramCache | None, *, progress: bool):
        """Initializes the builder.

        progress: shows a bar on standard error, or, where that is no terminal, logs lines.
        """
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
        """Returns the future program, its memory and whether it is from the cache.

        rank: programs of a lower rank are built first; None orders by compile time, longest first.
        """
        shapes = program_shapes(key, shapes)
        rank = _rank(key) if rank is None else rank
        with self._lock:
            if (key, shapes) not in self._made:
                self._made[key, shapes] = self._workers.add(rank, lambda: self._make(key, shapes))
            return self._made[key, shapes]

    def needs(self, shapes: Shapes) -> ProgramNeeds:
        """Returns the memory needs of the closed set, from its largest programs over a pool of two pages.

        These are the only programs built twice. Idle cores meanwhile build programs that do not depend on the size of
        the pool.
        """
        probe = dataclasses.replace(shapes, num_pages=2)
        largest = {key: self.ask(key, probe) for key in longest_first(largest_keys(shapes))}
        for key in longest_first(program_keys(shapes)):
            if not key.uses_pools:
                self.ask(key, shapes)
        needs = ProgramNeeds.from_largest({key: future.result()[1] for key, future in largest.items()}, shapes)
        return loaded(needs, self.mesh)

    def build(self, shapes: Shapes, *, servable: bool = False) -> ProgramSet:
        """Builds the closed set of `shapes`. Raises the error of the first program that cannot be compiled.

        servable: compiles only the programs that can serve every request; of the others only those in the cache are
            included, and the rest is missing in the set.
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
        """Returns the program from the cache; None on a miss."""
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
        """Yields the futures as they complete, with progress."""
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
