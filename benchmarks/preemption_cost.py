"""What a preempted sequence costs to bring back, by swapping or by computing it again, from 16 to 2,048 tokens.

    python -m benchmarks.preemption_cost [--models default,153m,wide] [--repeats 7]

Each model starts as the engine does. A sequence of each length is then computed again, in steps of the token budget,
and its pages are copied to the host and back, in turns; both waited for. Beside the seconds stands what the cost rule
chooses from the two figures that were measured at start. Writes JSON and a plot to benchmarks/results/.

"wide" is a model of large pages and few weights, for which computing again is cheap beside copying: what a device
behind a slow link looks like.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from matplotlib.figure import Figure

from benchmarks import report
from benchmarks.random_checkpoint import LLAMA_153M
from jaxserve.config import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.runner.costs import prefill_plan, prompt_row, swap_plans
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.runner.roofline import token_bytes
from jaxserve.scheduler.costs import PreemptionCosts
from jaxserve.scheduler.pace import Pace
from jaxserve.scheduler.plan import Swap
from jaxserve.scheduler.policies import POLICIES
from jaxserve.scheduler.preemption import Preemption
from jaxserve.scheduler_config import PolicyConfig, PreemptionConfig
from models.config import ModelConfig

LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)
BUDGET = 512
PAGES = 160
WIDE = LLAMA_153M | {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "torch_dtype": "float32",
}


def configuration(model: str) -> EngineConfig:
    """One sequence of up to 2,048 tokens, with host memory for all of it."""
    if model == "default":
        known = EngineConfig(model=str(report.ROOT / "models" / "tiny" / "checkpoint"), dtype="float32")
    else:
        raw = {"153m": LLAMA_153M, "wide": WIDE}[model]
        known = EngineConfig(architecture=ModelConfig.from_hf(raw), load_format="dummy", skip_tokenizer_init=True)
    return dataclasses.replace(
        known,
        max_model_len=LENGTHS[-1],
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=BUDGET),
        cache=CacheConfig(num_pages=PAGES, swap_space=0.5),
        token_buckets=tuple(length for length in LENGTHS if length <= BUDGET),
    )


class Costs:
    """A started runner that carries out steps and swaps and waits for each."""

    def __init__(self, model: str):
        self._runner = ModelRunner(configuration(model))
        self.shapes = self._runner._shapes
        costs = self._runner.info.preemption_costs
        assert costs is not None
        self.costs = costs

    def recompute(self, tokens: int) -> None:
        """A prompt of that length, in steps of the budget."""
        for start in range(0, tokens, BUDGET):
            row = prompt_row(self.shapes, 0, 1, start, min(tokens, start + BUDGET))
            plan = prefill_plan(self.shapes, (row,))
            self._runner._forward(self.shapes.forward_key(plan), plan)
        jax.block_until_ready(self._runner._hidden)

    def swap(self, tokens: int) -> None:
        """The pages of a sequence of that length, out and in."""
        out, back = swap_plans(-(-tokens // self.shapes.page_size))
        self._swap(out)
        self._swap(back)

    def _swap(self, swap: Swap) -> None:
        self._runner._swap(swap)
        self._runner._host_pages.wait()
        jax.block_until_ready(self._runner._pools)


def timed(call: Callable[[], None]) -> float:
    """Seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rule(costs: PreemptionCosts, page_size: int) -> Preemption:
    """The scheduler's own, with these costs."""
    config = PreemptionConfig(preemption_mode="auto")
    return Preemption(config, POLICIES["fcfs"](PolicyConfig(), Pace()), page_size, costs)


def measure(model: str, repeats: int) -> dict[str, Any]:
    """Medians of each length, the costs measured at start, and where swapping begins to pay."""
    engine = Costs(model)
    chooses = rule(engine.costs, engine.shapes.page_size)
    rows = []
    for length in LENGTHS:
        seconds: dict[str, list[float]] = {"recompute": [], "swap": []}
        for _ in range(repeats + 1):
            seconds["recompute"].append(timed(lambda length=length: engine.recompute(length)))
            seconds["swap"].append(timed(lambda length=length: engine.swap(length)))
        recompute, swap = (statistics.median(found[1:]) for found in seconds.values())
        chosen = "swap" if chooses.prefers_swap(length) else "recompute"
        rows.append(
            {
                "tokens": length,
                "recompute_ms": recompute * 1e3,
                "swap_ms": swap * 1e3,
                "rule_recompute_ms": engine.costs.recompute_seconds_per_token * length * 1e3,
                "rule_swap_ms": engine.costs.swap_seconds_per_page * -(-length // engine.shapes.page_size) * 1e3,
                "cheaper": "swap" if swap < recompute else "recompute",
                "rule_chooses": chosen,
                "chosen_over_cheaper": (swap if chosen == "swap" else recompute) / min(swap, recompute),
            }
        )
    return {
        "model": model,
        "page_bytes": token_bytes(engine.shapes) * engine.shapes.page_size,
        "costs": dataclasses.asdict(engine.costs),
        "lengths": rows,
        "crossings_tokens": crossings(rows),
    }


def crossings(rows: list[dict[str, Any]]) -> list[float]:
    """Lengths at which the cheaper way changes, interpolated between two measured ones on logarithmic axes."""
    found = []
    for one, other in itertools.pairwise(rows):
        a, b = (math.log(row["swap_ms"] / row["recompute_ms"]) for row in (one, other))
        if a * b < 0:
            share = a / (a - b)
            found.append(one["tokens"] ** (1 - share) * other["tokens"] ** share)
    return found


def plot(models: list[dict[str, Any]], path: pathlib.Path) -> None:
    """A panel a model: seconds of both ways as measured, and as the rule foresees them."""
    figure = Figure(figsize=(4.6 * len(models), 4.4), layout="constrained")
    axes = figure.subplots(1, len(models), squeeze=False)[0]
    for axis, found in zip(axes, models, strict=True):
        lengths = [row["tokens"] for row in found["lengths"]]
        for way, color, marker in (("recompute", "tab:orange", "o"), ("swap", "tab:blue", "s")):
            axis.plot(lengths, [row[f"{way}_ms"] for row in found["lengths"]], color=color, marker=marker, label=way)
            foreseen = [row[f"rule_{way}_ms"] for row in found["lengths"]]
            axis.plot(lengths, foreseen, color=color, linestyle=":", label=f"{way}, as the rule foresees")
        for number, tokens in enumerate(found["crossings_tokens"]):
            label = "measured crossing" if not number else None
            axis.axvline(tokens, color="grey", linestyle="--", label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(lengths, [f"{length:,}" for length in lengths], rotation=45)
        axis.set_xlabel("tokens of the sequence")
        axis.set_ylabel("time to bring it back (ms)")
        axis.set_title(f"{found['model']}: {found['page_bytes'] / 1000:,.0f} kB a page of 16 tokens", fontsize=10)
        axis.grid(visible=True, which="major", alpha=0.3)
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles))
    figure.savefig(path, dpi=120)


def main() -> int:
    """Prints the tables and writes the results; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="default,153m,wide", help="default, 153m and wide, separated by commas")
    parser.add_argument("--repeats", type=int, default=7, help="of each length, after one that does not count")
    options = parser.parse_args()
    results = [measure(model, options.repeats) for model in options.models.split(",")]
    name = f"preemption_cost_jax{report.versions()['jax']}"
    path = report.write(name, vars(options) | {"budget": BUDGET}, results)
    plot(results, report.RESULTS / f"{name}.png")
    print(report.describe())
    header = ("tokens", "recompute_ms", "swap_ms", "cheaper", "rule_chooses", "chosen_over_cheaper")
    for found in results:
        token, page = (seconds * 1e6 for seconds in found["costs"].values())
        crossing = ", ".join(f"{tokens:.0f}" for tokens in found["crossings_tokens"]) or "none"
        print(
            f"\n{found['model']}: measured at start {token:.1f} us a token, {page:.1f} us a page; crossing: {crossing}"
        )
        print(report.table(header, [[row[field] for field in header] for row in found["lengths"]]))
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
