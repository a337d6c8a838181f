"""Searches tuning configurations on this device and writes the table that the kernels read.

From the shipped configuration on, one field after another takes each of its values while the others stay, twice; a
faster configuration is taken when its values are right too. A configuration's score is the geometric mean of its times
over a few shapes. What is found is written to tuning.json in the output directory after each kernel: the shipped table
with this device's entries added or replaced, to be copied to pallas_kernels/paged_attention/triton/tuning.json.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import dense, device, paged
from benchmarks.gpu import values_part as values
from benchmarks.gpu import write_part as write
from benchmarks.gpu.counts import Heads
from benchmarks.gpu.paged import Pool
from benchmarks.gpu.record import AbsentError, Record, Settings, plain
from jaxserve.pallas_kernels.paged_attention import AttentionSpec
from jaxserve.pallas_kernels.paged_attention.triton import tuning
from jaxserve.pallas_kernels.paged_attention.triton.attention import paged_attention
from jaxserve.pallas_kernels.paged_attention.triton.kv_write import kv_write, rotate_and_write
from jaxserve.planning.reports import container, cubin

PASSES = 2
LEAST_GAIN = 0.99
"""A configuration is taken when its time is below this share of the best one's: less is noise."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A kernel, the key of its entry in the table, and the heads it is tuned with."""

    kernel: str
    dtype: str
    pool_dtype: str
    heads: Heads

    @property
    def label(self) -> str:
        return f"{self.kernel} {self.dtype} queries, {self.pool_dtype} pool, head size {self.heads.head_dim}"


Grid = dict[str, tuple[int, ...]]


def run(settings: Settings, record: Record) -> None:
    """Tunes one kernel after another, the most important first, until the time is up."""
    device.prepare(settings, record)
    kind = jax.devices()[0].device_kind
    table = [dict(entry, config=dataclasses.asdict(config)) for entry, config in tuning.load()]
    record.summary |= {"device": kind, "results": [], "table_file": "tuning.json"}
    for target in targets(settings):
        bench = Bench(settings, target)
        start = tuning.lookup(
            kind if settings.gpu else tuning.INTERPRET_DEVICE,
            target.kernel, target.dtype, target.pool_dtype, target.heads.head_dim,
        )  # fmt: skip
        found = search(record, bench, start, grid(settings, target.kernel))
        if found is None:
            continue
        first, best, config, tried = found
        record.summary["results"].append(
            {
                "case": target.label,
                "kernel": target.kernel,
                "tried": tried,
                "default_microseconds": first * 1e6,
                "microseconds": best * 1e6,
                "config": dataclasses.asdict(config),
            }
        )
        if config != start:
            table = replaced(table, kind, target, config)
        path = pathlib.Path(settings.output) / "tuning.json"
        path.write_text(table_text(table), encoding="utf-8")
        tuning.load(path)  # it must be one that the kernels take
        record.write()


def targets(settings: Settings) -> list[Target]:
    """What is tuned, in order."""
    if not settings.gpu:
        small = paged.heads_of(settings)
        return [Target("decode", "float32", "float32", small), Target("kv_write", "float32", "float32", small)]
    llama = Heads()
    found = [Target(kernel, "bfloat16", "bfloat16", llama) for kernel in ("decode", "prefill", "kv_write")]
    for pool_dtype in ("float8_e4m3fn", "int8"):
        found += [Target(kernel, "bfloat16", pool_dtype, llama) for kernel in ("decode", "prefill")]
    for size in (64, 256):
        heads = dataclasses.replace(llama, head_dim=size)
        found += [Target(kernel, "bfloat16", "bfloat16", heads) for kernel in ("decode", "prefill")]
    return found


def grid(settings: Settings, kernel: str) -> Grid:
    """The values of each field, in the order in which the fields are tried."""
    if not settings.gpu:
        return {"decode": {"block": (16, 32)}, "kv_write": {"tokens": (4, 8)}}[kernel]
    cores = int(getattr(jax.devices()[0], "core_count", 0) or 132)
    grids: dict[str, Grid] = {
        "decode": {
            "num_stages": (2, 3, 4, 5),
            "block": (32, 64, 128),
            "num_warps": (2, 4, 8),
            "programs": tuple(cores * share for share in (1, 2, 3, 4, 6)),
            "chunk": (128, 256, 512),
            "splits": (16, 32, 64),
        },
        "prefill": {
            "num_stages": (1, 2, 3, 4),
            "tile": (64, 128, 256),
            "block": (32, 64, 128),
            "num_warps": (4, 8),
        },
        "kv_write": {"tokens": (1, 2, 4, 8, 16, 32), "num_warps": (1, 2, 4)},
    }
    return grids[kernel]


def search(record: Record, bench: Bench, start: Any, fields: Grid) -> tuple[float, float, Any, int] | None:
    """(time of the start, best time, its configuration, configurations tried); None where the start itself fails."""
    first = bench.score(record, start)
    if first is None:
        return None
    best, config, seen = first, start, {start}
    for _ in range(PASSES):
        before = config
        for field, steps in fields.items():
            for step in steps:
                try:
                    candidate = dataclasses.replace(config, **{field: step})
                except ValueError:
                    continue  # not a valid combination
                if candidate in seen or record.seconds_left <= 0:
                    continue
                seen.add(candidate)
                score = bench.score(record, candidate, best)
                if score is not None and score < LEAST_GAIN * best:
                    best, config = score, candidate
        if config == before:
            break
    return first, best, config, len(seen)


class Bench:
    """Times and checks configurations of one kernel."""

    def __init__(self, settings: Settings, target: Target):
        self._settings = settings
        self._target = target
        self._pool: Pool | None = None

    def score(self, record: Record, config: Any, best: float = math.inf) -> float | None:
        """Geometric mean of the seconds over the shapes; None where it fails. One below `best` is checked as well."""
        label = f"{self._target.label}: {json.dumps(dataclasses.asdict(config))}"
        row = record.case(label, lambda: self._measure(config, best), kernel=self._target.kernel)
        return None if row is None else row["microseconds"] * 1e-6

    def _measure(self, config: Any, best: float) -> dict[str, Any]:
        times = [self._time(config, rows) for rows in self._shapes()]
        score = math.exp(sum(math.log(seconds) for seconds in times) / len(times))
        result: dict[str, Any] = {"microseconds": score * 1e6, "each_microseconds": [t * 1e6 for t in times]}
        return result | (self._check(config) if score < LEAST_GAIN * best else {})

    def _shapes(self) -> list[list[tuple[int, int]]]:
        """Rows of (new tokens, length); of a write, tokens alone count."""
        if not self._settings.gpu:
            return [[(1, 40)] * 2]
        if self._target.kernel == "decode":
            return [[(1, 2048)] * 64, [(1, 8192)], [(1, 1024)] * 256, [(1, 32768)] * 8]
        if self._target.kernel == "prefill":
            return [[(8192, 8192)], [(1024, 1024)] * 8, [(512, 8192)]]
        return [[(1, 1)] * 64, [(8192, 8192)]]

    def _inputs(self) -> Pool:
        if self._pool is None:
            target = self._target
            self._pool = paged.make_pool(
                self._settings, 64 if self._settings.gpu else 16, target.pool_dtype,
                393_216 if self._settings.gpu else 1024, target.heads,
            )  # fmt: skip
        return self._pool

    def _time(self, config: Any, rows: list[tuple[int, int]]) -> float:
        pool = self._inputs()
        tokens = sum(new for new, _ in rows)
        if self._target.kernel == "kv_write":
            return self._time_write(config, tokens)
        calls = paged.make_calls(self._settings, pool, rows, most=16 if tokens <= 256 else 2)
        q = paged.queries(pool, tokens, self._target.dtype, self._settings.seed)
        once = jax.jit(functools.partial(self._attend, config))

        def chain(q: jax.Array, pages: jax.Array, tables: list[jax.Array], *rest: Any) -> jax.Array:
            for table in tables:
                q = once(q, pages, table, *rest)
            return q

        sets = [(q, pool.pages, tables, calls.kv_lens, calls.query_start_loc, pool.options) for tables in calls.sets]
        program = compiled(chain, *sets[0])
        return device.time_function(program, sets, calls.count, round_seconds=0.01, rounds=5).seconds

    def _time_write(self, config: Any, tokens: int) -> float:
        pool, heads, dtype = self._inputs(), self._target.heads, jnp.dtype(self._target.dtype)
        shape = (write.calls(self._settings), tokens, heads.kv_heads, heads.group + 2, heads.head_dim)
        qkv = device.random_array(jax.random.key(3), shape, dtype)
        angles = jax.random.uniform(jax.random.key(4), (tokens, heads.head_dim // 2), jnp.float32, 0, 6)
        once = jax.jit(
            functools.partial(rotate_and_write, dtype=dtype, interpret=not self._settings.gpu, config=config)
        )

        def chain(
            pages: jax.Array, qkv: list[jax.Array], cos: jax.Array, sin: jax.Array, slots: list[jax.Array]
        ) -> Any:
            turned = []
            for projection, mapping in zip(qkv, slots, strict=True):
                q, pages = once(projection, cos, sin, pages, mapping)
                turned.append(q)
            return pages, turned

        arguments = (list(qkv), jnp.cos(angles), jnp.sin(angles), write.slots(self._settings, pool, tokens))
        program = compiled(chain, pool.pages, *arguments, donate=(0,))
        return write.timed(self._settings, [pool], program, arguments, qkv.size * dtype.itemsize).seconds

    def _attend(self, config: Any, q: Any, pages: Any, table: Any, lens: Any, starts: Any, more: dict[str, Any]) -> Any:
        decode = self._target.kernel == "decode"
        return paged_attention(
            q, pages, table, lens, starts, AttentionSpec(q.shape[-1] ** -0.5),
            more.get("k_scale"), more.get("v_scale"), None, decode,
            interpret=not self._settings.gpu,
            **{"decode_config" if decode else "prefill_config": config},
        )  # fmt: skip

    def _check(self, config: Any) -> dict[str, Any]:
        """Relative error against float64 on a small problem; a `reason` where it is too large."""
        target = self._target
        decode, gpu = target.kernel == "decode", self._settings.gpu
        rows = ((1, 1), (1, 300), (1, 4000)) if decode else ((130, 700), (1, 40), (64, 64))
        problem = dense.Problem(
            rows if gpu else ((1, 20), (1, 3)),
            kv_heads=2,
            group=target.heads.group,
            head_dim=target.heads.head_dim,
            page_size=64 if gpu else 16,
            dtype=target.dtype,
            pool_dtype=target.pool_dtype,
            padding=0,
        )
        if target.kernel == "kv_write":
            given = values.write_inputs(problem, self._settings.seed)
            shape = (given["slots"].size, problem.kv_heads, problem.head_dim)
            k, v = (given["random"].standard_normal(shape).astype(dense.numpy_dtype(target.dtype)) for _ in range(2))
            write_all = jax.jit(functools.partial(kv_write, interpret=not gpu, config=config))
            out = np.asarray(write_all(*(jnp.asarray(a) for a in (given["pool"], k, v, given["slots"]))))
            return values.compare_pool(problem, given, out, np.stack([k, v], 1).astype(np.float64))
        inputs = dense.make_inputs(problem, self._settings.seed)
        scales = {} if inputs.k_scale is None else {"k_scale": inputs.k_scale, "v_scale": inputs.v_scale}
        arrays = (inputs.q, inputs.pool, inputs.page_table, inputs.kv_lens, inputs.query_start_loc)
        out = jax.jit(functools.partial(self._attend, config))(*(jnp.asarray(a) for a in arrays), scales)
        return values.compare(np.asarray(out), inputs.expected, values.TOLERANCE[target.dtype])


def compiled(function: Any, *arguments: Any, donate: tuple[int, ...] = ()) -> Any:
    """The program; AbsentError where the configuration does not compile, for want of shared memory, say, or spills.

    No entry of the shipped table may spill registers, so one that does is not worth its time. Where the machine code
    cannot be read, of a newer device say, whether it spills stays unknown, and it is measured all the same.
    """
    try:
        program = device.compile_program(function, *arguments, donate=donate)
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        raise AbsentError(f"does not compile: {type(error).__name__}: {str(error)[:300]}") from error
    if jax.default_backend() == "gpu":
        spilled = spilled_bytes(program.runtime_executable().serialize())
        if spilled:
            raise AbsentError(f"spills {spilled} bytes of registers")
    return program


def spilled_bytes(serialized: bytes) -> int | None:
    """Bytes of registers that an executable's kernels store and load; None for machine code of an unknown kind."""
    try:
        kernels = cubin.kernels(container.contents(serialized))
    except ValueError as error:
        print(f"spills are unknown: {error}", flush=True)
        return None
    return sum(kernel.spill_store_bytes + kernel.spill_load_bytes for kernel in kernels)


def replaced(table: list[dict[str, Any]], kind: str, target: Target, config: Any) -> list[dict[str, Any]]:
    """The table with one entry for this device and key, instead of what it had for exactly them."""
    key = {
        "device": kind,
        "kernel": target.kernel,
        "dtype": target.dtype,
        "pool_dtype": target.pool_dtype,
        "head_dim": target.heads.head_dim,
    }
    kept = [entry for entry in table if {name: entry[name] for name in entry if name != "config"} != key]
    return [*kept, {**key, "config": dataclasses.asdict(config)}]


def table_text(table: list[dict[str, Any]]) -> str:
    """JSON with one entry a line, as the shipped table has it."""
    return "[\n" + ",\n".join("  " + json.dumps(plain(entry)) for entry in table) + "\n]\n"
