"""Decode attention of rows that share a prefix, its pages read for several rows at once and for each row alone.

What `cascade_attention` "on" saves, whether the bits are the same, and what finding rows that share costs where none
do. A program has the attention of several layers over one page table, as a step has, and so finds them once.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import device, paged
from benchmarks.gpu.paged import Pool
from benchmarks.gpu.record import Record, Settings
from jaxserve.pallas_kernels.paged_attention import paged_attention


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rows that share their first `shared` positions, and have `own` more each."""

    rows: int
    shared: int
    own: int
    page_size: int = 64

    def table(self) -> np.ndarray:
        """Pages int32 [rows, pages] in random order."""
        whole = self.shared // self.page_size
        own = -(-(self.shared + self.own) // self.page_size) - whole
        order = 1 + np.random.default_rng(0).permutation(whole + self.rows * own).astype(np.int32)
        first = np.broadcast_to(order[:whole], (self.rows, whole))
        return np.concatenate([first, order[whole:].reshape(self.rows, own)], axis=1)


def run(settings: Settings, record: Record) -> None:
    """One case a shape."""
    name = device.prepare(settings, record)
    record.summary |= {"implementation": name, "method": device.__doc__}
    for shape in shapes(settings):
        label = f"{shape.rows} rows, {shape.shared} shared, {shape.own} own"
        record.case(label, lambda shape=shape: measure(settings, shape, name), **dataclasses.asdict(shape))


def shapes(settings: Settings) -> list[Shape]:
    """The most telling first."""
    if not settings.gpu:
        return [Shape(4, 32, 9, 16), Shape(3, 0, 20, 16)]
    sizes = ((64, 1536, 512), (64, 0, 2048), (64, 8192, 512), (256, 1536, 256), (8, 8192, 512), (64, 32768, 256))
    return [Shape(*size) for size in sizes]


def measure(settings: Settings, shape: Shape, name: str) -> dict[str, Any]:
    """Times of both ways, their ratio, and whether all bits are equal."""
    table = shape.table()
    heads, dtype = paged.heads_of(settings), paged.query_dtype(settings)
    positions = (int(table.max()) + 64) * shape.page_size
    pools = [
        paged.make_pool(settings, shape.page_size, dtype, positions, heads) for _ in range(8 if settings.gpu else 2)
    ]
    q = paged.queries(pools[0], shape.rows, dtype, settings.seed)
    lengths = jnp.full(shape.rows, shape.shared + shape.own, jnp.int32)
    starts = jnp.arange(shape.rows + 1, dtype=jnp.int32)
    arguments = (q, [pool.pages for pool in pools], jnp.asarray(table), lengths, starts)
    results, found = {}, {}
    for way in ("on", "off"):
        program = device.compile_program(layers(pools[0], name, way), *arguments)
        results[way] = np.asarray(program(*arguments)).view(f"uint{8 * dtype.itemsize}")
        found[way] = device.time_function(program, [arguments], len(pools))
    seconds = {f"{way}_microseconds": timing.seconds * 1e6 for way, timing in found.items()}
    different = int((results["on"] != results["off"]).sum())
    row = found["on"].fields() | seconds | {"ratio": found["on"].seconds / found["off"].seconds}
    # On a CPU it is XLA that decides about the bits of what it interprets.
    wrong = different > 0 and settings.gpu
    return row | {"different": different} | ({"reason": f"{different} numbers differ in bits"} if wrong else {})


def layers(pool: Pool, name: str, way: str) -> Any:
    """A function that attends in one layer after another; each takes the last one's result as its queries."""

    @jax.jit
    def attend(q: jax.Array, pages: jax.Array, table: jax.Array, lens: jax.Array, starts: jax.Array) -> jax.Array:
        scale = pool.heads.head_dim**-0.5
        return paged_attention(
            q, pages, table, lens, starts, scale=scale, decode_only=True, cascade=way, implementation=name
        )

    def run_layers(q: jax.Array, pools: list[jax.Array], *rest: jax.Array) -> jax.Array:
        for pages in pools:
            q = attend(q, pages, *rest)
        return q

    return run_layers
