"""Compiling the closed set of programs ahead of time, and refusing anything outside it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh
from tqdm import tqdm

from jaxserve.runner.aot import plugin
from jaxserve.runner.programs import ProgramKey, Shapes, lower, program_keys

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileMissError(RuntimeError):
    """A step asked for a program that was not compiled at start."""


class CompilationCounter:
    """Counts what the backend compiles in this process, whoever asks for it."""

    def __init__(self) -> None:
        self.count = 0
        self._lock = threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILE_EVENT:
            with self._lock:
                self.count += 1


@dataclasses.dataclass(frozen=True)
class ProgramMemory:
    """Bytes that the compiler says a program needs: beside its arguments, aliased with them, and of code."""

    temporaries: int
    outputs: int
    aliased: int
    code: int

    @property
    def extra(self) -> int:
        """Bytes while it runs beyond arguments that exist anyway."""
        return self.temporaries + max(0, self.outputs - self.aliased)


@dataclasses.dataclass(frozen=True)
class ProgramSet:
    """The programs by key, compiled or loaded from a bundle, what each needs, and the wall seconds they all took."""

    executables: dict[ProgramKey, Any]
    memory: dict[ProgramKey, ProgramMemory]
    seconds: float

    def get(self, key: ProgramKey) -> Callable[..., Any]:
        """The executable of a program; CompileMissError where there is none."""
        executable = self.executables.get(key)
        if executable is None:
            known = sorted(other.size for other in self.executables if other.kind == key.kind)
            raise CompileMissError(
                f"no {key.kind} program of size {key.size} was compiled at start; compiled sizes are {known}"
            )
        return executable


def keep_compilations(directory: str) -> None:
    """Keeps compiled programs in `directory` and takes them from there, whatever they cost to compile."""
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@contextlib.contextmanager
def fresh_compilations() -> Iterator[None]:
    """Keeps jax's cache of compiled programs out of this process meanwhile.

    What comes from the cache cannot be written to a bundle (serialised a second time it has lost its functions), and
    leaves no dump.
    """
    config: Any = jax.config
    before = config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # jax asks once a process whether there is a cache
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        compilation_cache.reset_cache()


def cache_in_use() -> bool:
    """Whether a compilation may be served from jax's cache of compiled programs."""
    config: Any = jax.config
    return bool(config.jax_enable_compilation_cache and config.jax_compilation_cache_dir)


def compiler_options(platform: str) -> dict[str, str | bool]:
    """Options that every program for `platform` ("cpu", "gpu") is compiled with, whoever compiles it.

    On a GPU: no Triton matmuls, whose tiles are defaults where no device was there to tune them (cuBLASLt instead), and
    loops (the sampler's bisections) join the step's one command buffer. No rematerialisation: XLA takes a pool that
    fills the device for a lack of memory, and computes values twice to save a few bytes. On a machine without CUDA also
    where the assembler is, which says nothing about the program.
    """
    if platform != "gpu":
        return {}
    toolkit = plugin.toolkit_directory()
    return {
        "xla_gpu_enable_triton_gemm": False,
        "xla_disable_hlo_passes": "rematerialization",
        "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,WHILE",
    } | ({} if toolkit is None else {plugin.TOOLKIT_OPTION: toolkit})


def compile_program(key: ProgramKey, shapes: Shapes, mesh: Mesh) -> jax.stages.Compiled:
    """Lowers and compiles one program as the server will run it."""
    return lower(key, shapes, mesh).compile(compiler_options(mesh.devices.flat[0].platform))


def compile_all(shapes: Shapes, mesh: Mesh, *, progress: bool) -> ProgramSet:
    """Compiles every program of the closed set, several at once; `progress` shows a bar on standard error."""
    start = time.perf_counter()
    keys = program_keys(shapes)
    executables: dict[ProgramKey, jax.stages.Compiled] = {}
    with (
        concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as workers,
        tqdm(total=len(keys), desc="compiling", unit="program", disable=not progress) as bar,
    ):
        futures = {workers.submit(compile_program, key, shapes, mesh): key for key in keys}
        for future in concurrent.futures.as_completed(futures):
            executables[futures[future]] = future.result()
            bar.update()
    memory = {key: program_memory(executable) for key, executable in executables.items()}
    return ProgramSet(executables, memory, time.perf_counter() - start)


def program_memory(executable: jax.stages.Compiled) -> ProgramMemory:
    """What the compiler's memory analysis says of a program."""
    analysis: Any = executable.memory_analysis()
    return ProgramMemory(
        temporaries=analysis.temp_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        aliased=analysis.alias_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
    )
