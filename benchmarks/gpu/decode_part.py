"""Decode attention: bytes a second, and their share of what a copy moves, over batch, context, page size and dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.gpu import device, paged
from benchmarks.gpu.counts import attention_bytes
from benchmarks.gpu.paged import Calls, Pool
from benchmarks.gpu.record import Record, Settings
from jaxserve.pallas_kernels.paged_attention import paged_attention


@dataclasses.dataclass(frozen=True)
class Shape:
    """A batch of rows with `context` positions each; `ragged`: lengths uniform from 1 to twice that."""

    batch: int
    context: int
    page_size: int = 64
    pool_dtype: str = ""
    ragged: bool = False

    @property
    def label(self) -> str:
        extra = f" {self.pool_dtype}" * bool(self.pool_dtype) + " ragged" * self.ragged
        return f"batch {self.batch} context {self.context} page {self.page_size}{extra}"

    def rows(self, seed: int) -> list[tuple[int, int]]:
        """(1, length) of each row."""
        if not self.ragged:
            return [(1, self.context)] * self.batch
        lengths = np.random.default_rng(seed).integers(1, 2 * self.context, self.batch)
        return [(1, int(length)) for length in lengths]


def run(settings: Settings, record: Record) -> None:
    """One case a shape; a pool is kept for all shapes of a page size and dtype."""
    name = device.prepare(settings, record)
    ceiling = device.copy_bandwidth(settings)
    record.summary |= {"implementation": name, "method": device.__doc__, "copy_bytes_per_s": ceiling}
    kept: dict[tuple[int, str], Pool] = {}

    def pool(shape: Shape) -> Pool:
        wanted = (shape.page_size, shape.pool_dtype)
        if wanted not in kept:
            kept.clear()  # one at a time
            dtype = shape.pool_dtype or paged.query_dtype(settings)
            kept[wanted] = paged.make_pool(settings, shape.page_size, dtype)
        return kept[wanted]

    for shape in shapes(settings):
        record.case(
            shape.label,
            lambda shape=shape: measure(settings, shape, pool(shape), name, ceiling),
            **dataclasses.asdict(shape),
        )


def shapes(settings: Settings) -> Iterator[Shape]:
    """The grid, the most telling shapes first."""
    if not settings.gpu:
        yield from (Shape(1, 64, 16), Shape(4, 64, 16), Shape(4, 128), Shape(4, 64, 16, ragged=True))
        return
    for context in (2048, 8192, 512, 32768, 131072):
        yield from (Shape(batch, context) for batch in (64, 1, 256, 8))
    for ragged in ((64, 4096), (256, 1024)):
        yield Shape(*ragged, ragged=True)
    for context in (2048, 8192, 131072):
        yield from (Shape(batch, context, page_size=16) for batch in (1, 64, 256))
    for pool_dtype in ("float8_e4m3fn", "int8"):
        yield from (Shape(batch, 8192, pool_dtype=pool_dtype) for batch in (8, 64))
    for context in (2048, 512, 8192, 32768, 131072):
        yield from (Shape(batch, context) for batch in (16, 128, 32, 4))


def measure(settings: Settings, shape: Shape, pool: Pool, name: str, ceiling: float | None) -> dict[str, Any]:
    """Time of one call, bytes a second, share of a copy's."""
    rows = shape.rows(settings.seed)
    calls = paged.make_calls(settings, pool, rows)
    q = paged.queries(pool, shape.batch, paged.query_dtype(settings), settings.seed)
    sets = argument_sets(q, pool, calls)
    program = device.compile_program(chain(pool, name), *sets[0])
    timing = device.time_function(program, sets, calls.count)
    moved = attention_bytes(pool.heads, rows, q.dtype.itemsize, pool.itemsize)
    return rates(timing, moved, ceiling) | paged.check_finite(program(*sets[0]))


def argument_sets(q: Any, pool: Pool, calls: Calls) -> list[tuple[Any, ...]]:
    """The arguments of each launch in turn."""
    return [(q, pool.pages, tables, calls.kv_lens, calls.query_start_loc, pool.options) for tables in calls.sets]


def chain(pool: Pool, name: str) -> Callable[..., jax.Array]:
    """A function that makes all calls; each takes the last one's result as its queries, so that none overtakes."""

    # A function of its own is traced and lowered once, however many calls there are.
    @jax.jit
    def attend(q: jax.Array, pages: jax.Array, table: jax.Array, lens: jax.Array, starts: jax.Array, more: Any) -> Any:
        return paged_attention(
            q, pages, table, lens, starts,
            scale=pool.heads.head_dim**-0.5, decode_only=True, implementation=name, **more,
        )  # fmt: skip

    def run_calls(q: jax.Array, pages: jax.Array, tables: list[jax.Array], *rest: Any) -> jax.Array:
        for table in tables:
            q = attend(q, pages, table, *rest)
        return q

    return run_calls


def rates(timing: device.Timing, moved: int, ceiling: float | None) -> dict[str, Any]:
    """Fields of a case that moves `moved` bytes a call."""
    rate = moved / timing.seconds
    return {
        **timing.fields(),
        "bytes": moved,
        "gb_per_s": rate / 1e9,
        "share": rate / ceiling if ceiling else None,
    }
