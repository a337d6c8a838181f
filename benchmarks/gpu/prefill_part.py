"""Prefill attention: TFLOP/s over prompt lengths, of chunks on top of earlier context, and of mixed steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from benchmarks.gpu import device, paged
from benchmarks.gpu.counts import attention_flops
from benchmarks.gpu.paged import Pool
from benchmarks.gpu.record import Record, Settings
from jaxserve.pallas_kernels.paged_attention import paged_attention


@dataclasses.dataclass(frozen=True)
class Shape:
    """`batch` prompts of which `new` tokens are computed on top of `before`, beside `decodes` rows of one token."""

    batch: int
    new: int
    before: int = 0
    decodes: int = 0
    page_size: int = 64
    pool_dtype: str = ""

    @property
    def label(self) -> str:
        parts = [f"{self.batch} x {self.new}"]
        parts += [f"after {self.before}"] * bool(self.before)
        parts += [f"beside {self.decodes} decodes"] * bool(self.decodes)
        parts += [f"page {self.page_size}"] * (self.page_size != 64)
        return " ".join([*parts, *[self.pool_dtype] * bool(self.pool_dtype)])

    @property
    def rows(self) -> list[tuple[int, int]]:
        """(new tokens, length) of each row."""
        decoding = [(1, max(64, self.before))] * self.decodes
        return decoding + [(self.new, self.before + self.new)] * self.batch


def run(settings: Settings, record: Record) -> None:
    """One case a shape."""
    name = device.prepare(settings, record)
    ceiling = device.matmul_rate(settings)
    record.summary |= {"implementation": name, "bf16_flop_per_s": ceiling}
    kept: dict[tuple[int, str], Pool] = {}

    def pool(shape: Shape) -> Pool:
        wanted = (shape.page_size, shape.pool_dtype)
        if wanted not in kept:
            kept.clear()
            dtype = shape.pool_dtype or paged.query_dtype(settings)
            kept[wanted] = paged.make_pool(settings, shape.page_size, dtype, positions(settings))
        return kept[wanted]

    for shape in shapes(settings):
        record.case(
            shape.label,
            lambda shape=shape: measure(settings, shape, pool(shape), name, ceiling),
            **dataclasses.asdict(shape),
        )


def positions(settings: Settings) -> int:
    """Of the pool: several of the longest prompts."""
    return 4 * 40_960 if settings.gpu else 512


def shapes(settings: Settings) -> Iterator[Shape]:
    """Single lengths with enough prompts to fill the device, then chunks, then mixed steps."""
    if not settings.gpu:
        yield from (Shape(1, 40), Shape(1, 24, before=32), Shape(1, 24, decodes=2))
        return
    yield from (Shape(1, 8192), Shape(8, 1024), Shape(1, 2048, before=8192), Shape(4, 2048))
    for new in (512, 32768, 4096, 16384):
        yield Shape(max(1, 8192 // new), new)
    yield Shape(1, 512, before=8192)
    yield from (Shape(1, new, before=30720) for new in (2048, 512))
    yield Shape(1, 2048, before=4096, decodes=64)
    yield Shape(1, 512)
    yield Shape(1, 2048)
    yield Shape(1, 8192, page_size=16)
    yield from (Shape(1, 8192, pool_dtype=pool_dtype) for pool_dtype in ("float8_e4m3fn", "int8"))


def measure(settings: Settings, shape: Shape, pool: Pool, name: str, ceiling: float | None) -> dict[str, Any]:
    """Time of one call and operations a second. The calls of a program have queries and pages of their own."""
    rows = shape.rows
    calls = paged.make_calls(settings, pool, rows, most=4)
    tokens = sum(new for new, _ in rows)
    qs = [paged.queries(pool, tokens, paged.query_dtype(settings), seed) for seed in range(calls.count)]
    sets = [(qs, pool.pages, tables, calls.kv_lens, calls.query_start_loc, pool.options) for tables in calls.sets]
    program = device.compile_program(many(pool, name), *sets[0])
    outputs = sum(q.size * q.dtype.itemsize for q in qs)
    timing = device.time_function(program, sets, calls.count, round_seconds=0.03, most=device.most_launches(outputs))
    rate = attention_flops(pool.heads, rows) / timing.seconds
    result = {
        **timing.fields(),
        "tokens": tokens,
        "flops": attention_flops(pool.heads, rows),
        "tflop_per_s": rate / 1e12,
        "share": rate / ceiling if ceiling else None,
    }
    return result | paged.check_finite(program(*sets[0])[0])


def many(pool: Pool, name: str) -> Callable[..., list[jax.Array]]:
    """A function that makes one call for each of its queries and page tables."""

    # A function of its own is traced and lowered once, however many calls there are.
    @jax.jit
    def attend(q: jax.Array, pages: jax.Array, table: jax.Array, lens: jax.Array, starts: jax.Array, more: Any) -> Any:
        return paged_attention(
            q, pages, table, lens, starts, scale=pool.heads.head_dim**-0.5, implementation=name, **more
        )

    def run_calls(qs: list[jax.Array], pages: jax.Array, tables: list[jax.Array], *rest: Any) -> list[jax.Array]:
        return [attend(q, pages, table, *rest) for q, table in zip(qs, tables, strict=True)]

    return run_calls
