"""Compiled programs kept between starts, in a directory that belongs to this user alone.

    NAME.program     NAME: hash of all that decides what the program is
                     32 bytes: SHA-256 of the rest; one line of JSON: what it is; the runtime's serialized executable

An entry is written beside its place and renamed, so that it is there as a whole or not at all, and verified before the
runtime sees it: one that was damaged is thrown away and compiled anew. jax's own cache does neither, and needs every
program traced and lowered before it can be found, which for a large model takes as long as loading it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import tempfile
import time
from typing import Any

import jax
from jax.sharding import Mesh

from jaxserve.programs.aot.bundle import identity, kept_arguments, machine, program_trees
from jaxserve.programs.aot.loaded import LoadedProgram
from jaxserve.programs.aot.trust import UntrustedError, check_directory, read_own
from jaxserve.programs.compiler import ProgramMemory, program_memory
from jaxserve.programs.step_programs import ProgramKey, Shapes, program_shapes

FORMAT = 1
SUFFIX = ".program"
_PARTIAL = ".partial"
_PARTIAL_SECONDS = 3600.0  # a start that writes an entry for longer has died
_DIGEST_BYTES = hashlib.sha256().digest_size
_HARMLESS_OPTIONS = (
    "jax_compilation_cache",
    "jax_enable_compilation_cache",
    "jax_persistent_cache",
    "jax_raise_persistent_cache_errors",
    "jax_pjrt_client_create_options",
    "jax_platforms",
    "jax_log",
    "jax_logging",
    "jax_debug_log",
    "jax_explain",
    "jax_traceback",
    "jax_include_full_tracebacks",
    "jax_dump",
)
"""Beginnings of the names of jax's options that say nothing about what a program computes."""

_log = logging.getLogger(__name__)


class CacheRefusedError(ValueError):
    """A directory in which compiled programs cannot be kept safely; the text names it, the reason and the remedy."""


def default_directory() -> pathlib.Path:
    """Where this user's compiled programs are kept: XDG_CACHE_HOME, else ~/.cache, and in it jaxserve/programs.

    Raises CacheRefusedError where the user has no home directory.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):  # a relative one is to be ignored, says the XDG base directory specification
        base = os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(base):
        raise CacheRefusedError("compilation cache has no place: this user has no home directory")
    return pathlib.Path(base, "jaxserve", "programs")


@dataclasses.dataclass(frozen=True)
class ProgramCache:
    """The entries in one directory, for the devices of one mesh. max_bytes: of all entries together.

    Safe for several threads and several processes at once.
    """

    directory: pathlib.Path
    max_bytes: int
    mesh: Mesh

    @classmethod
    def open(cls, directory: str | pathlib.Path, max_bytes: int, mesh: Mesh) -> ProgramCache:
        """Makes the directory if need be, for this user alone.

        Raises CacheRefusedError where it cannot be used, or somebody else may put programs there (see `trust`).
        """
        path = pathlib.Path(directory).expanduser()
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            check_directory(path)
        except OSError as error:
            raise CacheRefusedError(f"compilation cache {path} cannot be made: {error.strerror}") from error
        except UntrustedError as error:
            raise CacheRefusedError(
                f"compilation cache {path} {error}; set EngineConfig.compilation_cache_dir to a directory of your own"
            ) from error
        return cls(path, max_bytes, mesh)

    def load(self, key: ProgramKey, shapes: Shapes) -> tuple[LoadedProgram, ProgramMemory] | None:
        """The program, verified and loaded; None where it is not there or cannot be used, which is logged."""
        what = self._identity(key, shapes)
        path = self._path(what)
        try:
            content = read_own(path)
        except FileNotFoundError:
            return None
        except (OSError, UntrustedError) as error:
            _log.warning("compilation cache entry %s is not used: it %s", path, error)
            return None
        try:
            head, data = _verified(content, what)
            device = self.mesh.devices.flat[0]
            executable = device.client.deserialize_executable(data, list(self.mesh.devices.flat))
            arguments, results = program_trees(key, shapes, self.mesh)
            program = LoadedProgram(executable, arguments, results, head["kept_arguments"], self.mesh)
            memory = ProgramMemory(**head["memory"])
        except Exception as error:  # whatever is wrong with it, the program can be compiled
            _log.warning("compilation cache entry %s is thrown away: %s", path, " ".join(str(error).split()))
            path.unlink(missing_ok=True)
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the least recently used entries go first
        return program, memory

    def keep(self, key: ProgramKey, shapes: Shapes, compiled: jax.stages.Compiled) -> None:
        """Keeps a program, which must have been compiled within `fresh_compilations`; what prevents it is logged."""
        what = self._identity(key, shapes)
        executable: Any = compiled.runtime_executable()
        head = {
            "identity": what,
            "kept_arguments": kept_arguments(compiled),
            "memory": dataclasses.asdict(program_memory(compiled)),
        }
        rest = json.dumps(head).encode() + b"\n" + executable.serialize()
        try:
            handle, partial = tempfile.mkstemp(suffix=_PARTIAL, dir=self.directory)  # readable for its owner alone
            try:
                with open(handle, "wb") as file:
                    file.write(hashlib.sha256(rest).digest() + rest)
                os.replace(partial, self._path(what))
            except BaseException:
                os.unlink(partial)
                raise
        except OSError as error:
            _log.warning("%s %d is not kept in the compilation cache: %s", key.kind, key.size, error)

    def prune(self) -> None:
        """Removes the entries that were not used for longest, until the rest has at most `max_bytes`."""
        found: list[tuple[float, int, pathlib.Path]] = []
        now = time.time()
        for path in self.directory.iterdir():
            with contextlib.suppress(OSError):  # another process may have removed it
                status = path.stat()
                if path.suffix == SUFFIX:
                    found.append((status.st_mtime, status.st_size, path))
                elif path.suffix == _PARTIAL and now - status.st_mtime > _PARTIAL_SECONDS:
                    path.unlink()
        excess = sum(size for _, size, _ in found) - self.max_bytes
        for _, size, path in sorted(found):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size

    def _path(self, what: dict[str, Any]) -> pathlib.Path:
        return self.directory / (hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest() + SUFFIX)

    def _identity(self, key: ProgramKey, shapes: Shapes) -> dict[str, Any]:
        """All that decides what the program is."""
        shapes = program_shapes(key, shapes)
        local = self.mesh.devices.flat[0].platform == "cpu"
        return identity(shapes, self.mesh) | {
            "entry_format": FORMAT,
            "program": [key.kind, key.size],
            # XLA divides a CPU program's work among the cores that it finds when it compiles.
            "machine": machine() | {"cores": _cores()} if local else {},
            "jax_options": _jax_options(),
        }


def _verified(content: bytes, what: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    """The head and the executable of an entry. Raises ValueError where it was damaged, or is another program's."""
    digest, rest = content[:_DIGEST_BYTES], memoryview(content)[_DIGEST_BYTES:]
    if hashlib.sha256(rest).digest() != digest:
        raise ValueError("it was damaged")
    line, _, data = rest.tobytes().partition(b"\n")
    head = json.loads(line)
    if head["identity"] != what:
        raise ValueError("it holds another program")
    return head, data


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _jax_options() -> dict[str, Any]:
    """jax's options that may decide what a program computes, as JSON holds them."""
    values: dict[str, Any] = jax.config.values
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in sorted(values.items())
        if not name.startswith(_HARMLESS_OPTIONS)
    }
