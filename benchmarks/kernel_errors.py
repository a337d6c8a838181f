"""Largest errors of the Triton attention kernels against float64, by dtype of queries and of the pool.

    python -m benchmarks.kernel_errors [--device "NVIDIA H200"] [--name kernel_errors_jax0.11.2]

Without a GPU the kernels run in Pallas' interpret mode: the same programs, with the tile sizes that the tuning table
has for `--device`, but the CPU's exponential and the CPU's order of summation within a dot. Everything that must not be
read is NaN. Writes benchmarks/results/NAME.json and NAME.md and prints the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import report
from benchmarks.gpu import dense
from jaxserve.pallas_kernels.paged_attention.spec import AttentionSpec
from jaxserve.pallas_kernels.paged_attention.triton import tuning
from jaxserve.pallas_kernels.paged_attention.triton.attention import paged_attention

DECODE = ((1, 1), (1, 17), (1, 256), (1, 1000), (1, 4097), (1, 9000))
PREFILL = ((130, 130), (70, 1500), (33, 64), (2, 700))
POOLS = ("", "float8_e4m3fn", "int8")
HEADER = ("queries", "pool", "step", "options", "largest error", "largest relative error", "unit roundoff")


def problems(head_dim: int) -> dict[tuple[str, str], dense.Problem]:
    """What is measured, by step and options."""
    found = {}
    for step, rows in (("decode", DECODE), ("prefill", PREFILL)):
        plain = dense.Problem(rows, kv_heads=2, head_dim=head_dim, padding=0)
        found[step, "none"] = plain
        found[step, "window, cap, sinks"] = dataclasses.replace(plain, sliding_window=600, soft_cap=30.0, sinks=True)
    return found


def errors(problem: dense.Problem, device: str, interpret: bool) -> dict[str, float]:
    """The largest absolute error, and the largest error of a head's output relative to its norm."""
    inputs = dense.make_inputs(problem, seed=0)
    choose = functools.partial(
        tuning.lookup, device, dtype=problem.dtype, pool_dtype=problem.stored, head_dim=problem.head_dim
    )
    spec = AttentionSpec(problem.scale, problem.sliding_window, problem.soft_cap)

    def attend(q: Any, pool: Any, table: Any, lens: Any, starts: Any, *scales_and_sinks: Any) -> jax.Array:
        return paged_attention(
            q,
            pool,
            table,
            lens,
            starts,
            spec,
            *scales_and_sinks,
            interpret=interpret,
            decode_config=choose("decode"),
            prefill_config=choose("prefill"),
        )

    arrays = (inputs.q, inputs.pool, inputs.page_table, inputs.kv_lens, inputs.query_start_loc)
    out = np.asarray(jax.jit(attend)(*arrays, inputs.k_scale, inputs.v_scale, inputs.sinks)).astype(np.float64)
    off = out - inputs.expected
    norm = np.linalg.norm(inputs.expected, axis=-1)
    return {
        "largest_error": float(np.abs(off).max()),
        "largest_relative_error": float((np.linalg.norm(off, axis=-1) / norm).max()),
    }


def main() -> int:
    """Measures every pair of dtypes; the exit status is 1 when a result is not finite."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="NVIDIA H200", help="device kind whose tile sizes are used")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--name", default=f"kernel_errors_jax{jax.__version__}")
    arguments = parser.parse_args()
    interpret = jax.default_backend() != "gpu"
    results: list[dict[str, Any]] = []
    for dtype in ("bfloat16", "float16", "float32"):
        for pool in POOLS:
            for (step, options), problem in problems(arguments.head_dim).items():
                problem = dataclasses.replace(problem, dtype=dtype, pool_dtype=pool)
                found = errors(problem, arguments.device, interpret)
                results.append(
                    {"dtype": dtype, "pool_dtype": problem.stored, "step": step, "options": options, **found}
                )
                print(results[-1], file=sys.stderr, flush=True)
    settings = {
        "tile_sizes_of": arguments.device,
        "interpret": interpret,
        "head_dim": arguments.head_dim,
        "decode": DECODE,
        "prefill": PREFILL,
    }
    path = report.write(arguments.name, settings, results)
    text = markdown(results, settings)
    (report.RESULTS / f"{arguments.name}.md").write_text(text, encoding="utf-8")
    print(text)
    print(f"Written to {path}")
    finite = all(np.isfinite(one["largest_error"]) for one in results)
    return 0 if finite else report.fail("a result is not finite: something was read that must not be")


def markdown(results: list[dict[str, Any]], settings: dict[str, Any]) -> str:
    """The results as a Markdown table under a line on where they are from."""
    where = "Pallas' interpret mode" if settings["interpret"] else "the device"
    lines = [
        "# Errors of the Triton attention kernels against float64",
        "",
        f"{report.describe()}. {where}, tile sizes for {settings['tile_sizes_of']}, head size {settings['head_dim']}.",
        "The relative error is that of a head's output as a whole, and the roundoff that of the queries' dtype.",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|" + " --- |" * len(HEADER),
    ]
    for one in results:
        roundoff = jnp.finfo(one["dtype"]).eps / 2
        numbers = (one["largest_error"], one["largest_relative_error"], float(roundoff))
        texts = [one["dtype"], one["pool_dtype"], one["step"], one["options"], *(f"{number:.1e}" for number in numbers)]
        lines.append("| " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
