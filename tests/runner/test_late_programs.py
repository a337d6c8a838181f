"""Serving before the closed set is complete: who stands in, what joins, and what is said when something fails."""

from __future__ import annotations

import dataclasses
import gc
import io
import logging
import pathlib
import time
from collections.abc import Callable

import pytest

from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.models.config import ModelConfig
from jaxserve.models.params import make_mesh
from jaxserve.programs.aot.program_cache import ProgramCache
from jaxserve.programs.compiler import CompileMissError, ProgramMemory, ProgramSet
from jaxserve.programs.layout import PENALTY_RUNS
from jaxserve.programs.program_needs import servable_keys
from jaxserve.programs.step_programs import MASK_WRITE, OPTION_WRITE, PAGE_COPY, TABLE_WRITE, ProgramKey, program_keys
from jaxserve.request import EngineRequest
from jaxserve.runner import engine_startup as startup
from jaxserve.runner import late_programs
from jaxserve.runner.late_compiler import CompileTask
from jaxserve.runner.late_programs import LatePrograms, most_useful_first
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.scheduler.plan import NO_DECODES, NO_SAMPLES, StepPlan
from tests.runner.drive import drive

MODEL = ModelConfig("LlamaForCausalLM", 96, 32, 48, 1, 4, 2, 32, 256, tie_word_embeddings=True)
CONFIG = EngineConfig(
    architecture=MODEL,
    load_format="dummy",
    scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=32),
    cache=CacheConfig(num_pages=64),
    token_buckets=(8, 16, 32),
    seed=3,
)
MEMORY = ProgramMemory(temporaries=0, outputs=0, aliased=0, code=1)
REQUESTS = [
    EngineRequest(str(number), tuple(range(5, 5 + 7 * number)), 9, temperature=number % 2, seed=number)
    for number in range(1, 6)
]


def keys_of(kind: str, *sizes: int) -> list[ProgramKey]:
    return [ProgramKey(kind, size) for size in sizes]


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "what was waited for did not happen"
        time.sleep(0.01)


def set_of(*keys: ProgramKey, missing: tuple[ProgramKey, ...] = ()) -> ProgramSet:
    return ProgramSet(dict.fromkeys(keys, "program"), dict.fromkeys(keys, MEMORY), 0.0, missing=set(missing))


def test_the_next_larger_program_of_a_kind_stands_in():
    programs = set_of(*keys_of("forward", 32, 512), *keys_of("sample", 64), missing=tuple(keys_of("forward", 8, 64)))
    assert programs.standing_in(ProgramKey("forward", 8)) == ProgramKey("forward", 32)
    assert programs.standing_in(ProgramKey("forward", 64)) == ProgramKey("forward", 512)
    programs.join(ProgramKey("forward", 8), "program", MEMORY)
    assert programs.standing_in(ProgramKey("forward", 8)) == ProgramKey("forward", 8)
    assert programs.missing == {ProgramKey("forward", 64)}
    outside = ProgramKey("forward", 16)
    assert programs.standing_in(outside) == outside, "what is not in the closed set has no stand-in"
    with pytest.raises(CompileMissError, match="no forward program of size 16"):
        programs.get(programs.standing_in(outside))


def test_those_that_save_most_padding_come_first():
    keys = [*keys_of("sample", 8, 16, 32), *keys_of("forward", 8, 16, 24, 32, 48, 64, 96)]
    order = most_useful_first(keys)
    assert sorted(order) == sorted(keys)
    assert [key.size for key in order if key.kind == "forward"] == [8, 48, 24, 96, 16, 32, 64]
    assert order[:4] == [ProgramKey("forward", 8), ProgramKey("sample", 8), ProgramKey("forward", 48),
                         ProgramKey("sample", 32)]  # fmt: skip
    assert most_useful_first([]) == []


def test_a_task_arrives_as_it_was_sent():
    task = CompileTask(CONFIG, 64, "/cache", (ProgramKey("forward", 8), ProgramKey("sample", 8)))
    stream = io.BytesIO()
    task.write(stream)
    data = stream.getvalue()
    assert CompileTask.read(io.BytesIO(data)) == task
    assert CompileTask.read(io.BytesIO(data[:-1])) is None, "the engine ended while it wrote"
    assert CompileTask.read(io.BytesIO(b"")) is None


def test_only_a_server_on_cpus_is_ready_early_by_itself():
    def early(ready_when: str, platform: str, server: bool) -> bool:
        return startup.ready_when_servable(dataclasses.replace(CONFIG, ready_when=ready_when), platform, server)

    assert early("auto", "cpu", True)
    assert not early("auto", "cpu", False)
    assert not early("auto", "gpu", True)
    assert early("servable", "cpu", False)
    assert not early("complete", "cpu", True)
    with pytest.raises(ValueError, match=r"ready_when is 'servable' on a gpu, .* set it to 'complete'"):
        early("servable", "gpu", True)


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> tuple[ModelRunner, list[tuple]]:
    """A runner that is ready with what can serve, and what it would have had compiled."""
    asked: list[tuple] = []
    with monkeypatch.context() as patch:
        patch.setattr(startup, "LatePrograms", lambda *arguments: asked.append(arguments))
        config = dataclasses.replace(CONFIG, ready_when="servable", compilation_cache_dir=str(tmp_path / "programs"))
        return ModelRunner(config), asked


@pytest.mark.one_lane
def test_tokens_are_the_same_before_and_after_the_others_join(early, caplog):
    runner, asked = early
    everything = set(program_keys(runner._shapes))
    writes = {TABLE_WRITE, OPTION_WRITE, MASK_WRITE, PAGE_COPY, *keys_of("penalty_write", *PENALTY_RUNS)}
    others = {*writes, *keys_of("score", 32), *keys_of("pooling", 16)}
    assert set(runner.programs.executables) == {*keys_of("forward", 16, 32), *keys_of("sample", 16), *others}
    assert runner.info.num_executables == len(everything) == 15
    assert runner.info.num_missing_executables == 3
    assert runner.num_executables == 12
    plan = StepPlan(0, NO_DECODES, (), NO_SAMPLES, token_bucket=8, row_bucket=8, num_tokens=3)
    fitted = runner.fitted(plan)
    assert (fitted.token_bucket, fitted.row_bucket, fitted.padding) == (16, 16, 13)
    before = drive(runner, CONFIG, REQUESTS).tokens

    compiled = runner.num_compilations
    ((config, shapes, programs, cache),) = asked
    with caplog.at_level(logging.INFO, "jaxserve"):
        LatePrograms(config, shapes, programs, cache)
        wait_for(lambda: " programs are there" in caplog.text)
    assert "all 15 programs are there after" in caplog.text
    assert not runner.programs.missing
    assert set(runner.programs.executables) == everything
    assert runner.fitted(plan) is plan
    assert drive(runner, CONFIG, REQUESTS).tokens == before
    assert runner.num_compilations == compiled, "nothing was compiled in the process that serves"
    assert runner.compile_misses == 0

    complete = ModelRunner(config)  # finds them all in the cache
    assert complete.info.num_missing_executables == 0
    assert complete.info.num_cached_executables == 15
    wanted = drive(complete, CONFIG, REQUESTS)
    assert wanted.programs >= set(keys_of("forward", 8, 32)), "the test is to use those that were missing"
    assert wanted.tokens == before
    # The plan of the memory had room for all of them.
    parts, of_all = dict(runner.info.memory), dict(complete.info.memory)
    assert parts["temporaries"] >= of_all["temporaries"]
    assert parts["code"] >= of_all["code"]


def test_what_copies_pages_is_made_before_anything_is_served():
    shapes = dataclasses.replace(startup.resolve_shapes(CONFIG, "cpu"), num_host_pages=16)
    writes = {TABLE_WRITE, OPTION_WRITE, MASK_WRITE, PAGE_COPY, *keys_of("penalty_write", *PENALTY_RUNS)}
    others = {*keys_of("sample", 16), *keys_of("pooling", 16), *keys_of("score", 32)}
    swaps = {*keys_of("swap_in", 1, 4, 16), *keys_of("swap_out", 1, 4, 16), *writes}
    assert set(servable_keys(shapes)) == {*keys_of("forward", 16, 32), *others, *swaps}


def start_with(script: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, programs: ProgramSet) -> None:
    """`LatePrograms` with a shell script in place of the compiler."""
    path = tmp_path / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    monkeypatch.setattr(late_programs.sys, "executable", str(path))
    cache = ProgramCache.open(tmp_path / "programs", 10**9, make_mesh())
    LatePrograms(CONFIG, startup.resolve_shapes(CONFIG, "cpu"), programs, cache)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("exit 3", ["1 of 3 programs are there", "ended with exit code 3"]),
        ("head -c 9 >/dev/null; echo 'forward 8 ValueError: no such thing'", ["forward 8 was not compiled: ValueError:"
                                                                             " no such thing"]),
        ("head -c 9 >/dev/null; echo 'sample 8'", ["sample 8 was not compiled: the compilation cache has it not"]),
    ],
)  # fmt: skip
def test_what_cannot_be_compiled_is_said_and_stood_in_for(script, words, tmp_path, monkeypatch, caplog):
    programs = set_of(*keys_of("forward", 32), missing=(ProgramKey("forward", 8), ProgramKey("sample", 8)))
    start_with(script, tmp_path, monkeypatch, programs)
    wait_for(lambda: " programs are there" in caplog.text)
    for text in words:
        assert text in caplog.text
    assert programs.standing_in(ProgramKey("forward", 8)) == ProgramKey("forward", 32)


def test_the_compiler_ends_with_the_set_that_it_works_for(tmp_path, monkeypatch):
    programs = set_of(*keys_of("forward", 32), missing=(ProgramKey("forward", 8),))
    started: list[late_programs.subprocess.Popen] = []
    popen = late_programs.subprocess.Popen

    def noted(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(late_programs.subprocess, "Popen", noted)
    start_with("exec sleep 600", tmp_path, monkeypatch, programs)
    assert started[0].poll() is None
    del programs
    gc.collect()
    wait_for(lambda: started[0].returncode is not None)
    assert started[0].returncode < 0
