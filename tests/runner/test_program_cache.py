"""The compilation cache: a second start compiles nothing, damage is compiled anew, others cannot write to it."""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import jax
import pytest

from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.models.config import ModelConfig
from jaxserve.models.params import make_mesh
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.programs import build_set
from jaxserve.programs.aot import bundle, program_cache
from jaxserve.programs.aot.bundle import source_files
from jaxserve.programs.aot.loaded import LoadedProgram
from jaxserve.programs.aot.program_cache import SUFFIX, CacheRefusedError, ProgramCache, default_directory
from jaxserve.programs.step_programs import ProgramKey
from jaxserve.request import EngineRequest
from jaxserve.runner.model_runner import ModelRunner
from tests.runner.drive import drive

pytestmark = pytest.mark.usefixtures("compiled_once")

MODEL = ModelConfig("LlamaForCausalLM", 96, 32, 48, 2, 4, 2, 32, 256, tie_word_embeddings=True)
CONFIG = EngineConfig(
    architecture=MODEL,
    load_format="dummy",
    scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=16),
    cache=CacheConfig(num_pages=64),
    token_buckets=(8, 16),
    seed=3,
)
FORWARD, SAMPLE = ProgramKey("forward", 16), ProgramKey("sample", 8)
NUM_PROGRAMS = 12
"""Two forward programs, one that samples, one that scores, one that copies pages, and those that write page tables,
options, masks and penalty rows."""


@pytest.fixture(scope="module")
def filled(compiled_once: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, list[list[int]]]:
    """A cache that one start has filled, and what that engine said."""
    directory = tmp_path_factory.mktemp("cache", numbered=True)
    runner = start(directory)
    assert runner.info.num_cached_executables == 0
    return directory, tokens(runner)


@pytest.fixture
def copy(filled, tmp_path: pathlib.Path) -> pathlib.Path:
    directory = tmp_path / "cache"
    directory.mkdir(mode=0o700)
    for path in filled[0].iterdir():
        (directory / path.name).touch(mode=0o600)
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


def start(directory: pathlib.Path | str | None, **changes: object) -> ModelRunner:
    where = None if directory is None else str(directory)
    return ModelRunner(dataclasses.replace(CONFIG, compilation_cache_dir=where, **changes))


def tokens(runner: ModelRunner) -> list[list[int]]:
    requests = [
        EngineRequest(f"r{n}", tuple(range(1, 9 * n + 2)), 8, temperature=float(n % 2), seed=n) for n in range(6)
    ]
    return drive(runner, CONFIG, requests).tokens


def opened(directory: pathlib.Path) -> ProgramCache:
    return ProgramCache.open(directory, 1 << 30, make_mesh())


def shapes(num_pages: int = 64):
    return dataclasses.replace(resolve_shapes(CONFIG, "cpu"), num_pages=num_pages)


def test_a_second_start_compiles_nothing_and_says_the_same(filled, monkeypatch):
    directory, expected = filled

    def refuse(*_: object) -> None:
        raise AssertionError("a program was compiled that the cache holds")

    monkeypatch.setattr(build_set, "compile_program", refuse)
    runner = start(directory)
    assert runner.info.num_cached_executables == runner.info.num_executables == NUM_PROGRAMS
    assert all(isinstance(program, LoadedProgram) for program in runner.programs.executables.values())
    before = runner.num_compilations
    assert tokens(runner) == expected
    assert runner.num_compilations == before
    assert {phase[0] for phase in runner.info.phases} >= {"plan", "programs", "weights", "pool", "warm-up"}


def test_memory_of_cached_programs_is_what_the_compiler_said(filled):
    assert start(filled[0]).programs.memory == start(None).programs.memory


def cut(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: pathlib.Path) -> None:
    path.write_bytes(b"")


def flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_head(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)


def swap(path: pathlib.Path) -> None:
    """Another program's entry, whole, under this name."""
    other = next(one for one in sorted(path.parent.iterdir()) if one != path)
    path.write_bytes(other.read_bytes())


@pytest.mark.parametrize("spoil", [cut, empty, flip, flip_head, swap])
def test_a_damaged_entry_is_compiled_anew(copy, filled, spoil: Callable[[pathlib.Path], None], caplog):
    path = sorted(copy.iterdir())[1]
    spoil(path)
    with caplog.at_level(logging.WARNING, "jaxserve"):
        runner = start(copy)
    assert f"compilation cache entry {path} is thrown away: it " in caplog.text
    assert runner.info.num_cached_executables == NUM_PROGRAMS - 1
    assert tokens(runner) == filled[1]
    assert start(copy).info.num_cached_executables == NUM_PROGRAMS


def test_what_the_runtime_refuses_is_compiled_anew(copy, monkeypatch, caplog):
    verified = program_cache._verified
    monkeypatch.setattr(
        program_cache, "_verified", lambda content, what: (verified(content, what)[0], b"no executable")
    )
    with caplog.at_level(logging.WARNING, "jaxserve"):
        assert start(copy).info.num_cached_executables == 0
    assert caplog.text.count("is thrown away") == NUM_PROGRAMS


def test_the_directory_is_this_users_alone(tmp_path):
    directory = tmp_path / "some" / "cache"
    opened(directory)
    assert directory.stat().st_mode & 0o777 == 0o700
    for mode in (0o720, 0o702, 0o777):
        directory.chmod(mode)
        with pytest.raises(CacheRefusedError, match=rf"has the mode {mode:04o}: others may write to it; chmod 700"):
            opened(directory)
    directory.chmod(0o755)
    opened(directory)


def test_the_directories_above_are_checked_too(tmp_path):
    directory = tmp_path / "some" / "cache"
    opened(directory)
    directory.parent.chmod(0o777)
    with pytest.raises(CacheRefusedError, match=r"some/cache lies in .*some, which has the mode 0777: others may"):
        opened(directory)


def test_entries_are_this_users_alone(copy, caplog):
    assert all(path.stat().st_mode & 0o077 == 0 for path in copy.iterdir())
    for path in copy.iterdir():
        path.chmod(0o666)
    with caplog.at_level(logging.WARNING, "jaxserve"):
        assert start(copy).info.num_cached_executables == 0
    assert caplog.text.count("is not used: it has the mode 0666: others may write to it") == NUM_PROGRAMS


def test_another_users_directory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(program_cache.os, "getuid", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.raises(CacheRefusedError, match=r"belongs to user \d+, not to \d+; set EngineConfig"):
        opened(tmp_path)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(CacheRefusedError, match="cannot be made"):
        opened(file / "cache")


def test_a_configured_directory_must_do_and_the_default_need_not(tmp_path, monkeypatch, caplog):
    tmp_path.chmod(0o777)
    with pytest.raises(CacheRefusedError, match="others may write to it"):
        start(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "jaxserve" / "programs"
    default_directory().mkdir(parents=True)
    default_directory().chmod(0o777)
    with caplog.at_level(logging.WARNING, "jaxserve"):
        assert start("auto").info.num_cached_executables == 0
    assert "compiled programs are not kept for the next start: compilation cache" in caplog.text
    assert not list(default_directory().iterdir())


def test_the_default_directory(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert default_directory() == pathlib.Path("/home/somebody/.cache/jaxserve/programs")
    monkeypatch.setattr(program_cache.os.path, "expanduser", lambda path: path)
    with pytest.raises(CacheRefusedError, match="no home directory"):
        default_directory()


def test_without_a_directory_nothing_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    start(None)
    assert not list(tmp_path.iterdir())


def test_the_least_recently_used_entries_go_first(tmp_path):
    cache = dataclasses.replace(opened(tmp_path), max_bytes=250)
    for number, age in enumerate((30, 10, 40, 20)):
        path = tmp_path / f"{number}{SUFFIX}"
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    dead, fresh = tmp_path / "a.partial", tmp_path / "b.partial"
    dead.touch()
    fresh.touch()
    os.utime(dead, (1e9, 1e9))
    (tmp_path / "somebody's notes").touch()
    cache.prune()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [f"1{SUFFIX}", f"3{SUFFIX}", fresh.name, "somebody's notes"]
    )


def test_a_start_keeps_to_the_size(tmp_path):
    start(tmp_path, compilation_cache_max_bytes=0)
    assert not list(tmp_path.iterdir())


def test_use_makes_an_entry_recent(copy):
    for path in copy.iterdir():
        os.utime(path, (1e9, 1e9))
    assert opened(copy).load(SAMPLE, shapes()) is not None
    assert sorted(path.stat().st_mtime == 1e9 for path in copy.iterdir()) == [False, *(NUM_PROGRAMS - 1) * [True]]


def test_an_entry_is_found_by_all_that_decides_the_program(copy, monkeypatch):
    cache = opened(copy)

    def found() -> list[bool]:
        return [cache.load(key, shapes()) is not None for key in (FORWARD, SAMPLE)]

    assert found() == [True, True]
    assert cache.load(FORWARD, shapes(63)) is None, "its pool has another shape"
    assert cache.load(SAMPLE, shapes(63)) is not None, "it sees no page"
    for target, name, value in (
        (bundle, "_sources_hash", lambda: "other sources"),
        (bundle, "_xla_flags", lambda: ["--xla_cpu_enable_fast_math=true"]),
        (bundle.jax, "__version__", "0.0.1"),
        (program_cache, "machine", lambda: {"architecture": "other", "features": []}),
        (program_cache, "_cores", lambda: 1000),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            assert found() == [False, False], name
    before = jax.config.values["jax_default_matmul_precision"]
    try:
        jax.config.update("jax_default_matmul_precision", "highest")
        assert found() == [False, False]
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    assert found() == [True, True]


def test_every_module_that_programs_import_counts():
    """A source that is missing in the list would let a changed program be taken from the cache."""
    script = (
        "import sys; before = set(sys.modules); import jaxserve.programs.step_programs\n"
        "for name in set(sys.modules) - before:\n"
        "    if name.split('.')[0] == 'jaxserve':\n"
        "        print(sys.modules[name].__file__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    imported = {pathlib.Path(line).resolve() for line in done.stdout.split()}
    root = pathlib.Path(build_set.__file__).parents[2]
    packages = {root / "jaxserve" / "__init__.py", root / "jaxserve" / "runner" / "__init__.py"}
    assert len(imported) > 30
    assert imported - packages <= {path.resolve() for path in source_files()}
