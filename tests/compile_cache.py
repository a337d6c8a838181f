"""Compiled programs that the processes of a run share, and keep for the next run on the same jax and CPU.

    ~/.cache/jaxserve-tests/JAX-CPU     (XDG_CACHE_HOME instead of ~/.cache where it is set)
        jax/                            entries of jax's own cache: whatever a test compiles by `jax.jit`
        jaxserve/programs/              entries of the engine's cache: XDG_CACHE_HOME of every engine under test

The engine's cache writes an entry as a whole and verifies what it reads. jax's does neither: another process may read a
part of what is still being written. So the processes of pytest write by renaming (`write_whole_entries`), and
their children (servers, engines, scripts) only read.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import pathlib
import stat
import tempfile
import threading

MAX_BYTES = 10**9
"""Of all entries of all versions together; the oldest go first."""


def use(worker: str) -> tempfile.TemporaryDirectory[str] | None:
    """Points this process and its children to the folder, before any of them imports jax.

    Args:
        worker: name of this worker of pytest-xdist, which inherits the folder; empty in the process that starts them.

    Returns: a temporary folder, to be held as long as the run lasts, where the user's own cannot be written to.
    """
    held = None
    if not worker:
        base = os.environ.get("XDG_CACHE_HOME", "")
        root = pathlib.Path(base if os.path.isabs(base) else "~/.cache").expanduser() / "jaxserve-tests"
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            prune(root, MAX_BYTES)
            folder = root / _key()
            folder.mkdir(exist_ok=True, mode=0o700)
        except OSError:
            held = tempfile.TemporaryDirectory(prefix="jaxserve-tests-")
            folder = pathlib.Path(held.name)
        os.environ["XDG_CACHE_HOME"] = str(folder)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(os.environ["XDG_CACHE_HOME"], "jax")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "inf"  # nothing is written
    return held


def write_whole_entries() -> None:
    """Has this process, which has imported jax, add to jax's cache, each entry by renaming it to its place."""
    import jax
    from jax._src import lru_cache

    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    lru_cache.LRUCache.put = put


def put(cache, key: str, value: bytes) -> None:
    """Stands for `put` of jax's cache."""
    place = cache.path / f"{key}-cache"
    partial = cache.path / f"{key}.{os.getpid()}.{threading.get_ident()}.partial"
    partial.write_bytes(value)
    os.replace(partial, place)


def prune(root: pathlib.Path, max_bytes: int) -> None:
    """Removes the oldest files below `root` until the rest has at most `max_bytes`."""
    found = []
    for entry in root.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # another run has renamed or removed it
            status = entry.stat()
            if stat.S_ISREG(status.st_mode):
                found.append((status.st_mtime, status.st_size, entry))
    excess = sum(size for _, size, _ in found) - max_bytes
    for _, size, entry in sorted(found):
        if excess <= 0:
            return
        entry.unlink(missing_ok=True)
        excess -= size


def _key() -> str:
    """What a compiled program depends on beside what jax's own key of an entry holds.

    XLA divides a CPU program's work among the cores that it finds when it compiles.
    """
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    flags = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    options = os.environ.get("XLA_FLAGS", "")
    cpu = hashlib.sha256(repr((os.uname().machine, flags, cores, options)).encode()).hexdigest()[:12]
    return f"{importlib.metadata.version('jax')}-{importlib.metadata.version('jaxlib')}-{cpu}"
