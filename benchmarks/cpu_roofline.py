"""Where each millisecond of a decode step goes on a CPU, and how far it stands from what the machine can do:
`python -m benchmarks.cpu_roofline`.

The machine's limits are the rate of large bfloat16 products (XLA's and the packed ones; the best of tries before and
after) and the rate at which all cores read memory: arrays that no cache holds, combined with one instruction a vector,
since a sum of float32 is slower than memory. A virtual machine's memory can be twice as fast one second as the next, so
it is read before and after each step, and the faster of the two is that step's limit. A step of R rows, each at the
same context, must read every weight and every key and value once, and do two operations a weight and row: `limit` is
the greater of the two times. jax's profiler tells each operation's time.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import dataclasses
import glob
import gzip
import json
import os
import pathlib
import re
import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from benchmarks.random_checkpoint import write_checkpoint
from benchmarks.work import SHAPES
from jaxserve.config.settings import EngineConfig
from jaxserve.pallas_kernels.cpu import linear
from jaxserve.programs.step_programs import ProgramKey
from jaxserve.request import EngineRequest
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.scheduler.plan import NO_DECODES, RowPlan, Samples, StepPlan

PAGE_SIZE = 64
PARTS = (
    ("products", r"jaxserve_(linear|swiglu)|dot\(|__ynn_fusion|__onednn"),
    ("rotation and KV write", r"jaxserve_paged_attention_(rotate|write)"),
    ("attention", r"jaxserve_paged_attention_attend"),
)
"""Names of parts, and what tells their operations in the optimized program; the first that matches counts."""


class Memory:
    """Arrays to read, and threads for all cores to read them with."""

    def __init__(self) -> None:
        cores = len(os.sched_getaffinity(0))
        self.arrays = [np.ones(2**28 // 8 // cores, np.int64) for _ in range(cores)]
        self.threads = concurrent.futures.ThreadPoolExecutor(cores)

    def rate(self) -> float:
        """Bytes per second that all cores read now."""
        seconds = _seconds(lambda: list(self.threads.map(np.bitwise_or.reduce, self.arrays)))
        return sum(array.nbytes for array in self.arrays) / seconds


def products_rate() -> float:
    """Operations per second of large bfloat16 products, the best of several tries."""
    rates = []
    x, weight = jnp.ones((1024, 3072), jnp.bfloat16), jnp.ones((3072, 3072), jnp.bfloat16)
    dot = jax.jit(lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32))
    functions = [(dot, weight)]
    if linear.runs_here():
        functions.append((jax.jit(linear.linear), linear.pack(weight)))
    for function, operand in functions:
        call = function.lower(x, operand).compile()
        seconds = [_seconds(lambda call=call, operand=operand: call(x, operand)) for _ in range(7)]
        rates.append(2 * x.size * weight.shape[0] / min(seconds))
    return max(rates)


def _seconds(call: Any) -> float:
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def make_runner(directory: pathlib.Path, rows: tuple[int, ...], context: int) -> ModelRunner:
    """A runner over a checkpoint with one bucket for each number of rows and pages for all of them."""
    pages = max(rows) * -(-(context + 1) // PAGE_SIZE) + 1
    return ModelRunner(
        EngineConfig.from_options(
            model=str(directory),
            skip_tokenizer_init=True,
            max_model_len=context + PAGE_SIZE,
            max_num_seqs=max(rows),
            max_num_batched_tokens=max(rows),
            page_size=PAGE_SIZE,
            num_pages=pages,
            token_buckets=rows,
            row_buckets=rows,
            compilation_cache_dir=None,  # the text of a program that was kept is not
        )
    )


def decode_plan(rows: int, context: int, *, admit: bool) -> StepPlan:
    """A step of one token a row at position `context`; with `admit` the one that gives rows their pages, in random
    places of the pool."""
    pages = -(-(context + 1) // PAGE_SIZE)
    order = (np.random.default_rng(0).permutation(rows * pages) + 1).reshape(rows, pages)
    chunks = tuple(
        RowPlan(
            request_id=str(slot),
            order=slot,
            slot=slot,
            start=context,
            token_ids=(3 + slot,),
            first_new_page=0,
            new_pages=tuple(order[slot].tolist()) if admit else (),
            admit=EngineRequest(str(slot), (3,), 1) if admit else None,
        )
        for slot in range(rows)
    )
    samples = Samples.of((row, row, context + 1, False, 0) for row in range(rows))
    return StepPlan(0, NO_DECODES, chunks, samples, rows, rows, rows)


def give_pages(runner: ModelRunner, rows: int, context: int) -> None:
    """Fills the page tables, one index of every row a step: a step has room for a page a row."""
    plan = decode_plan(rows, context, admit=True)
    for index in range(len(plan.chunks[0].new_pages)):
        chunks = tuple(
            dataclasses.replace(
                row,
                first_new_page=index,
                new_pages=row.new_pages[index : index + 1],
                admit=row.admit if index == 0 else None,
            )
            for row in plan.chunks
        )
        run(runner, dataclasses.replace(plan, chunks=chunks))


def run(runner: ModelRunner, plan: StepPlan) -> None:
    """One step, host's work included."""
    pending = runner.dispatch_forward(plan)
    runner.dispatch_sample(plan)
    runner.collect(pending)


def timed_steps(runner: ModelRunner, plan: StepPlan, repeats: int, memory: Memory) -> list[tuple[float, float]]:
    """Seconds of each step, and the bytes per second that memory allowed it."""
    times, before = [], memory.rate()
    for _ in range(repeats):
        seconds = _seconds(lambda: run(runner, plan))
        after = memory.rate()
        times.append((seconds, max(before, after)))
        before = after
    return times


def part_milliseconds(runner: ModelRunner, plan: StepPlan, repeats: int) -> dict[str, float]:
    """Milliseconds a step in each part, from the profiler. Operations inside loops and branches count with theirs."""
    parts: dict[str, str] = {}
    for kind in ("forward", "sample"):
        text = runner.programs.executables[ProgramKey(kind, plan.token_bucket)].as_text()
        parts |= parts_of_instructions(text, kind)
    with tempfile.TemporaryDirectory() as folder:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0
        jax.profiler.start_trace(folder, profiler_options=options)
        for _ in range(repeats):
            run(runner, plan)
        jax.profiler.stop_trace()
        found = glob.glob(f"{folder}/**/*.trace.json.gz", recursive=True)
        with gzip.open(found[0], "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
    totals: collections.Counter[str] = collections.Counter()
    for event in events:
        part = parts.get(event.get("name", ""))
        if event.get("ph") == "X" and part is not None:
            totals[part] += event["dur"]
    return {part: microseconds / 1e3 / repeats for part, microseconds in totals.items()}


def parts_of_instructions(text: str, kind: str) -> dict[str, str]:
    """The part of each operation of a program's entry computation, by name."""
    parts: dict[str, str] = {}
    bodies = dict(re.findall(r"^%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    entry = re.search(r"^ENTRY [^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    assert entry is not None
    for line in entry[1].splitlines():
        found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
        if found is None or re.search(r" (parameter|constant|tuple|get-tuple-element|bitcast)\(", line):
            continue
        called = " ".join(bodies.get(name, "") for name in re.findall(r"calls=%?([\w.\-]+)", line))
        told = re.sub(r'op_name="[^"]*"|stack_frame_id=\d+', "", line) + called
        part = next((name for name, pattern in PARTS if re.search(pattern, told)), "other")
        parts[found[1]] = part if kind == "forward" else ("head" if part == "products" else "sampling")
    return parts


def needs(shape: dict[str, Any], rows: int, context: int) -> tuple[int, int]:
    """Bytes that a step of bfloat16 must read, and operations that it must do in products."""
    hidden, wide, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    head_dim = hidden // shape["num_attention_heads"]
    kv = 2 * shape["num_key_value_heads"] * head_dim
    weights = layers * (hidden * (hidden + kv) + hidden * hidden + 3 * hidden * wide) + shape["vocab_size"] * hidden
    return 2 * (weights + layers * kv * rows * context), 2 * weights * rows


def measure(
    name: str, rows: tuple[int, ...], context: int, repeats: int, memory: Memory
) -> list[tuple[dict[str, Any], list[tuple[float, float]]]]:
    """One model: for each number of rows what it takes, and each step's seconds beside memory's rate."""
    shape, results = SHAPES[name], []
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(pathlib.Path(folder) / name, shape)
        runner = make_runner(pathlib.Path(folder) / name, rows, context)
        for count in rows:
            give_pages(runner, count, context)
            plan = decode_plan(count, context, admit=False)
            for _ in range(2):
                run(runner, plan)
            times = timed_steps(runner, plan, repeats, memory)
            read, operations = needs(shape, count, context)
            result = {
                "model": name,
                "rows": count,
                "context": context,
                "read_bytes": read,
                "operations": operations,
                "parts_ms": part_milliseconds(runner, plan, 5),
            }
            results.append((result, times))
    return results


def beside(result: dict[str, Any], times: list[tuple[float, float]], products: float) -> dict[str, Any]:
    """The result with medians over its steps: of their times, of the limits, and of each step over its own limit."""
    compute = result["operations"] / products
    memory = [result["read_bytes"] / rate for _, rate in times]
    over = [seconds / max(least, compute) for (seconds, _), least in zip(times, memory, strict=True)]
    return result | {
        "step_ms": 1e3 * statistics.median(seconds for seconds, _ in times),
        "memory_gb_per_s": statistics.median(rate for _, rate in times) / 1e9,
        "read_ms": 1e3 * statistics.median(memory),
        "products_ms": 1e3 * compute,
        "limit_ms": 1e3 * statistics.median(max(least, compute) for least in memory),
        "step_over_limit": statistics.median(over),
        "step_over_limit_range": [min(over), max(over)],
    }


def main() -> int:
    """Prints the tables and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["153m", "1b"], choices=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[8, 16, 32, 64])
    parser.add_argument("--context", type=int, default=384, help="positions that each row attends to")
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--name", help="name of the result file; default: cpu_roofline_jax<version>")
    options = parser.parse_args()
    memory, before, measured = Memory(), products_rate(), []
    for name in options.models:
        measured += measure(name, tuple(sorted(options.rows)), options.context, options.repeats, memory)
    after = products_rate()
    products = max(before, after)
    results = [beside(result, times, products) for result, times in measured]
    settings = {name: value for name, value in vars(options).items() if name != "name"}
    path = report.write(
        options.name or f"cpu_roofline_jax{report.versions()['jax']}",
        settings,
        {"products_flop_per_s": {"before": before, "after": after}, "steps": results},
    )
    print(report.describe())
    print(f"products: {products / 1e9:.0f} GFLOP/s (before {before / 1e9:.0f}, after {after / 1e9:.0f})")
    columns = ("step_ms", "memory_gb_per_s", "read_ms", "products_ms", "limit_ms", "step_over_limit")
    rows = [(one["model"], one["rows"], *(one[column] for column in columns)) for one in results]
    print(report.table(("model", "rows", *columns), rows))
    parts = sorted({part for one in results for part in one["parts_ms"]})
    rows = [(one["model"], one["rows"], *(one["parts_ms"].get(part, 0.0) for part in parts)) for one in results]
    print("milliseconds a step in each part (profiler):")
    print(report.table(("model", "rows", *parts), rows))
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
