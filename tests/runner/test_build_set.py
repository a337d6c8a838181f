"""Making the closed set at start: in which order, what is made twice, and what is said meanwhile."""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from typing import Any

import pytest

from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.models.config import ModelConfig
from jaxserve.models.params import make_mesh
from jaxserve.planning import memory_plan as memory
from jaxserve.planning.memory_plan import MARGIN_BYTES, DeviceMemory, MemoryPlanner, pages_in_use
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.programs import build_set
from jaxserve.programs.build_set import SetBuilder, _Workers, longest_first
from jaxserve.programs.compiler import ProgramMemory
from jaxserve.programs.program_needs import LOADED_TIMES, ProgramNeeds
from jaxserve.programs.step_programs import ProgramKey, Shapes, program_keys
from jaxserve.runner import engine_startup as startup
from jaxserve.runner.model_runner import ModelRunner

MODEL = ModelConfig("LlamaForCausalLM", 96, 32, 48, 2, 4, 2, 32, 256, tie_word_embeddings=True)
CONFIG = EngineConfig(
    architecture=MODEL,
    load_format="dummy",
    scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=16),
    token_buckets=(8, 16),
)


class Compiler:
    """Stands in for XLA: notes what is compiled; the memory of a program is its size, times `factor`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, factor: int = 1):
        self.asked: list[tuple[ProgramKey, int]] = []
        self.factor = factor
        monkeypatch.setattr(build_set, "compile_program", self.compile)
        monkeypatch.setattr(build_set, "program_memory", self.memory)

    def compile(self, key: ProgramKey, shapes: Shapes, mesh: Any) -> Any:
        self.asked.append((key, shapes.num_pages))
        return key

    def memory(self, key: ProgramKey) -> ProgramMemory:
        return ProgramMemory(temporaries=key.size * self.factor, outputs=0, aliased=0, code=1)


def shapes_of(num_pages: int = 64) -> Shapes:
    return dataclasses.replace(resolve_shapes(CONFIG, "cpu"), num_pages=num_pages)


def test_those_that_take_longest_come_first():
    keys = [ProgramKey(kind, size) for kind in ("decode", "forward", "sample") for size in (8, 512, 64)]
    assert [(key.kind, key.size) for key in longest_first(reversed(keys))] == [
        *(("forward", size) for size in (512, 64, 8)),
        *(("decode", size) for size in (512, 64, 8)),
        *(("sample", size) for size in (512, 64, 8)),
    ]


def test_a_more_urgent_task_overtakes_what_waits(monkeypatch):
    monkeypatch.setattr(build_set.os, "cpu_count", lambda: 1)
    workers, done, go = _Workers(), [], threading.Event()
    first = workers.add((0, 0), go.wait)
    futures = [workers.add((rank, 0), lambda rank=rank: done.append(rank)) for rank in (3, 1, 2)]
    go.set()
    for future in (first, *futures):
        future.result(60)
    assert done == [1, 2, 3]
    failing = workers.add((0, 0), lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        failing.result(60)
    workers.close()


def test_only_programs_that_depend_on_the_pools_size_are_made_twice(monkeypatch):
    compiler = Compiler(monkeypatch)
    with SetBuilder(make_mesh(), None, progress=False) as builder:
        needs = builder.needs(shapes_of())
        programs = builder.build(shapes_of())
    assert needs == ProgramNeeds(temporaries=4817, code=12 * LOADED_TIMES, together=4817)
    assert sorted(compiler.asked) == [
        (ProgramKey("forward", 8), 64),
        (ProgramKey("forward", 16), 2),
        (ProgramKey("forward", 16), 64),
        (ProgramKey("mask_write", 8), 2),
        (ProgramKey("option_write", 1), 2),
        (ProgramKey("page_copy", 16), 2),
        (ProgramKey("page_copy", 16), 64),
        (ProgramKey("penalty_write", 64), 2),
        (ProgramKey("penalty_write", 512), 2),
        (ProgramKey("penalty_write", 4096), 2),
        (ProgramKey("pooling", 8), 2),
        (ProgramKey("sample", 8), 2),
        (ProgramKey("score", 16), 2),
        (ProgramKey("table_write", 64), 2),
    ]
    assert list(programs.executables) == longest_first(program_keys(shapes_of()))
    assert programs.num_cached == 0


def test_a_program_that_cannot_be_compiled_ends_the_set(monkeypatch):
    compiler = Compiler(monkeypatch)

    def fail(key: ProgramKey, *_: Any) -> Any:
        raise MemoryError(f"{key.kind} {key.size}") if key.size == 16 else ValueError

    monkeypatch.setattr(build_set, "compile_program", fail)
    with pytest.raises((MemoryError, ValueError)), SetBuilder(make_mesh(), None, progress=False) as builder:
        builder.build(shapes_of())
    assert not compiler.asked


def after_the_first_line(compile_program: Any, caplog: pytest.LogCaptureFixture) -> Any:
    """A compiler whose last program is not ready before the log has said something."""
    last = longest_first(program_keys(shapes_of()))[-1]

    def compile_late(key: ProgramKey, *arguments: Any) -> Any:
        end = time.monotonic() + 60
        while key == last and not caplog.text and time.monotonic() < end:
            time.sleep(0.001)
        return compile_program(key, *arguments)

    return compile_late


def test_progress_is_logged_where_there_is_no_terminal(monkeypatch, caplog):
    Compiler(monkeypatch)
    quick = build_set.compile_program
    monkeypatch.setattr(build_set, "PROGRESS_SECONDS", 0.0)
    for progress in (True, False):
        caplog.clear()
        monkeypatch.setattr(build_set, "compile_program", after_the_first_line(quick, caplog) if progress else quick)
        with caplog.at_level(logging.INFO, "jaxserve"):
            with SetBuilder(make_mesh(), None, progress=progress) as builder:
                builder.build(shapes_of())
        assert (" of 12 programs are ready, " in caplog.text) == progress


def test_a_pool_with_room_to_spare_needs_no_program_to_be_sized():
    shapes, mesh = shapes_of(2), make_mesh()
    most = pages_in_use(shapes)
    planner = MemoryPlanner(shapes, CacheConfig(), mesh, DeviceMemory(1, 1))
    fixed = planner.plan(2, ProgramNeeds(0, 0))
    enough = fixed.fixed + MARGIN_BYTES + 2 * most * fixed.page
    plan = dataclasses.replace(planner, device=DeviceMemory(enough, enough)).roomy()
    assert plan is not None
    assert plan.num_pages == most
    assert dataclasses.replace(planner, device=DeviceMemory(enough, enough - 2)).roomy() is None
    plenty = dataclasses.replace(planner, device=DeviceMemory(10**12, 10**12))
    assert dataclasses.replace(plenty, cache=CacheConfig(num_pages=9)).roomy() is None
    assert dataclasses.replace(plenty, cache=CacheConfig(kv_cache_memory_bytes=10**6)).roomy() is None


def test_programs_that_need_more_than_was_foreseen_shrink_the_pool(monkeypatch):
    """The pool was sized without compiling; then the programs ask for most of the memory."""
    monkeypatch.setattr(memory, "MARGIN_BYTES", 0)
    shapes, mesh = shapes_of(2), make_mesh()
    bare = MemoryPlanner(shapes, CacheConfig(), mesh, DeviceMemory(1, 1)).plan(2, ProgramNeeds(0, 0))
    room = 2 * pages_in_use(shapes) * bare.page
    monkeypatch.setattr(startup, "local_memory", lambda *_: DeviceMemory(bare.fixed + room, bare.fixed + room))
    asked: list[int] = []
    real = build_set.program_memory

    def hungry(executable: Any) -> ProgramMemory:
        asked.append(1)
        each = (room - 30 * bare.page) // len(program_keys(shapes))
        return dataclasses.replace(real(executable), temporaries=each, outputs=0, aliased=0, code=1)

    monkeypatch.setattr(build_set, "program_memory", hungry)
    runner = ModelRunner(dataclasses.replace(CONFIG, compilation_cache_dir=None))
    assert runner.info.num_pages == 29, "30, less a few bytes of code"
    assert len(asked) == 15, "only the two forward programs and that which copies pages were made twice"
