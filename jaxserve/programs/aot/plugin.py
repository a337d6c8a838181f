"""Finds the CUDA plugin, which contains XLA's GPU compiler, on a machine that may have no GPU.

A GPU machine has it in its environment. A machine without one must not: jax would try to start it in every process and
fail loudly. `make gpu-compiler` installs it into a separate directory, which is searched only on demand.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import os
import pathlib
import pkgutil
import re
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence

import jax

DIRECTORY = "gpu-compiler"
"""Directory under sys.prefix into which `make gpu-compiler` installs."""

TOOLKIT_OPTION = "xla_gpu_cuda_data_dir"
"""Compiler option for the directory of CUDA's assembler and device library."""

_LOG_LEVEL = "TF_CPP_MIN_LOG_LEVEL"
_NOISE = re.compile(r"Could not find cuda drivers on your machine|before absl::InitializeLog\(\) is called")
_lock = threading.Lock()


class PluginMissingError(RuntimeError):
    """The CUDA plugin is not installed, or is of another version than jax; the text names the remedy."""


def use_cpu_only() -> None:
    """Keeps jax from starting the CUDA plugin as a backend: compiling for a device does not need it to be present.

    Has an effect only before the first use of a device in this process.
    """
    jax.config.update("jax_platforms", "cpu")


def find_plugin() -> tuple[str, str]:
    """Makes XLA's GPU compiler available to this process; returns its distribution's name and version.

    Raises PluginMissingError where there is none, or `make gpu-compiler` installed it for other versions.
    """
    with _lock:
        root = os.path.join(sys.prefix, DIRECTORY)
        module = _importable([place for place in sys.path if place != root])
        own = module is None
        if own:
            module = _importable([root])
        if module is None:
            raise PluginMissingError(
                f"compiling for a GPU needs the CUDA plugin of jax {jax.__version__}, which is neither installed nor "
                f"in {root}; run `make gpu-compiler` (0.7 GB, no CUDA needed)"
            )
        if own and root not in sys.path:
            quiet_compiler()
            sys.path.append(root)
            importlib.invalidate_caches()
        name = f"jax-{module.removeprefix('xla_')}-plugin"
        version = importlib.metadata.version(name)
        jaxlib = importlib.metadata.version("jaxlib")
        for other, found in (("jax", jax.__version__), ("jaxlib", jaxlib)):
            if own and version != found:  # jax's packages see to that in an environment of theirs
                raise PluginMissingError(
                    f"{name} in {root} has version {version}; {other} has {found}: all three must have one version; "
                    "run `make gpu-compiler`"
                )
        return name, version


def toolkit_directory() -> str | None:
    """Returns the directory of CUDA's assembler and device library from `make gpu-compiler`.

    Returns None where the plugin is one of jax's own environment, which finds its own. The directory is passed to the
    compiler as TOOLKIT_OPTION, so that no other CUDA of this machine takes part: registers and spills depend on the
    assembler's version.
    """
    root = pathlib.Path(sys.prefix) / DIRECTORY
    elsewhere = [place for place in sys.path if place != str(root)]
    if _importable(elsewhere) is not None:
        return None
    candidates = [root / "nvidia" / name for name in ("cu13", "cuda_nvcc")]
    return next((str(path) for path in candidates if (path / "nvvm" / "libdevice").is_dir()), None)


def assembler_version() -> str:
    """Returns the version of CUDA's assembler in `toolkit_directory`; "" where jax finds its own."""
    directory = toolkit_directory()
    if directory is None:
        return ""
    names = ("nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu12")
    found = importlib.metadata.distributions(path=[os.path.join(sys.prefix, DIRECTORY)])
    return next((one.version for one in found if one.metadata["Name"] in names), "")


def quiet_compiler() -> None:
    """Keeps the compiler's own log to what is fatal; its errors are raised as exceptions all the same.

    XLA warns of programs whose arguments fill most of the device, as every one of ours does. Has an effect only before
    the plugin is loaded. TF_CPP_MIN_LOG_LEVEL=0 in the environment, which asks for everything, is left alone.
    """
    if os.environ.get(_LOG_LEVEL) != "0":
        os.environ[_LOG_LEVEL] = "3"


def start_plugin(module: str) -> None:
    """Registers the plugin with jax, for a process whose jax looked for plugins before it was on the path."""
    with quiet_loading():
        importlib.import_module(f"jax_plugins.{module}").initialize()


def plugin_module(name: str) -> str:
    """Returns the module under jax_plugins of a distribution that `find_plugin` named."""
    return f"xla_{name.removeprefix('jax-').removesuffix('-plugin')}"


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Drops the log of the plugin's libraries about a missing GPU; all else still reaches standard error."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            for line in caught:
                if not _NOISE.search(line.decode(errors="replace")):
                    os.write(2, line)


def _importable(places: Sequence[str]) -> str | None:
    """Returns the newest xla_cuda* module under jax_plugins in directories of sys.path."""
    modules: list[str] = []
    for place in places:
        directory = pathlib.Path(place or ".") / "jax_plugins"
        if directory.is_dir():
            modules += [info.name for info in pkgutil.iter_modules([str(directory)])]
    return max((name for name in modules if name.startswith("xla_cuda")), default=None)
