"""What machine this is, and the two ceilings that everything else is compared with: bytes and operations a second."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu import device
from benchmarks.gpu.record import AbsentError, Record, Settings

_PACKAGES = ("jax", "nvidia", "torch", "triton", "flax", "numpy", "ml_dtypes", "matplotlib", "cupy")
_QUERY = (
    "name,driver_version,memory.total,memory.used,pcie.link.gen.current,clocks.sm,clocks.mem,clocks.max.sm,"
    "clocks.max.mem,power.limit,temperature.gpu,mig.mode.current,compute_mode"
)


def run(settings: Settings, record: Record) -> None:
    """Records the device, then copies of rising size, a read, and matrix products of each dtype."""
    record.summary |= describe()
    record.write()
    device.prepare(settings, record)
    for megabytes in sizes(settings):
        count = megabytes * 2**20 // 4
        record.case(f"copy {megabytes} MiB", lambda count=count: copy(count), bytes=2 * 4 * count)
    megabytes = sizes(settings)[-1]
    record.case(f"read {megabytes} MiB", lambda: read(megabytes * 2**20 // 4), bytes=megabytes * 2**20)
    side = 8192 if settings.gpu else 256
    for dtype in ("bfloat16", "float16", "int8", "float8_e4m3fn") if settings.gpu else ("bfloat16",):
        record.case(f"matmul {dtype} {side}", lambda dtype=dtype: matmul(side, dtype), flops=2 * side**3, dtype=dtype)
        ceilings(record)  # each time: the next product may take the compiler longer than there is time


def describe() -> dict[str, Any]:
    """Device, driver, versions and the settings that change what XLA does."""
    found = jax.devices()[0]
    packages = {
        name: one.version
        for one in importlib.metadata.distributions()
        if (name := str(one.metadata["Name"] or "").lower()).startswith(_PACKAGES)
    }
    return {
        "device": {
            "platform": found.platform,
            "kind": found.device_kind,
            "count": jax.device_count(),
            "compute_capability": getattr(found, "compute_capability", None),
            "multiprocessors": getattr(found, "core_count", None),
            "memory_stats": found.memory_stats(),
            "platform_version": found.client.platform_version,
        },
        "nvidia_smi": nvidia_smi(),
        "packages": dict(sorted(packages.items())),
        "environment": {
            name: value for name, value in os.environ.items() if name.startswith(("XLA_", "JAX_", "CUDA_", "NVIDIA_TF"))
        },
    }


def nvidia_smi() -> dict[str, str] | str:
    """What nvidia-smi says of the first GPU, read only; a sentence where it says nothing."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return "there is no nvidia-smi"
    try:
        done = subprocess.run(
            (command, f"--query-gpu={_QUERY}", "--format=csv,noheader", "--id=0"),
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi failed: {error}"
    return dict(zip(_QUERY.split(","), (part.strip() for part in done.stdout.split(",")), strict=False))


def sizes(settings: Settings) -> tuple[int, ...]:
    """MiB of the arrays copied: large enough that the cache plays no part, as far as memory allows."""
    if not settings.gpu:
        return (4, 16)
    most = device.device_memory() // 2**20 // 16
    return tuple(size for size in (256, 1024, 4096) if size <= most) or (64,)


def copy(count: int) -> dict[str, Any]:
    """A copy of `count` words by XLA's own copy and by an elementwise kernel; the faster one counts."""
    source = device.random_array(jax.random.key(0), (count,), jnp.int32)
    ways: dict[str, Callable[[jax.Array], jax.Array]] = {"copy": jnp.copy, "kernel": lambda x: x ^ 1}
    timings = {}
    for name, way in ways.items():
        program = device.compile_program(way, source)
        timings[name] = device.time_function(program, [(source,)], 1, most=device.most_launches(4 * count))
    best = min(timings, key=lambda name: timings[name].seconds)
    rates = {f"{name}_gb_per_s": 8 * count / timing.seconds / 1e9 for name, timing in timings.items()}
    return {**timings[best].fields(), "way": best, "gb_per_s": rates[f"{best}_gb_per_s"], **rates}


def read(count: int) -> dict[str, Any]:
    """The sum of `count` words: bytes a second when nothing is written."""
    source = device.random_array(jax.random.key(1), (count,), jnp.int32)
    timing = device.time_function(device.compile_program(jnp.sum, source), [(source,)], 1, most=50)
    return {**timing.fields(), "gb_per_s": 4 * count / timing.seconds / 1e9}


def matmul(side: int, dtype: str) -> dict[str, Any]:
    """A square product on random data (zeros would draw less power and run faster)."""
    kind = jnp.dtype(dtype)
    a, b = (device.random_array(jax.random.key(seed), (side, side), kind) for seed in (2, 3))
    result = jnp.int32 if kind == jnp.int8 else jnp.bfloat16 if kind.itemsize == 1 else kind

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=result)

    try:
        program = device.compile_program(product, a, b)
        timing = device.time_function(program, [(a, b)], 1, round_seconds=0.05, most=50)
    except jax.errors.JaxRuntimeError as error:
        if kind.itemsize > 1:
            raise
        raise AbsentError(f"{dtype} products do not run here: {str(error)[:200]}") from error
    return {**timing.fields(), "tflop_per_s": 2 * side**3 / timing.seconds / 1e12}


def ceilings(record: Record) -> None:
    """Puts the ceilings where the other parts find them."""
    copies = [case["gb_per_s"] for case in record.cases if case["case"].startswith("copy") and "gb_per_s" in case]
    products = {case["dtype"]: case["tflop_per_s"] for case in record.cases if "tflop_per_s" in case}
    record.summary["copy_bytes_per_s"] = copies[-1] * 1e9 if copies else None  # the largest: no cache plays a part
    record.summary["bf16_flop_per_s"] = products.get("bfloat16", 0) * 1e12 or None
    reads = [case["gb_per_s"] for case in record.cases if case["case"].startswith("read") and "gb_per_s" in case]
    record.summary["read_bytes_per_s"] = reads[0] * 1e9 if reads else None
