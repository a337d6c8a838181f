"""What it saves that rows which share a prefix read its pages together: `python -m benchmarks.cascade`.

Rows decode one token each; they share the first `shared` positions and have `own` more. `attention` is the attention of
all layers over pools of random numbers, `step` a step of the engine with everything in it. Both run with
`cascade_attention` "auto" and "off" in turns, so that a ratio compares neighbors, over pages that all rows share and,
under shared = 0, over pages of their own, where finding that out is all that is added. The attention's results must be
equal to the bit. On a machine that others use too, the processor time of one thread says more than the clock: `taskset
-c 0 python -m benchmarks.cascade`. Writes JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from benchmarks.cpu_roofline import run
from benchmarks.work import SHAPES
from jaxserve.config.settings import MIN_BUCKET, EngineConfig
from jaxserve.models.config import ModelConfig
from jaxserve.pallas_kernels.paged_attention import Use, choose, kv_write, new_pool, paged_attention
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.scheduler.plan import DecodeRows, RowPlan, Samples, StepPlan, table_writes

WAYS = ("auto", "off")


@dataclasses.dataclass(frozen=True)
class Case:
    """Rows that share the first `shared` positions, a multiple of the page size, and have `own` more each."""

    rows: int
    shared: int
    own: int

    def tables(self, page_size: int) -> np.ndarray:
        """Pages int32 [rows, pages]; those of different rows lie in random places."""
        whole = self.shared // page_size
        own = -(-(self.shared + self.own) // page_size) - whole
        order = 1 + np.random.default_rng(0).permutation(whole + self.rows * own)
        shared = np.broadcast_to(order[:whole], (self.rows, whole))
        return np.concatenate([shared, order[whole:].reshape(self.rows, own)], axis=1).astype(np.int32)


def compare(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Milliseconds of each way, by the clock and of processor time, and medians over neighbors of "auto" divided by
    "off"."""
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in calls}
    for number in range(repeats + 2):
        # Each goes first in every other round.
        for way in list(calls) if number % 2 else list(calls)[::-1]:
            begin = time.perf_counter(), time.process_time()
            jax.block_until_ready(calls[way]())
            times[way].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    found: dict[str, Any] = {}
    for place, kind in enumerate(("", "cpu_")):
        kept = {way: [1e3 * taken[place] for taken in values[2:]] for way, values in times.items()}
        ratios = [auto / off for auto, off in zip(kept["auto"], kept["off"], strict=True)]
        quarters = statistics.quantiles(ratios, n=4)
        found |= {f"{way}_{kind}ms": statistics.median(values) for way, values in kept.items()}
        found |= {f"{kind}ratio": quarters[1], f"{kind}ratio_quarters": [quarters[0], quarters[2]]}
    return found


def attention(model: ModelConfig, case: Case, page_size: int, repeats: int) -> dict[str, Any]:
    """Compares the attention of all layers; the results must have the same bits."""
    use = Use("bfloat16", "bfloat16", page_size, model.head_dim, model.group_size)
    name, heads, dim = choose("cpu", "auto", use), model.num_key_value_heads, model.head_dim
    table = case.tables(page_size)
    pages = int(table.max()) + 1
    random = np.random.default_rng(1)

    def numbers(*shape: int) -> jax.Array:
        return jnp.asarray(random.standard_normal(shape, dtype=np.float32), jnp.bfloat16)

    write = jax.jit(functools.partial(kv_write, implementation=name), donate_argnums=0)
    pools = []
    for _ in range(model.num_hidden_layers):
        slots = jnp.arange(page_size, pages * page_size, dtype=jnp.int32)
        pool = new_pool(pages, heads, page_size, dim, jnp.bfloat16, platform="cpu")
        pools.append(write(pool, numbers(len(slots), heads, dim), numbers(len(slots), heads, dim), slots))
    query = numbers(case.rows, heads, model.group_size, dim)
    lengths = jnp.full(case.rows, case.shared + case.own, jnp.int32)
    starts = jnp.arange(case.rows + 1, dtype=jnp.int32)

    def layers(pools: list[jax.Array], query: jax.Array, table: jax.Array, *, cascade: str) -> list[jax.Array]:
        attend = functools.partial(paged_attention, scale=dim**-0.5, implementation=name, cascade=cascade)
        return [attend(query, pool, table, lengths, starts) for pool in pools]

    calls: dict[str, Callable[[], Any]] = {
        way: functools.partial(jax.jit(functools.partial(layers, cascade=way)), pools, query, jnp.asarray(table))
        for way in WAYS
    }
    found = {way: [np.asarray(one).view(np.uint16) for one in call()] for way, call in calls.items()}
    if not all(np.array_equal(one, other) for one, other in zip(*found.values(), strict=True)):
        raise AssertionError(f"{case}: the results' bits differ")
    return compare(calls, repeats)


def bucket(case: Case) -> int:
    """What a step of a case is padded to."""
    return max(MIN_BUCKET, case.rows)


def make_runner(model: ModelConfig, way: str, cases: list[Case], page_size: int) -> ModelRunner:
    """A runner with random weights that has a bucket for each number of rows, and pages for every case."""
    rows = tuple(sorted({bucket(case) for case in cases}))
    return ModelRunner(
        EngineConfig.from_options(
            architecture=model,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=model.max_position_embeddings,
            max_num_seqs=rows[-1],
            max_num_batched_tokens=rows[-1],
            page_size=page_size,
            num_pages=max(int(case.tables(page_size).max()) for case in cases) + 1,
            token_buckets=rows,
            row_buckets=rows,
            cascade_attention=way,
        )
    )


def step_plans(case: Case, page_size: int) -> tuple[StepPlan, StepPlan]:
    """The step that enters the page tables, and the one that is timed."""
    length = case.shared + case.own
    rows = [RowPlan("", -1, slot, length - 1, (), 0, (), None) for slot in range(case.rows)]
    samples = Samples.of((row, row, length, False, 0) for row in range(case.rows))
    timed = StepPlan(-1, DecodeRows.of(rows, page_size), (), samples, bucket(case), bucket(case), case.rows)
    writes = [
        write for slot, pages in enumerate(case.tables(page_size).tolist()) for write in table_writes(0, slot, pages)
    ]
    return dataclasses.replace(timed, table_writes=tuple(writes)), timed


def steps(model: ModelConfig, cases: list[Case], page_size: int, repeats: int) -> list[dict[str, Any]]:
    """Compares whole steps of the engine."""
    runners = {way: make_runner(model, way, cases, page_size) for way in WAYS}
    # Both read the same weights: where in memory they lie makes some percent of a step.
    runners["off"]._weights = runners["auto"]._weights
    found = []
    for case in cases:
        first, timed = step_plans(case, page_size)
        for runner in runners.values():
            run(runner, first)
        calls: dict[str, Callable[[], Any]] = {
            way: functools.partial(run, runner, timed) for way, runner in runners.items()
        }
        found.append(compare(calls, repeats))
    return found


def main() -> int:
    """Prints the table and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["153m", "1b"], choices=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[2, 4, 8, 16, 64])
    parser.add_argument("--shared", nargs="+", type=int, default=[0, 128, 512, 1536, 6144])
    parser.add_argument("--own", type=int, default=100)
    parser.add_argument("--page-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--no-steps", action="store_true", help="attention alone")
    parser.add_argument("--name", help="name of the result file; default: cascade_jax<version>")
    options = parser.parse_args()
    found: list[dict[str, Any]] = []
    for name in options.models:
        longest = -(-(max(options.shared) + options.own + 1) // options.page_size) * options.page_size
        model = ModelConfig.from_hf(SHAPES[name] | {"max_position_embeddings": longest})
        cases = [Case(rows, shared, options.own) for rows in options.rows for shared in options.shared]
        for case in cases:
            measured = attention(model, case, options.page_size, options.repeats)
            found.append({"model": name, "part": "attention", **dataclasses.asdict(case), **measured})
        measured = [] if options.no_steps else steps(model, cases, options.page_size, options.repeats)
        for case, one in zip(cases, measured, strict=False):
            found.append({"model": name, "part": "step", **dataclasses.asdict(case), **one})
    settings = {name: value for name, value in vars(options).items() if name != "name"}
    path = report.write(options.name or f"cascade_jax{report.versions()['jax']}", settings, found)
    print(report.describe())
    header = (
        "model",
        "part",
        "rows",
        "shared",
        "own",
        "auto_ms",
        "off_ms",
        "ratio",
        "auto_cpu_ms",
        "off_cpu_ms",
        "cpu_ratio",
    )
    print(report.table(header, [[row[name] for name in header] for row in found]))
    print(f"bits of all results are equal; written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
