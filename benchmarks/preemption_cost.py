"""What a preempted sequence costs to bring back, by swapping or by computing it again, from 16 to 2,048 tokens.

    python -m benchmarks.preemption_cost [--models default,153m] [--repeats 7]

Each model starts as the engine does. A sequence of each length is then computed again, in steps of the token budget,
and its pages are copied to the host and back, in turns; both waited for. Beside the seconds stands what the cost rule
chooses from the two figures that were measured at start. Writes JSON and a plot to benchmarks/results/.

Where swapping is cheaper at every length, the lengths have no crossing. So the copies of one length are also repeated,
2 to 512 times over, as a host behind a link so many times slower would take: there the cheaper way changes, and the
rule is given the page's cost times as much.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from matplotlib.figure import Figure

from benchmarks import report
from benchmarks.work import SHAPES
from jaxserve.config.scheduling import PolicyConfig, PreemptionConfig
from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.kv_cache.page_pool import PageCopy
from jaxserve.models.config import ModelConfig
from jaxserve.planning.decode_roofline import token_bytes
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.runner.swap_timing import prefill_plan, prompt_row, swap_copies
from jaxserve.scheduler.policies.named import POLICIES
from jaxserve.scheduler.preemption import Preemption
from jaxserve.scheduler.preemption_costs import PreemptionCosts
from jaxserve.scheduler.step_time_estimator import StepTimeEstimator

LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)
BUDGET = 512
PAGES = 160
LINK_LENGTH = 256
FACTORS = tuple(2**power for power in range(10))


def configuration(model: str) -> EngineConfig:
    """One sequence of up to 2,048 tokens, with host memory for all of it."""
    if model == "default":
        known = EngineConfig(model=str(report.ROOT / "models" / "tiny" / "checkpoint"), dtype="float32")
    else:
        known = EngineConfig(
            architecture=ModelConfig.from_hf(SHAPES[model]), load_format="dummy", skip_tokenizer_init=True
        )
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
            self._runner.dispatch_forward(plan)
            self._runner.dispatch_sample(plan)
        jax.block_until_ready(self._runner._arrays.hidden)

    def swap(self, tokens: int) -> None:
        """The pages of a sequence of that length, out and in."""
        out, back = swap_copies(-(-tokens // self.shapes.page_size))
        self._copy(out)
        self._copy(back)

    def _copy(self, copies: Sequence[PageCopy]) -> None:
        self._runner._copy(copies)
        self._runner._host_pages.wait()
        jax.block_until_ready(self._runner._arrays.pools)


def timed(call: Callable[[], None]) -> float:
    """Seconds."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rule(costs: PreemptionCosts, page_size: int) -> Preemption:
    """The scheduler's own, with these costs."""
    config = PreemptionConfig(preemption_mode="auto")
    return Preemption(config, POLICIES["fcfs"](PolicyConfig(), StepTimeEstimator()), page_size, costs)


def compared(engine: Costs, costs: PreemptionCosts, tokens: int, factor: int, repeats: int) -> dict[str, Any]:
    """Medians of both ways, with every copy done `factor` times, beside what the rule foresees and chooses."""

    def swap() -> None:
        for _ in range(factor):
            engine.swap(tokens)

    turns = [(timed(lambda: engine.recompute(tokens)), timed(swap)) for _ in range(repeats + 1)]
    recompute, swapped = (statistics.median(seconds) for seconds in zip(*turns[1:], strict=True))
    page_size = engine.shapes.page_size
    chosen = "swap" if rule(costs, page_size).prefers_swap(tokens) else "recompute"
    return {
        "tokens": tokens,
        "link": factor,
        "recompute_ms": recompute * 1e3,
        "swap_ms": swapped * 1e3,
        "rule_recompute_ms": costs.recompute_seconds_per_token * tokens * 1e3,
        "rule_swap_ms": costs.swap_seconds_per_page * -(-tokens // page_size) * 1e3,
        "cheaper": "swap" if swapped < recompute else "recompute",
        "rule_chooses": chosen,
        "chosen_over_cheaper": (swapped if chosen == "swap" else recompute) / min(swapped, recompute),
    }


def measure(model: str, repeats: int) -> dict[str, Any]:
    """Both ways by length and by the link's slowness, and where the cheaper way changes."""
    engine = Costs(model)
    costs = engine.costs
    lengths = [compared(engine, costs, length, 1, repeats) for length in LENGTHS]
    links = []
    for factor in FACTORS:
        slower = dataclasses.replace(costs, swap_seconds_per_page=costs.swap_seconds_per_page * factor)
        links.append(compared(engine, slower, LINK_LENGTH, factor, repeats))
    foreseen = links[0]["rule_recompute_ms"] / links[0]["rule_swap_ms"]
    return {
        "model": model,
        "page_bytes": token_bytes(engine.shapes) * engine.shapes.page_size,
        "costs": dataclasses.asdict(costs),
        "lengths": lengths,
        "length_crossings": crossings(lengths, "tokens"),
        "links": links,
        "link_crossings": crossings(links, "link"),
        "link_crossing_of_the_rule": foreseen,
    }


def crossings(rows: list[dict[str, Any]], axis: str) -> list[float]:
    """Where on the axis the cheaper way changes, interpolated between two measured ones on logarithmic axes."""
    found = []
    for one, other in itertools.pairwise(rows):
        a, b = (math.log(row["swap_ms"] / row["recompute_ms"]) for row in (one, other))
        if a * b < 0:
            share = a / (a - b)
            found.append(one[axis] ** (1 - share) * other[axis] ** share)
    return found


def plot(models: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Two panels a model: time of both ways by length and by slowness of the link, measured and foreseen."""
    figure = Figure(figsize=(9.6, 3.9 * len(models) + 0.6), layout="constrained")
    panels = figure.subplots(len(models), 2, squeeze=False)
    for row, found in zip(panels, models, strict=True):
        label = f"{found['model']}, {found['page_bytes'] / 1000:,.0f} kB a page of 16 tokens"
        _panel(row[0], found["lengths"], "tokens", found["length_crossings"])
        row[0].set_xlabel("tokens of the sequence")
        row[0].set_title(label, fontsize=10)
        _panel(row[1], found["links"], "link", found["link_crossings"])
        row[1].set_xlabel("copies done so many times over")
        row[1].set_title(f"{found['model']}, a sequence of {LINK_LENGTH} tokens", fontsize=10)
    handles = {
        label: line for axis in panels.flat for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


def _panel(axis: Any, rows: list[dict[str, Any]], name: str, found: list[float]) -> None:
    places = [row[name] for row in rows]
    for way, color, marker in (("recompute", "tab:orange", "o"), ("swap", "tab:blue", "s")):
        axis.plot(places, [row[f"{way}_ms"] for row in rows], color=color, marker=marker, label=way)
        foreseen = [row[f"rule_{way}_ms"] for row in rows]
        axis.plot(places, foreseen, color=color, linestyle=":", label=f"{way}, as the rule foresees")
    for place in found:
        axis.axvline(place, color="grey", linestyle="--", label="measured crossing")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(places, [f"{place:,}" for place in places], rotation=45)
    axis.set_ylabel("time to bring it back (ms)")
    axis.grid(visible=True, which="major", alpha=0.3)


def main() -> int:
    """Prints the tables and writes the results; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="default,153m", help="default, 153m or 1b, separated by commas")
    parser.add_argument("--repeats", type=int, default=7, help="of each length, after one that does not count")
    options = parser.parse_args()
    results = [measure(model, options.repeats) for model in options.models.split(",")]
    name = f"preemption_cost_jax{report.versions()['jax']}"
    path = report.write(name, vars(options) | {"budget": BUDGET}, results)
    plot(results, report.RESULTS / f"{name}.png")
    print(report.describe())
    header = ("recompute_ms", "swap_ms", "cheaper", "rule_chooses", "chosen_over_cheaper")
    for found in results:
        token, page = (seconds * 1e6 for seconds in found["costs"].values())
        print(f"\n{found['model']}: measured at start {token:.1f} us a token, {page:.1f} us a page")
        for axis, rows, places in (("tokens", "lengths", "length"), ("link", "links", "link")):
            print(report.table((axis, *header), [[row[field] for field in (axis, *header)] for row in found[rows]]))
            print(f"crossing: {', '.join(f'{place:.1f}' for place in found[f'{places}_crossings']) or 'none'}")
        print(f"crossing of the rule: link {found['link_crossing_of_the_rule']:.1f}")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
