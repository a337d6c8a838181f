"""Bundles for this machine: an engine starts from one without compiling, and refuses one that does not fit."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.models.config import ModelConfig
from jaxserve.planning.reports.compile_report import build
from jaxserve.programs import build_set
from jaxserve.programs.aot import bundle as bundles
from jaxserve.programs.aot.bundle import MANIFEST, Bundle, BundleError, BundleWriter
from jaxserve.programs.aot.loaded import LoadedProgram
from jaxserve.programs.step_programs import ProgramKey
from jaxserve.programs.target_devices import load_target, target_mesh
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


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("bundle")
    build(CONFIG, load_target("cpu"), directory)
    return directory


@pytest.fixture
def copy(bundle: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(bundle, tmp_path / "copy"))


def with_bundle(directory: pathlib.Path, config: EngineConfig = CONFIG) -> EngineConfig:
    return dataclasses.replace(config, bundle=str(directory))


def tokens(runner: ModelRunner) -> list[list[int]]:
    """Greedy and random output of requests that share steps, prompts longer than a step among them."""
    rng = np.random.default_rng(0)
    requests = [
        EngineRequest(
            f"r{number}",
            tuple(int(token) for token in rng.integers(0, 96, rng.integers(1, 40))),
            max_tokens=8,
            temperature=float(number % 2),
            seed=number,
        )
        for number in range(6)
    ]
    return drive(runner, CONFIG, requests, poison=False).tokens


def test_an_engine_starts_from_a_bundle_without_compiling(bundle, monkeypatch):
    compiled = ModelRunner(CONFIG)
    expected = tokens(compiled)

    def refuse(*_: object) -> None:
        raise AssertionError("a program of the closed set was compiled")

    monkeypatch.setattr(build_set, "compile_program", refuse)
    before = compiled.num_compilations
    loaded = ModelRunner(with_bundle(bundle, dataclasses.replace(CONFIG, cache=CacheConfig())))
    assert loaded.num_compilations == before > 0
    assert loaded.info.num_pages == 64
    assert loaded.info.num_executables == 12
    assert (compiled.info.bundle, loaded.info.bundle) == (None, str(bundle))
    for key, memory in compiled.programs.memory.items():
        # Serialized, a program holds its compiler's options too, and a bundle's has more of them.
        code = pytest.approx(memory.code, rel=0.01, abs=256)
        assert dataclasses.asdict(loaded.programs.memory[key]) == dataclasses.asdict(memory) | {"code": code}
    assert loaded.programs.memory.keys() == compiled.programs.memory.keys()
    assert tokens(loaded) == expected
    assert loaded.num_compilations == before


def test_donated_arrays_keep_their_place_and_are_gone(bundle):
    runner = ModelRunner(with_bundle(bundle))
    pools, slots = list(runner._arrays.pools), jax.tree.leaves(runner._arrays.slots)
    places = [pool.unsafe_buffer_pointer() for pool in pools]
    tokens(runner)
    assert all(array.is_deleted() for array in (*pools, *slots))
    assert [pool.unsafe_buffer_pointer() for pool in runner._arrays.pools] == places


def test_a_loaded_program_refuses_other_arguments(bundle):
    runner = ModelRunner(with_bundle(bundle))
    program = runner.programs.executables[ProgramKey("sample", 8)]
    assert isinstance(program, LoadedProgram)
    with pytest.raises(TypeError, match=r"takes arguments of the structure .* it was called with"):
        program(runner._arrays.slots)
    mesh = target_mesh(load_target("cpu"))
    argument = jax.ShapeDtypeStruct((3,), np.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    with pytest.raises(TypeError, match=r"takes float32\[3\] as flat argument 0; it was called with float32\[4\]"):
        LoadedProgram(None, (argument,), (), (0,), mesh)(np.zeros(4, np.float32))


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[pathlib.Path], None]:
    def edit(directory: pathlib.Path) -> None:
        path = directory / MANIFEST
        manifest = json.loads(path.read_text())
        change(manifest)
        path.write_text(json.dumps(manifest))

    return edit


def truncate(directory: pathlib.Path) -> None:
    path = directory / "programs" / "forward_8"
    path.write_bytes(path.read_bytes()[:-1])


def flip(directory: pathlib.Path) -> None:
    path = directory / "programs" / "forward_8"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


REFUSALS: dict[str, tuple[Callable[[pathlib.Path], None], str]] = {
    "jax": (edited(lambda m: m.update(jax="0.1.0")), r"has jax '0\.1\.0'; this engine has '0\.1"),
    "format": (edited(lambda m: m.update(format=0)), "has format 0; this engine has 1"),
    "platform": (edited(lambda m: m.update(platform="gpu")), "has platform 'gpu'; this engine has 'cpu'"),
    "device": (edited(lambda m: m.update(device_kind="NVIDIA H200")), "has device_kind 'NVIDIA H200'; this engine has"),
    "options": (edited(lambda m: m["compiler_options"].update(a=1)), "has compiler_options.a 1; this engine has None"),
    "flags": (
        edited(lambda m: m["xla_flags"].append("--xla_cpu_enable_fast_math=true")),
        r"has xla_flags .*'--xla_cpu_enable_fast_math=true'\]; this engine has \[",
    ),
    "sources": (edited(lambda m: m.update(sources_sha256="0")), "has sources_sha256 '0'; this engine has"),
    "model": (
        edited(lambda m: m["shapes"]["model"].update(hidden_size=64)),
        r"has shapes\.model\.hidden_size 64; this engine has 32",
    ),
    "pages": (edited(lambda m: m["shapes"].update(num_pages=65)), r"has shapes\.num_pages 65; this engine has 64"),
    "machine": (edited(lambda m: m["target"]["machine"]["features"].append("amx9")), "a CPU with amx9, which this one"),
    "program": (edited(lambda m: m["programs"].pop()), "has programs .* this engine has"),
    "argument": (
        edited(lambda m: m["programs"][0]["arguments"][0].__setitem__(1, "bfloat16")),
        r"forward 16 arguments\[0\]\[1\] 'bfloat16'; this engine has 'float32'",
    ),
    "donated": (edited(lambda m: m["programs"][0].update(donated_arguments=[])), "forward 16 donated_arguments"),
    "kept": (edited(lambda m: m["programs"][0].update(kept_arguments=[999])), "kept_arguments that do not fit its"),
    "file": (edited(lambda m: m["programs"][0].update(file="../x")), r"names the file '\.\./x'; programs lie in"),
    "memory": (edited(lambda m: m["programs"][0].pop("memory")), "with memory None; it must be a dict"),
    "truncated": (truncate, r"has \d+ bytes of programs/forward_8; the manifest says \d+: it is truncated"),
    "changed": (flip, "has programs/forward_8 with the sha256 .*; the manifest says .*: it was changed"),
    "missing": (lambda d: (d / "programs" / "sample_8").unlink(), "sample_8 that cannot be read: No such file"),
    "no manifest": (lambda d: (d / MANIFEST).unlink(), r"has no readable manifest\.json: No such file"),
    "no JSON": (lambda d: (d / MANIFEST).write_text("{"), r"has a manifest\.json that is not valid JSON"),
    "no object": (lambda d: (d / MANIFEST).write_text("[]"), "with a list instead of an object"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_bundle_that_does_not_fit_is_refused(copy, name, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("weights were loaded for a bundle that does not fit")

    monkeypatch.setattr("jaxserve.runner.engine_startup.random_params", refuse)
    spoil, reason = REFUSALS[name]
    spoil(copy)
    with pytest.raises(BundleError, match=reason) as refused:
        ModelRunner(with_bundle(copy))
    text = str(refused.value)
    assert text.startswith(f"bundle {copy} ")
    assert text.endswith("; compile it anew with python -m jaxserve.compile")


def by_another(path: pathlib.Path) -> None:
    os.chown(path, 12345, 12345)


def mode(number: int, *names: str) -> Callable[[pathlib.Path], None]:
    return lambda directory: directory.joinpath(*names).chmod(number)


UNTRUSTED: dict[str, tuple[Callable[[pathlib.Path], None], str]] = {
    "directory": (mode(0o777), r"has the mode 0777: others may write to it; chmod 700 it"),
    "group": (mode(0o775), r"has the mode 0775: others may write to it"),
    "programs": (mode(0o757, "programs"), r"/programs has the mode 0757: others may write to it"),
    "manifest": (mode(0o666, MANIFEST), r"/manifest.json has the mode 0666: others may write to it; chmod go-w it"),
    "program": (mode(0o664, "programs", "forward_8"), r"/programs/forward_8 has the mode 0664: others may write to it"),
    "above": (lambda d: d.parent.chmod(0o777), r"lies in .* has the mode 0777: others may replace it"),
}
if os.getuid() == 0:
    UNTRUSTED |= {
        "owner": (by_another, r"belongs to user 12345, not to 0"),
        "owner of a program": (
            lambda d: by_another(d / "programs" / "sample_8"),
            r"/programs/sample_8 belongs to user 12345, not to 0",
        ),
        "owner of the manifest": (
            lambda d: by_another(d / MANIFEST),
            r"/manifest.json belongs to user 12345",
        ),
    }


@pytest.mark.parametrize("name", UNTRUSTED)
def test_a_bundle_that_others_could_have_written_is_refused(copy, name, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("a program of a bundle that others could have written was loaded")

    monkeypatch.setattr(bundles, "_load", refuse)
    spoil, reason = UNTRUSTED[name]
    spoil(copy)
    with pytest.raises(BundleError, match=reason) as refused:
        ModelRunner(with_bundle(copy))
    assert str(refused.value).startswith(f"bundle {copy}")
    assert "its programs are machine code" in str(refused.value)


def test_a_bundle_is_written_for_its_owner_alone_whatever_the_umask(tmp_path):
    before = os.umask(0o000)
    try:
        build(CONFIG, load_target("cpu"), tmp_path / "out")
    finally:
        os.umask(before)
    written = [tmp_path / "out", *(tmp_path / "out" / "programs").iterdir(), tmp_path / "out" / MANIFEST]
    assert all(path.stat().st_mode & 0o022 == 0 for path in [*written, tmp_path / "out" / "programs"])
    Bundle.open(tmp_path / "out")


def test_a_bundle_fits_a_model_with_other_end_tokens(bundle):
    model = dataclasses.replace(MODEL, eos_token_ids=(5,), bos_token_id=1, max_position_embeddings=512)
    config = dataclasses.replace(CONFIG, architecture=model, max_model_len=256)
    assert ModelRunner(with_bundle(bundle, config)).info.eos_token_ids == (5,)


def test_flags_that_say_what_is_dumped_do_not_count(bundle, monkeypatch):
    flags = os.environ.get("XLA_FLAGS", "")
    runner = ModelRunner(with_bundle(bundle))
    mesh = target_mesh(load_target("cpu"))
    monkeypatch.setenv("XLA_FLAGS", f"{flags} --xla_dump_to=/tmp/x --xla_dump_hlo_as_text")
    Bundle.open(bundle).check(runner._shapes, mesh)
    monkeypatch.setenv("XLA_FLAGS", f"{flags} --xla_cpu_enable_fast_math=true")
    with pytest.raises(BundleError, match=r"has xla_flags .*; this engine has .*'--xla_cpu_enable_fast_math=true'\]"):
        Bundle.open(bundle).check(runner._shapes, mesh)


def test_a_start_checks_a_bundle_once(bundle, monkeypatch):
    counts: Counter[pathlib.Path] = Counter()
    read_own = bundles.read_own

    def counted(path: pathlib.Path) -> bytes:
        counts[path] += 1
        return read_own(path)

    monkeypatch.setattr(bundles, "read_own", counted)
    ModelRunner(with_bundle(bundle))
    # Before anything is loaded, and the bytes that the runtime then takes.
    assert [counts[path] for path in sorted((bundle / "programs").iterdir())] == [2] * 12


def test_what_the_runtime_cannot_load_is_refused(copy):
    path = copy / "programs" / "forward_8"
    path.write_bytes(b"no executable")
    manifest = json.loads((copy / MANIFEST).read_text())
    entry = next(one for one in manifest["programs"] if one["file"] == "programs/forward_8")
    entry |= {"bytes": 13, "sha256": hashlib.sha256(b"no executable").hexdigest()}
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="a program forward 8 that the runtime cannot load"):
        ModelRunner(with_bundle(copy))


def test_a_configured_pool_must_be_the_bundles(bundle):
    config = with_bundle(bundle, dataclasses.replace(CONFIG, cache=CacheConfig(num_pages=32)))
    with pytest.raises(BundleError, match=r"has shapes\.num_pages 64; this engine has 32"):
        ModelRunner(config)


def test_a_directory_of_something_else_is_not_overwritten(tmp_path, bundle):
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs" / "precious").write_text("x")
    with pytest.raises(BundleError, match="holds files that are not a bundle's"):
        build(CONFIG, load_target("cpu"), tmp_path)
    assert (tmp_path / "programs" / "precious").read_text() == "x"


def test_an_unfinished_bundle_is_none(copy):
    shapes = ModelRunner(with_bundle(copy))._shapes
    target = load_target("cpu")
    BundleWriter(copy, shapes, target_mesh(target), target)
    with pytest.raises(BundleError, match="has no readable manifest"):
        ModelRunner(with_bundle(copy))
