"""Compiles the closed set of programs ahead of time, and refuses anything outside it."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from jaxserve.programs.aot import plugin
from jaxserve.programs.step_programs import ProgramKey, Shapes, lower

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileMissError(RuntimeError):
    """A step requested a program that was not compiled at start."""


class CompilationCounter:
    """Counts the backend's compilations in this process, from any caller."""

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
    """Bytes that the compiler reports for a program: besides its arguments, aliased with them, and of code."""

    temporaries: int
    outputs: int
    aliased: int
    code: int

    @property
    def extra(self) -> int:
        """Bytes that the program uses while it runs, beyond arguments that exist anyway."""
        return self.temporaries + max(0, self.outputs - self.aliased)


@dataclasses.dataclass(frozen=True)
class ProgramSet:
    """Holds the programs by key, their memory, total wall seconds, and how many came from the compilation cache.

    missing: programs of the closed set that are not compiled yet. They join one by one, from another thread; the next
    larger program of their kind substitutes for them meanwhile.
    """

    executables: dict[ProgramKey, Any]
    memory: dict[ProgramKey, ProgramMemory]
    seconds: float
    num_cached: int = 0
    missing: set[ProgramKey] = dataclasses.field(default_factory=set)

    def join(self, key: ProgramKey, executable: Any, memory: ProgramMemory) -> None:
        """Adds a program that was missing; steps use it from now on."""
        self.memory[key] = memory
        self.executables[key] = executable
        self.missing.discard(key)

    def standing_in(self, key: ProgramKey) -> ProgramKey:
        """Returns the program to run for `key`: itself, or the next larger one of its kind while it is missing.

        Padding is larger then; nothing else differs.
        """
        if key not in self.missing:
            return key
        # A list is made at once; the dict itself may grow in another thread while it is walked.
        larger = [other for other in list(self.executables) if other.kind == key.kind and other.size > key.size]
        return min(larger, default=key)

    def get(self, key: ProgramKey) -> Callable[..., Any]:
        """Returns the executable of a program; CompileMissError where there is none."""
        executable = self.executables.get(key)
        if executable is None:
            known = sorted(other.size for other in self.executables if other.kind == key.kind)
            raise CompileMissError(
                f"no {key.kind} program of size {key.size} was compiled at start; compiled sizes are {known}"
            )
        return executable


@contextlib.contextmanager
def fresh_compilations() -> Iterator[None]:
    """Disables jax's cache of compiled programs in this process within the context.

    A program from the cache cannot be written to a bundle (serialized a second time it has lost its functions), and
    leaves no dump.
    """
    if not cache_in_use():
        yield
        return
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
    """Returns whether a compilation may be served from jax's cache of compiled programs."""
    config: Any = jax.config
    return bool(config.jax_enable_compilation_cache and config.jax_compilation_cache_dir)


def compiler_options(platform: str) -> dict[str, str | bool]:
    """Returns the options with which every program for `platform` ("cpu", "gpu") is compiled.

    On a GPU: no Triton matmuls, whose tiles are defaults without a device to tune them on (cuBLASLt instead), and loops
    (the sampler's bisections) join the step's one command buffer. No rematerialization: XLA takes a pool that fills the
    device for a lack of memory, and computes values twice to save a few bytes. On a machine without CUDA also the path
    of the assembler, which does not affect the program.

    On a CPU: no fusions computed by the library YNNPACK (XLA makes dots and sums over an axis into such by default),
    which sums a row in an order that depends on the number of rows.
    """
    if platform != "gpu":
        return {"xla_cpu_experimental_ynn_fusion_type": ""}
    toolkit = plugin.toolkit_directory()
    return {
        "xla_gpu_enable_triton_gemm": False,
        "xla_disable_hlo_passes": "rematerialization",
        "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,WHILE",
    } | ({} if toolkit is None else {plugin.TOOLKIT_OPTION: toolkit})


def compile_program(key: ProgramKey, shapes: Shapes, mesh: Mesh) -> jax.stages.Compiled:
    """Lowers and compiles one program as the server will run it."""
    return lower(key, shapes, mesh).compile(compiler_options(mesh.devices.flat[0].platform))


def program_memory(executable: jax.stages.Compiled) -> ProgramMemory:
    """Returns the compiler's memory analysis of a program.

    It reports no code size for a CPU: there it is the size of the serialized program. A program that was compiled for a
    target has no devices of its own.
    """
    analysis: Any = executable.memory_analysis()
    runtime: Any = executable.runtime_executable()
    code = analysis.generated_code_size_in_bytes
    if code == 0 and hasattr(runtime, "local_devices") and runtime.local_devices()[0].platform == "cpu":
        code = len(runtime.serialize())
    return ProgramMemory(
        temporaries=analysis.temp_size_in_bytes,
        outputs=analysis.output_size_in_bytes,
        aliased=analysis.alias_size_in_bytes,
        code=code,
    )
