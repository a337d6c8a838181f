"""KV write and its fusion with the rotary embedding: bytes a second."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import device, paged
from benchmarks.gpu.counts import rotate_and_write_bytes, write_bytes
from benchmarks.gpu.decode_part import rates
from benchmarks.gpu.paged import Pool
from benchmarks.gpu.record import Record, Settings
from jaxserve.pallas_kernels.paged_attention import kv_write, rotate_and_write


def calls(settings: Settings) -> int:
    """Calls of a program."""
    return 16 if settings.gpu else 2


def run(settings: Settings, record: Record) -> None:
    """Both writes over step sizes from a small decode to a full prefill, into pools of each dtype."""
    name = device.prepare(settings, record)
    ceiling = device.copy_bandwidth(settings)
    record.summary |= {"implementation": name, "copy_bytes_per_s": ceiling}
    for pool_dtype in ("", "float8_e4m3fn", "int8") if settings.gpu else ("",):
        dtype = pool_dtype or paged.query_dtype(settings)
        make = functools.partial(paged.make_pool, settings, 64, dtype, 262_144 if settings.gpu else 2048)
        pool = [make()]
        for tokens in (64, 256, 2048, 8192) if settings.gpu else (8,):
            for kind, measure in (("kv_write", measure_write), ("rotate_and_write", measure_rotate)):
                if pool[0].pages.is_deleted():  # by a case that failed after it had donated them
                    pool[0] = make()
                record.case(
                    f"{kind} {tokens} tokens {pool_dtype}".rstrip(),
                    lambda pool=pool, tokens=tokens, measure=measure: measure(settings, pool, tokens, name, ceiling),
                    kind=kind,
                    tokens=tokens,
                    pool_dtype=pool_dtype,
                )


def slots(settings: Settings, pool: Pool, tokens: int) -> list[jax.Array]:
    """Slots of each call, int32 [T]: like those of many sequences, each in a page of its own where there are enough."""
    random = np.random.default_rng(settings.seed)
    total = pool.pages.shape[0] * pool.page_size
    if tokens <= pool.pages.shape[0] // 4:
        taken = [
            random.permutation(np.arange(1, pool.pages.shape[0]))[:tokens] * pool.page_size
            + random.integers(0, pool.page_size, tokens)
            for _ in range(calls(settings))
        ]
    else:
        starts = random.integers(pool.page_size, total - tokens, calls(settings))
        taken = [np.arange(start, start + tokens) for start in starts]
    return [jnp.asarray(one.astype(np.int32)) for one in taken]


def timed(
    settings: Settings, pool: list[Pool], program: Any, arguments: tuple[Any, ...], outputs: int = 1
) -> device.Timing:
    """Times a program that takes the pool's pages, donated, and returns them first; the pool holds the new ones.

    outputs: bytes of its other results.
    """
    held = pool[0]

    def launch() -> Any:
        results = program(held.pages, *arguments)
        held.pages = results[0]
        return results

    return device.time_launches(launch, calls(settings), most=device.most_launches(outputs))


def measure_write(
    settings: Settings, pool: list[Pool], tokens: int, name: str, ceiling: float | None
) -> dict[str, Any]:
    """`kv_write` of random keys and values."""
    one, dtype = pool[0], paged.query_dtype(settings)
    shape = (tokens, one.heads.kv_heads, one.heads.head_dim)
    k, v = (device.random_array(jax.random.key(seed), (calls(settings), *shape), dtype) for seed in (1, 2))

    @jax.jit
    def once(pages: jax.Array, k: jax.Array, v: jax.Array, mapping: jax.Array, more: Any) -> jax.Array:
        return kv_write(pages, k, v, mapping, implementation=name, **more)

    def write(pages: jax.Array, k: list[jax.Array], v: list[jax.Array], slots: list[jax.Array], more: Any) -> Any:
        for keys, values, mapping in zip(k, v, slots, strict=True):
            pages = once(pages, keys, values, mapping, more)
        return (pages,)

    arguments = (list(k), list(v), slots(settings, one, tokens), one.options)
    program = device.compile_program(write, one.pages, *arguments, donate=(0,))
    timing = timed(settings, pool, program, arguments)
    return rates(timing, write_bytes(one.heads, tokens, dtype.itemsize, one.itemsize), ceiling)


def measure_rotate(
    settings: Settings, pool: list[Pool], tokens: int, name: str, ceiling: float | None
) -> dict[str, Any]:
    """`rotate_and_write` of a random projection of the model's dtype, as a GPU's step makes it."""
    one, dtype = pool[0], paged.query_dtype(settings)
    heads = one.heads
    shape = (tokens, heads.kv_heads, heads.group + 2, heads.head_dim)
    qkv = device.random_array(jax.random.key(3), (calls(settings), *shape), dtype)
    angles = jax.random.uniform(jax.random.key(4), (tokens, heads.head_dim // 2), jnp.float32, 0, 6)

    @jax.jit
    def once(pages: jax.Array, qkv: jax.Array, cos: jax.Array, sin: jax.Array, mapping: jax.Array, more: Any) -> Any:
        return rotate_and_write(qkv, cos, sin, pages, mapping, dtype=dtype, implementation=name, **more)

    def rotate(
        pages: jax.Array, qkv: list[jax.Array], cos: jax.Array, sin: jax.Array, slots: list[jax.Array], more: Any
    ) -> Any:
        turned = []
        for projection, mapping in zip(qkv, slots, strict=True):
            q, pages = once(pages, projection, cos, sin, mapping, more)
            turned.append(q)
        return pages, turned

    arguments = (list(qkv), jnp.cos(angles), jnp.sin(angles), slots(settings, one, tokens), one.options)
    program = device.compile_program(rotate, one.pages, *arguments, donate=(0,))
    timing = timed(settings, pool, program, arguments, outputs=qkv.size * dtype.itemsize)
    moved = rotate_and_write_bytes(heads, tokens, dtype.itemsize, dtype.itemsize, one.itemsize)
    return rates(timing, moved, ceiling)
