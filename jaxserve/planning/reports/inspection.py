"""Inspects a compiled program without running it."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from typing import Any

import jax
from jax.sharding import Mesh

from jaxserve.pallas_kernels.paged_attention.triton.tuning import DecodeConfig
from jaxserve.planning.reports import cubin
from jaxserve.planning.reports.attention_traffic import Scenario, kernel_traffic
from jaxserve.planning.reports.container import contents
from jaxserve.planning.reports.thunks import Launch, Thunks
from jaxserve.planning.reports.traffic import Traffic, pool_copies, program_traffic
from jaxserve.programs.aot import hlo
from jaxserve.programs.compiler import ProgramMemory, program_memory
from jaxserve.programs.step_programs import ProgramKey, Shapes, abstract_arguments, abstract_pools, donated_arguments
from jaxserve.programs.target_devices import Target

DTYPES = {
    "bf16": "bfloat16",
    "f16": "float16",
    "f32": "float32",
    "f8e4m3fn": "float8_e4m3fn",
    "s8": "int8",
}
"""XLA's names of the dtypes for which a target states peak rates."""

MIN_GRAPH_LAUNCHES = 5
"""XLA makes no command buffer of fewer (its xla_gpu_graph_min_graph_size); only swaps launch so few kernels."""

_TRITON_FUSION = re.compile(r'"kind":"(__triton[^"]*)"')


@dataclasses.dataclass(frozen=True)
class KernelReport:
    """Describes a kernel as a program launches it.

    Attributes:
        launches: places in the program.
        pallas: whether it is one of ours, not XLA's.
        shared_memory_bytes: of a block, static and dynamic.

    The figures of the machine code are None for a kernel of the runtime.
    """

    name: str
    launches: int
    pallas: bool
    grid: tuple[int, ...]
    threads: tuple[int, ...]
    shared_memory_bytes: int
    registers: int | None
    spill_store_bytes: int | None
    spill_load_bytes: int | None


@dataclasses.dataclass(frozen=True)
class ProgramReport:
    """Describes one program; a program for the CPU has no kernels, command buffers or library calls.

    Attributes:
        seconds: to lower and compile, concurrently with the other programs.
        bytes_read: as `traffic.program_traffic` counts it for `Scenario.of`; so are bytes_written and flops (by dtype).
        roofline_seconds: the longer of both at the target's rates, 0 where it has none; `problems` names a dtype
            without a rate.
        donated_bytes: of all donated arguments, which alias_bytes must equal.
        pool_bytes: of the page pools alone.
        outside_command_buffers: launches outside of command buffers.
        library_calls: by XLA's name of the kind: cuBLASLt, copies.
    """

    kind: str
    size: int
    seconds: float
    serialized_bytes: int
    argument_bytes: int
    temp_bytes: int
    alias_bytes: int
    donated_bytes: int
    pool_bytes: int
    pool_copies: int
    command_buffers: int | None
    outside_command_buffers: int | None
    triton_matmuls: int
    library_calls: dict[str, int]
    kernels: tuple[KernelReport, ...]
    bytes_read: int
    bytes_written: int
    flops: dict[str, int]
    roofline_seconds: float

    def problems(self, target: Target) -> list[str]:
        """Returns the ways in which the program falls short of what every program must satisfy, one line each."""
        found = []
        for kernel in self.kernels:
            code = (kernel.registers, kernel.spill_store_bytes, kernel.spill_load_bytes)
            if kernel.pallas and None in code:
                found.append(f"machine code of kernel {kernel.name} was not found; whether it spills is not known")
            if kernel.spill_store_bytes or kernel.spill_load_bytes:
                found.append(
                    f"kernel {kernel.name} spills: {kernel.spill_store_bytes} bytes stored, "
                    f"{kernel.spill_load_bytes} loaded"
                )
            if kernel.shared_memory_bytes > target.shared_memory_per_block:
                found.append(
                    f"kernel {kernel.name} takes {kernel.shared_memory_bytes} bytes of shared memory; a block has "
                    f"{target.shared_memory_per_block}"
                )
        if self.triton_matmuls:
            found.append(f"{self.triton_matmuls} matrix products are Triton kernels that nobody tuned")
        few = self.command_buffers == 0 and (self.outside_command_buffers or 0) < MIN_GRAPH_LAUNCHES
        if (self.command_buffers not in (None, 1) or self.outside_command_buffers) and not few:
            found.append(
                f"{self.command_buffers} command buffers, {self.outside_command_buffers} launches in none; one should "
                "hold the whole program"
            )
        if self.alias_bytes != self.donated_bytes:
            found.append(f"{self.alias_bytes} bytes are aliased; {self.donated_bytes} are donated")
        if self.pool_copies:
            found.append(f"{self.pool_copies} instructions copy a page pool")
        found += [
            f"target {target.name} has no rate of {dtype}; roofline_seconds leaves {count} operations out"
            for dtype, count in self.flops.items()
            if target.peak_flops and dtype not in target.peak_flops
        ]
        return [f"{self.kind} {self.size}: {line}" for line in found]


@dataclasses.dataclass(frozen=True)
class Inspected:
    """Holds a program's report, the program itself for counts that depend on the context, and the memory that it
    needs.
    """

    report: ProgramReport
    module: hlo.Module
    memory: ProgramMemory


def inspect_program(
    key: ProgramKey,
    shapes: Shapes,
    mesh: Mesh,
    target: Target,
    compiled: jax.stages.Compiled,
    *,
    seconds: float,
    thunks: Thunks | None,
    context: int,
    decode_config: DecodeConfig,
) -> Inspected:
    """Inspects a program.

    Args:
        thunks: None for the CPU.
        context: positions of each row of a decode program.

    Raises:
        ValueError: the program or its machine code is in an unknown format.
    """
    text = compiled.as_text() or ""
    module = hlo.parse(text)
    executable: Any = compiled.runtime_executable()
    serialized = executable.serialize()
    memory = program_memory(compiled)
    analysis: Any = compiled.memory_analysis()
    arguments = abstract_arguments(key, shapes, mesh)
    pools = abstract_pools(shapes, mesh)
    traffic = program_traffic(module, kernel_traffic(Scenario.of(key.kind, key.size, context), decode_config))
    report = ProgramReport(
        kind=key.kind,
        size=key.size,
        seconds=seconds,
        serialized_bytes=len(serialized),
        argument_bytes=analysis.argument_size_in_bytes,
        temp_bytes=memory.temporaries,
        alias_bytes=memory.aliased,
        donated_bytes=sum(_bytes(arguments[number]) for number in donated_arguments(key)),
        pool_bytes=_bytes(pools) if key.uses_pools else 0,
        pool_copies=len(pool_copies(module, _array_shape(pools[0]))),
        command_buffers=None if thunks is None else thunks.command_buffers,
        outside_command_buffers=None if thunks is None else thunks.outside,
        triton_matmuls=triton_matmuls(module),
        library_calls={} if thunks is None else dict(sorted(thunks.others.items())),
        kernels=() if thunks is None else _kernels(thunks, serialized, module),
        bytes_read=traffic.read,
        bytes_written=traffic.written,
        flops={DTYPES.get(dtype, dtype): count for dtype, count in sorted(traffic.flops.items())},
        roofline_seconds=roofline_seconds(traffic, target),
    )
    return Inspected(report, module, memory)


def triton_matmuls(module: hlo.Module) -> int:
    """Counts the matmuls for which XLA generated Triton kernels; without a device to tune them on they are slow."""
    found = 0
    for _, one in module.executed():
        kind = _TRITON_FUSION.search(one.text) if one.opcode == "fusion" else None
        if kind is not None:
            body = module.computations[one.called[0]]
            found += "gemm" in kind[1] or any(inner.opcode == "dot" for inner in body.instructions.values())
    return found


def roofline_seconds(traffic: Traffic, target: Target) -> float:
    """Returns the longer of moving and computing at the target's rates; 0 where it has none.

    Operations of a dtype without a rate take no time here: `ProgramReport.problems` names them.
    """
    moving = traffic.bytes / target.memory_bandwidth if target.memory_bandwidth else 0.0
    computing = 0.0
    for dtype, count in traffic.flops.items():
        rate = target.peak_flops.get(DTYPES.get(dtype, dtype))
        computing += count / rate if rate else 0.0
    return max(moving, computing)


def _kernels(thunks: Thunks, serialized: bytes, module: hlo.Module) -> tuple[KernelReport, ...]:
    """Returns the kernels by name and launch dimensions, in program order."""
    codes: dict[str, cubin.KernelCode] = {}
    for code in cubin.kernels(contents(serialized)):
        known = codes.setdefault(code.name, code)
        if code.registers > known.registers or code.spill_store_bytes > known.spill_store_bytes:
            codes[code.name] = code
    ours = {one.kernel for _, one in module.executed() if one.kernel}
    counted: Counter[Launch] = thunks.launches
    return tuple(_kernel(launch, count, codes.get(launch.name), ours) for launch, count in counted.items())


def _kernel(launch: Launch, count: int, code: cubin.KernelCode | None, ours: set[str]) -> KernelReport:
    # XLA numbers the copies of a name: NAME, NAME_1, ...
    stem = launch.name.rstrip("0123456789").removesuffix("_")
    return KernelReport(
        name=launch.name,
        launches=count,
        pallas=launch.name in ours or stem in ours,
        grid=launch.grid,
        threads=launch.threads,
        shared_memory_bytes=launch.shared_memory_bytes + (code.static_shared_memory_bytes if code else 0),
        registers=code.registers if code else None,
        spill_store_bytes=code.spill_store_bytes if code else None,
        spill_load_bytes=code.spill_load_bytes if code else None,
    )


def _array_shape(leaf: jax.ShapeDtypeStruct) -> hlo.ArrayShape:
    """Returns one device's shard of an array, as a program's text writes it."""
    names = {name: xla for xla, name in DTYPES.items()} | {"uint8": "u8", "uint16": "u16", "int16": "s16"}
    assert leaf.sharding is not None
    return hlo.ArrayShape(names[leaf.dtype.name], leaf.sharding.shard_shape(leaf.shape))


def _bytes(tree: object) -> int:
    """Returns the bytes on one device."""
    leaves = jax.tree.leaves(tree)
    total = 0
    for leaf in leaves:
        size = leaf.dtype.itemsize
        for length in leaf.sharding.shard_shape(leaf.shape):
            size *= length
        total += size
    return total
