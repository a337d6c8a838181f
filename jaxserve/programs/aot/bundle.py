"""Stores compiled programs in a directory, an AOT bundle, to be loaded by an engine of the same kind elsewhere.

    manifest.json        what the programs were compiled from, by and for; of each program its file and its arguments
    programs/KIND_SIZE   the runtime's own serialized executable

Loading verifies everything and names the difference when it refuses: an executable for other shapes, another version or
another device would at best fail and at worst compute something else. Nothing is unpickled, but an executable is
machine code all the same: a bundle is loaded only where no other user can have written it (see `trust`).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from jaxserve.config.settings import CacheConfig
from jaxserve.programs.aot import hlo, plugin
from jaxserve.programs.aot.loaded import LoadedProgram
from jaxserve.programs.aot.trust import UntrustedError, check_directory, read_own
from jaxserve.programs.compiler import ProgramMemory, ProgramSet, cache_in_use, compiler_options, program_memory
from jaxserve.programs.step_programs import (
    ProgramKey,
    Shapes,
    abstract_arguments,
    abstract_results,
    decisive_shapes,
    donated_arguments,
    program_keys,
)
from jaxserve.programs.target_devices import Target

T = TypeVar("T")

FORMAT = 1
MANIFEST = "manifest.json"
_PROGRAMS = "programs"
_ROOT = pathlib.Path(__file__).resolve().parents[2]
_SOURCES = (
    "config/*.py",
    "kv_cache/*.py",
    "logprob_columns.py",
    "models/**/*.py",
    "pallas_kernels/**/*.py",
    "pallas_kernels/**/*.json",
    "programs/*.py",
    "request.py",
    "sampling_params.py",
    "scheduler/**/*.py",
    "structured_outputs.py",
)
"""Files whose content determines what programs compute: all that `programs` imports."""


class BundleError(ValueError):
    """A bundle cannot be used here; the text names the bundle, the fault and the remedy."""

    @classmethod
    def of(cls, directory: object, text: str) -> BundleError:
        """Builds the error that `text` describes, for the bundle in `directory`."""
        return cls(f"bundle {directory} {text}; compile it anew with python -m jaxserve.compile")


def identity(shapes: Shapes, mesh: Mesh) -> dict[str, Any]:
    """Returns the properties that a process must share with the bundle that it loads, as JSON values."""
    device = mesh.devices.flat[0]
    name, version = plugin.find_plugin() if device.platform == "gpu" else ("", "")
    options = {key: value for key, value in compiler_options(device.platform).items() if key != plugin.TOOLKIT_OPTION}
    found = {
        "format": FORMAT,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "plugin": name,
        "plugin_version": version,
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": mesh.size,
        "compiler_options": options,
        "xla_flags": _xla_flags(),
        "sources_sha256": _sources_hash(),
        "shapes": dataclasses.asdict(decisive_shapes(shapes)),
    }
    return json.loads(json.dumps(found))


class BundleWriter:
    """Writes a bundle program by program; it becomes valid with `finish`."""

    def __init__(self, directory: pathlib.Path, shapes: Shapes, mesh: Mesh, target: Target):
        """Raises BundleError where `directory` holds something else than a bundle."""
        self._directory, self._shapes, self._mesh = directory, shapes, mesh
        self._programs: dict[ProgramKey, dict[str, Any]] = {}
        self._head = identity(shapes, mesh) | {
            "assembler": plugin.assembler_version() if mesh.devices.flat[0].platform == "gpu" else "",
            "target": {
                "name": target.name,
                "compute_capability": target.compute_capability,
                "description": target.text,
                "machine": machine() if target.is_local else {},
            },
        }
        # Whatever the umask says: what others may write to is not loaded.
        directory.mkdir(parents=True, exist_ok=True, mode=0o755)
        self._files.mkdir(exist_ok=True, mode=0o755)
        if any(self._files.iterdir()) and not (directory / MANIFEST).is_file():
            raise BundleError(f"directory {self._files} holds files that are not a bundle's; choose another one")
        (directory / MANIFEST).unlink(missing_ok=True)
        for file in self._files.iterdir():
            file.unlink()

    @property
    def _files(self) -> pathlib.Path:
        return self._directory / _PROGRAMS

    def add(self, key: ProgramKey, compiled: jax.stages.Compiled) -> int:
        """Writes one program, which must have been compiled within `fresh_compilations`; returns its bytes."""
        assert not cache_in_use(), "what comes from jax's cache cannot be serialized again"
        name = f"{key.kind}_{key.size}"
        executable: Any = compiled.runtime_executable()
        data = executable.serialize()
        _write(self._files / name, data)
        arguments, results = program_trees(key, self._shapes, self._mesh)
        flat = jax.tree.leaves(arguments)
        kept = _checked_arguments(compiled, flat)
        self._programs[key] = {
            "kind": key.kind,
            "size": key.size,
            "file": f"{_PROGRAMS}/{name}",
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "arguments": _describe(arguments),
            "results": _describe(results),
            "kept_arguments": kept,
            "donated_arguments": _donated(key, arguments),
            "memory": dataclasses.asdict(program_memory(compiled)),
        }
        return len(data)

    def finish(self) -> None:
        """Writes the manifest, without which the directory is no bundle."""
        keys = program_keys(self._shapes)
        manifest = self._head | {"programs": [self._programs[key] for key in keys]}
        partial = self._directory / f"{MANIFEST}.partial"
        _write(partial, (json.dumps(manifest, indent=1) + "\n").encode())
        partial.replace(self._directory / MANIFEST)


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Represents a bundle that was opened, not yet verified. manifest: as it is in the file."""

    directory: pathlib.Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, directory: str | pathlib.Path) -> Bundle:
        """Reads the manifest.

        Raises BundleError where there is none or it is no JSON object, and where another user may have written it (see
        `trust`).
        """
        root = pathlib.Path(directory).expanduser()
        try:
            for path in (root, root / _PROGRAMS):
                if path.is_dir():
                    _trusted(path, check_directory)
            manifest = json.loads(_trusted(root / MANIFEST, read_own))
        except OSError as error:
            raise BundleError.of(root, f"has no readable {MANIFEST}: {error.strerror}") from error
        except ValueError as error:
            raise BundleError.of(root, f"has a {MANIFEST} that is not valid JSON: {error}") from error
        if not isinstance(manifest, dict):
            raise BundleError.of(root, f"has a {MANIFEST} with a {type(manifest).__name__} instead of an object")
        return cls(root, manifest)

    @property
    def num_pages(self) -> int:
        """Returns the pages of the pool that the programs were compiled for.

        Raises BundleError where the manifest does not say.
        """
        return _field(_field(self.manifest, "shapes", dict, self.directory), "num_pages", int, self.directory)

    def check(self, shapes: Shapes, mesh: Mesh) -> None:
        """Raises BundleError where anything differs from what this process would compile, or a file is damaged."""
        for field, expected in identity(shapes, mesh).items():
            _same(field, expected, self.manifest.get(field), self.directory)
        if mesh.devices.flat[0].platform == "cpu":
            target = _field(self.manifest, "target", dict, self.directory)
            _check_machine(_field(target, "machine", dict, self.directory), self.directory)
        keys, listed = program_keys(shapes), self._entries()
        names = [[f"{key.kind} {key.size}" for key in sorted(some)] for some in (keys, listed)]
        _same("programs", names[0], names[1], self.directory)
        for key in keys:
            _check_entry(listed[key], key, shapes, mesh, self.directory)
            _read(self.directory, listed[key])

    def load(self, shapes: Shapes, mesh: Mesh, *, checked: bool = False) -> ProgramSet:
        """Loads the closed set of programs for `shapes`; nothing is compiled.

        Args:
            shapes: of the programs.
            mesh: whose devices run them.
            checked: the caller has called `check` with the same arguments; only the files are then verified again, as
                they are read.

        Raises:
            BundleError: as `check` raises it, or the runtime refuses a program.
        """
        start = time.perf_counter()
        if not checked:
            self.check(shapes, mesh)
        entries = self._entries()

        def one(key: ProgramKey) -> LoadedProgram:
            return _load(_read(self.directory, entries[key]), entries[key], key, shapes, mesh, self.directory)

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as workers:
            executables = dict(zip(entries, workers.map(one, entries), strict=True))
        memory = {key: _memory(entry, self.directory) for key, entry in entries.items()}
        return ProgramSet(executables, memory, time.perf_counter() - start)

    def _entries(self) -> dict[ProgramKey, dict[str, Any]]:
        root = self.directory
        listed = _field(self.manifest, "programs", list, root)
        return {
            ProgramKey(_field(entry, "kind", str, root), _field(entry, "size", int, root)): entry for entry in listed
        }


def bundled_cache(cache: CacheConfig, bundle: Bundle) -> CacheConfig:
    """Returns the page pool's settings with the bundle's number of pages, where the configuration sets none itself."""
    if cache.num_pages is not None or cache.kv_cache_memory_bytes is not None:
        return cache
    return dataclasses.replace(cache, num_pages=bundle.num_pages)


@functools.cache
def machine() -> dict[str, Any]:
    """Returns this machine's CPU: its architecture and the sorted extensions of its instruction set."""
    features: set[str] = set()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                features.update(value.split())
    return {"architecture": platform.machine(), "features": sorted(features)}


def _write(path: pathlib.Path, data: bytes) -> None:
    """Writes a file that its owner alone may write to."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
        file.write(data)


def _trusted(path: pathlib.Path, use: Callable[[pathlib.Path], T]) -> T:
    """Returns the result of `use`, a function of `trust`; raises BundleError where it does not trust the path."""
    try:
        return use(path)
    except UntrustedError as error:
        raise BundleError(
            f"bundle {path} {error}; its programs are machine code: if you trust where they come from, copy the bundle "
            "to a directory of your own"
        ) from error


def _read(root: pathlib.Path, entry: dict[str, Any]) -> bytes:
    name, size = _field(entry, "file", str, root), _field(entry, "bytes", int, root)
    digest = _field(entry, "sha256", str, root)
    path = root / name
    if pathlib.PurePath(name).parts[:-1] != (_PROGRAMS,):
        raise BundleError.of(root, f"names the file {name!r}; programs lie in {_PROGRAMS}/")
    try:
        data = _trusted(path, read_own)
    except OSError as error:
        raise BundleError.of(root, f"has a file {name} that cannot be read: {error.strerror}") from error
    if len(data) < size:
        raise BundleError.of(root, f"has {len(data)} bytes of {name}; the manifest says {size}: it is truncated")
    found = hashlib.sha256(data).hexdigest()
    if found != digest:
        raise BundleError.of(root, f"has {name} with the sha256 {found}; the manifest says {digest}: it was changed")
    return data


def _check_entry(entry: dict[str, Any], key: ProgramKey, shapes: Shapes, mesh: Mesh, directory: object) -> None:
    arguments, results = program_trees(key, shapes, mesh)
    where = f"{key.kind} {key.size}"
    donated = _donated(key, arguments)
    _same(f"{where} arguments", _describe(arguments), entry.get("arguments"), directory)
    _same(f"{where} results", _describe(results), entry.get("results"), directory)
    _same(f"{where} donated_arguments", donated, entry.get("donated_arguments"), directory)
    kept = _field(entry, "kept_arguments", list, directory)
    count = len(jax.tree.leaves(arguments))
    if not all(isinstance(number, int) and 0 <= number < count for number in kept) or not set(donated) <= set(kept):
        raise BundleError.of(directory, f"has {where} kept_arguments that do not fit its {count} arguments")
    _memory(entry, directory)


def _load(
    data: bytes, entry: dict[str, Any], key: ProgramKey, shapes: Shapes, mesh: Mesh, directory: object
) -> LoadedProgram:
    arguments, results = program_trees(key, shapes, mesh)
    try:
        executable = mesh.devices.flat[0].client.deserialize_executable(data, list(mesh.devices.flat))
    except Exception as error:  # whatever the runtime raises, the bundle is what it cannot use
        where = f"{key.kind} {key.size}"
        raise BundleError.of(directory, f"has a program {where} that the runtime cannot load: {error}") from error
    return LoadedProgram(executable, arguments, results, entry["kept_arguments"], mesh)


def _memory(entry: dict[str, Any], directory: object) -> ProgramMemory:
    memory = _field(entry, "memory", dict, directory)
    names = [field.name for field in dataclasses.fields(ProgramMemory)]
    return ProgramMemory(**{name: _field(memory, name, int, directory) for name in names})


def program_trees(key: ProgramKey, shapes: Shapes, mesh: Mesh) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Returns a program's arguments and results as trees of ShapeDtypeStructs."""
    return abstract_arguments(key, shapes, mesh), abstract_results(key, shapes, mesh)


def _describe(tree: object) -> list[list[Any]]:
    """Returns the path in the tree, dtype and shape of every array, in order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [[jax.tree_util.keystr(path), str(leaf.dtype), list(leaf.shape)] for path, leaf in leaves]


def _donated(key: ProgramKey, arguments: tuple[Any, ...]) -> list[int]:
    """Returns the flat indices of the donated arguments."""
    numbers = []
    first = 0
    for number, argument in enumerate(arguments):
        count = len(jax.tree.leaves(argument))
        if number in donated_arguments(key):
            numbers += range(first, first + count)
        first += count
    return numbers


def kept_arguments(compiled: Any) -> list[int]:
    """Returns the flat indices of the arguments that the executable takes, in its order."""
    return sorted(compiled._executable._kept_var_idx)  # jax has no public name for it


def _checked_arguments(compiled: Any, flat: list[jax.ShapeDtypeStruct]) -> list[int]:
    """Returns `kept_arguments`, checked against the program's own parameters."""
    kept = kept_arguments(compiled)
    parameters = [one.shapes[0].dims for one in hlo.parse(compiled.as_text()).entry.parameters()]
    shapes = [leaf.sharding.shard_shape(leaf.shape) for leaf in (flat[number] for number in kept)]
    assert parameters == shapes, (parameters, shapes)
    return kept


def _check_machine(found: dict[str, Any], directory: object) -> None:
    here = machine()
    _same("target.machine.architecture", here["architecture"], found.get("architecture"), directory)
    missing = sorted(set(_field(found, "features", list, directory)) - set(here["features"]))
    if missing:
        raise BundleError.of(directory, f"was compiled for a CPU with {', '.join(missing)}, which this one lacks")


def _field(record: Any, name: str, kind: type, directory: object) -> Any:
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BundleError.of(directory, f"has a {MANIFEST} with {name} {value!r}; it must be a {kind.__name__}")
    return value


def _same(field: str, expected: Any, found: Any, directory: object) -> None:
    """Raises BundleError that names the innermost difference."""
    if expected == found:
        return
    if isinstance(expected, dict) and isinstance(found, dict):
        for name in (*expected, *sorted(set(found) - set(expected))):
            _same(f"{field}.{name}", expected.get(name), found.get(name), directory)
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for number, (one, other) in enumerate(zip(expected, found, strict=True)):
            _same(f"{field}[{number}]", one, other, directory)
    raise BundleError.of(directory, f"has {field} {found!r}; this engine has {expected!r}")


def _xla_flags() -> list[str]:
    """Returns the flags of the environment's XLA_FLAGS in their order, without those that only configure dumps."""
    return [flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith("--xla_dump")]


def source_files() -> list[pathlib.Path]:
    """Returns the files whose content determines what programs compute."""
    return sorted({path for pattern in _SOURCES for path in _ROOT.glob(pattern)})


@functools.cache  # what this process has imported does not change with the files
def _sources_hash() -> str:
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
