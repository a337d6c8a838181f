"""What the parts that use jax share: the implementation under test, random inputs made on the device, and time.

How a time is taken. One compiled program holds several calls, each on inputs of its own that together are larger than
the cache, so that no call finds the last one's data there and the gaps between launches stay small, as in a step of a
model. The program is launched many times without waiting in between and waited for once; that is one round. A time is
the median of the rounds over launches and calls; the first launches are discarded.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu.record import Record, Settings
from jaxserve.pallas_kernels.paged_attention import IMPLEMENTATIONS, choose
from jaxserve.programs.compiler import compiler_options

CACHE_BYTES = 64 * 2**20
"""No less than the level-2 cache of the GPUs this runs on (H100 and H200: 50 MB; A100: 40; L4: 48)."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call: median, best and worst of the rounds; `launches` in a round, `calls` in a launch."""

    seconds: float
    best: float
    worst: float
    rounds: int
    launches: int
    calls: int

    def fields(self) -> dict[str, Any]:
        """As a case keeps them."""
        return {
            "microseconds": self.seconds * 1e6,
            "microseconds_best": self.best * 1e6,
            "microseconds_worst": self.worst * 1e6,
            "timing": {"rounds": self.rounds, "launches": self.launches, "calls": self.calls},
        }


def prepare(settings: Settings, record: Record) -> str:
    """Sets the device up for a part and returns the name of the implementation under test.

    RuntimeError where jax finds no GPU though the suite runs in GPU mode.
    """
    platform = jax.devices()[0].platform
    if settings.gpu and platform != "gpu":
        raise RuntimeError(f"jax found no GPU in this process: its platform is {platform!r}")
    record.after_failure(recover)
    return implementation(settings)


def implementation(settings: Settings) -> str:
    """The implementation that the command line names, else the platform's own; on a CPU the kernels are interpreted."""
    wanted = settings.implementation
    if wanted == "auto" and not settings.gpu and "triton_interpret" in IMPLEMENTATIONS:
        wanted = "triton_interpret"
    return choose(jax.devices()[0].platform, wanted)


def recover() -> bool:
    """Frees what a failed case left; False where the device does not work any more."""
    gc.collect()
    try:
        return int(jax.jit(lambda x: x + 1)(jnp.int32(41))) == 42
    except Exception as error:
        print(f"the device fails: {type(error).__name__}: {error}", flush=True)
        return False


def compile_program(function: Callable[..., Any], *arguments: Any, donate: Sequence[int] = ()) -> Any:
    """The function compiled for these arguments (arrays or ShapeDtypeStructs), with the engine's own options.

    With XLA's defaults a matrix product of one-byte values is tried as dozens of Triton kernels, which takes minutes.
    """
    lowered = jax.jit(function, donate_argnums=tuple(donate)).lower(*arguments)
    return lowered.compile(compiler_options(jax.default_backend()))


def time_launches(
    launch: Callable[[], Any], calls: int, *, round_seconds: float = 0.02, rounds: int = 7, most: int = 200
) -> Timing:
    """Times `launch`, which starts `calls` calls and returns arrays that are ready when those are done."""
    jax.block_until_ready(launch())
    jax.block_until_ready(launch())
    start = time.perf_counter()
    jax.block_until_ready(launch())
    once = time.perf_counter() - start
    launches = max(1, min(most, round(round_seconds / max(once, 1e-6))))
    rounds = rounds if once * launches * rounds < 10 * round_seconds * rounds else 3
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        done: Any = None
        for _ in range(launches):
            done = launch()
        jax.block_until_ready(done)
        seconds.append((time.perf_counter() - start) / (launches * calls))
    return Timing(statistics.median(seconds), min(seconds), max(seconds), rounds, launches, calls)


def time_function(function: Callable[..., Any], sets: Sequence[Sequence[Any]], calls: int, **options: Any) -> Timing:
    """Times a compiled program that takes one set of arguments after another in turn."""
    turn = itertools.cycle(sets)
    return time_launches(lambda: function(*next(turn)), calls, **options)


def random_array(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal values on the device; for integers, uniform over their range.

    Made in blocks of the first axis, so that large arrays need little memory beside themselves.
    """
    return _drawing(tuple(shape), jnp.dtype(dtype))(key)


@functools.lru_cache(maxsize=64)
def _drawing(shape: tuple[int, ...], dtype: Any) -> Any:
    blocks = next((count for count in (64, 32, 16, 8, 4, 2) if shape[0] % count == 0), 1)

    def block(key: jax.Array) -> jax.Array:
        size = (shape[0] // blocks, *shape[1:])
        if jnp.issubdtype(dtype, jnp.integer):
            info = jnp.iinfo(dtype)
            return jax.random.randint(key, size, max(info.min, -127), info.max, jnp.int32).astype(dtype)
        narrow = jnp.bfloat16 if dtype.itemsize < 4 else dtype
        return jax.random.normal(key, size, narrow).astype(dtype)

    return jax.jit(lambda key: jax.lax.map(block, jax.random.split(key, blocks)).reshape(shape))


def page_tables(count: int, rows: int, pages_a_row: int, num_pages: int, seed: int) -> list[np.ndarray]:
    """Page tables int32 [rows, pages_a_row] over pages 1 to num_pages - 1 in random order.

    Each goes on in the order where the last one ended, so a page comes again only after all others.
    """
    order = np.random.default_rng(seed).permutation(num_pages - 1).astype(np.int32) + 1
    wanted = rows * pages_a_row
    places = np.arange(count * wanted, dtype=np.int64) % order.size
    return list(order[places].reshape(count, rows, pages_a_row))


def device_memory() -> int:
    """Bytes that this process may allocate on the device."""
    stats = jax.devices()[0].memory_stats() or {}
    return int(stats.get("bytes_limit", 2**32))


def most_launches(output_bytes: int) -> int:
    """How many launches may be under way at once when the memory of each one's outputs is only free after it."""
    return max(2, min(50, device_memory() // 3 // output_bytes))


def poison(shape: tuple[int, ...], dtype: Any) -> None:
    """Leaves NaN (or the largest integer) in freed memory of this size, where the next such output most likely lies."""
    dtype = jnp.dtype(dtype)
    value = jnp.nan if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).max
    jnp.full(shape, value, dtype).block_until_ready().delete()


def copy_bandwidth(settings: Settings) -> float | None:
    """Bytes a second that the environment part measured for a large copy, read and written bytes both counted."""
    return settings.load("environment").get("summary", {}).get("copy_bytes_per_s")


def matmul_rate(settings: Settings) -> float | None:
    """FLOP a second that the environment part measured for a large bf16 matrix product."""
    return settings.load("environment").get("summary", {}).get("bf16_flop_per_s")
