"""The tables of pages of docs/, written from the files of results:

    python -m benchmarks.experiments.tables

On a page, `<!-- table NAME -->` stands before the table of that name in `TABLES`. A test holds pages to files.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import report
from benchmarks.experiments import cases
from benchmarks.experiments.cases import Panel

PAGES = tuple(report.ROOT / "docs" / name for name in ("preemption.md", "scheduling.md", "simulator.md"))
BOTH = ("engine", "simulation")
MOST_COLUMNS = 7
"""Maximum number of columns of a table: more are not read on a page."""
_MARK = re.compile(r"(<!-- table (\S+) -->\n\n)(?:\|[^\n]*\n|\n(?=\|))*")
_PREEMPTION_COST = "preemption_cost_jax0.11.2"
_MOONCAKE = "experiments/mooncake_cache_simulation"


def results(name: str) -> Any:
    """What results/NAME.json holds."""
    return json.loads((report.RESULTS / f"{name}.json").read_text(encoding="utf-8"))["results"]


def number(value: float | None) -> str:
    """Three figures, or all of them before the point; a dash where there is no value."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of a page; columns of numbers are flush right."""
    rule = [
        "---:" if all(cell[:1].isdigit() or cell == "–" for cell in column) else "---"
        for column in zip(*rows, strict=True)
    ]
    rule[0] = "---"
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows)) + "\n"


def down(experiment: str, sides: Sequence[str], columns: Sequence[Panel], series: str | None = None) -> str:
    """A row for each case, of one series or of all; a table for each side, and two where it has too many columns."""
    parts = -(-len(columns) // (MOST_COLUMNS - 1))
    size = -(-len(columns) // parts)
    tables = []
    for side in sides:
        mine = [row for row in _cases(experiment, side) if series in (None, row["series"])]
        # With as many series as cases a series is only a color of a plot; with fewer it tells cases apart.
        ambiguous = len({row["case"] for row in mine}) < len(mine)
        names = [f"{row['series']}: {row['case']}" if ambiguous else row["case"] for row in mine]
        for start in range(0, len(columns), size):
            part = columns[start : start + size]
            head = [side if len(sides) > 1 else "", *(panel.column for panel in part)]
            tables.append(markdown(head, [[name, *_cells(row, part)] for name, row in zip(names, mine, strict=True)]))
    return "\n".join(tables)


def across(experiment: str, side: str, corner: str, columns: Sequence[Panel]) -> str:
    """A column for each x; for each series a row for each figure."""
    found = _cases(experiment, side)
    places = sorted({row["x"] for row in found})
    rows = []
    for series in dict.fromkeys(row["series"] for row in found):
        cells = {row["x"]: _cells(row, columns) for row in found if row["series"] == series}
        for place, panel in enumerate(columns):
            rows.append([f"{series}: {panel.column}", *(cells[x][place] if x in cells else "–" for x in places)])
    return markdown([corner, *map(number, places)], rows)


def papers() -> str:
    """The published ratios beside this scheduler's."""
    rows = []
    for claim in results("experiments/papers_simulation")["claims"]:
        here = f"{claim['measured']:.2f}" if claim["measured"] < 1 else f"{claim['measured']:.1f}x"
        rows.append([claim["name"], claim["figure"], here, claim["published"], claim["why"]])
    return markdown(["what", "figure", "here", "published", "why it differs"], rows)


def fleets() -> str:
    """Replicas and their seconds against the latency of requests."""
    columns = (
        Panel("replicas_mean", "replicas", ""),
        Panel("replica_seconds_per_million_tokens", "replica-s per million tokens", ""),
        cases.TTFT,
        _named("p99 TTFT ms", cases.TTFT_P99),
        Panel("in_time", "first token within 1 s, %", "", 100),
    )
    rows = [[row["fleet"], *_cells(row, columns)] for row in results("experiments/fleets_simulation")["fleets"]]
    return markdown(["fleet", *(panel.column for panel in columns)], rows)


def mooncake_replayed() -> str:
    """What a pool alone finds of the Mooncake trace, by its size: tokens, and seconds of prompts saved."""
    found = results(_MOONCAKE)["replayed"]
    sizes = list(dict.fromkeys(row["pool_tokens"] for row in found))
    rows = []
    for key, what in (("hit_rate", "tokens found %"), ("saved", "seconds saved %")):
        for policy in dict.fromkeys(row["policy"] for row in found):
            shares = {row["pool_tokens"]: 100 * row[key] for row in found if row["policy"] == policy}
            rows.append([f"{policy}: {what}", *(number(shares.get(size)) for size in sizes)])
    heads = ["without end" if size is None else number(size / 1e6) for size in sizes]
    return markdown(["million tokens in the pool", *heads], rows)


def mooncake_simulated() -> str:
    """The Mooncake trace under the scheduler, by size of the pool and eviction policy."""
    rows = [
        [
            "no prefix cache" if row["policy"] == "none" else row["policy"],
            number(row["pool_tokens"] / 1e6),
            *(number(100 * row[key]) for key in ("hit_rate",)),
            *(number(row[key]) for key in ("ttft_mean", "ttft_p99")),
            *(number(100 * row[key]) for key in ("in_time", "device_utilization")),
            number(row["preemptions"]),
        ]
        for row in results(_MOONCAKE)["simulated"]
    ]
    head = ["policy", "million tokens", "tokens found %", "TTFT s", "p99", "first token within 5 s, %", "device busy %"]
    return markdown([*head, "preemptions"], rows)


def simulation_check() -> str:
    """Simulation over engine: the median over the rounds, and the least and the greatest."""
    figures = {"throughput": "throughput", "ttft": "mean TTFT", "tpot": "mean TPOT"}
    rows = [
        [row["workload"], row["policy"], *(_ratio(row["ratio"][key]) for key in figures)]
        for row in results("simulation_check_jax0.11.2")
    ]
    return markdown(["workload", "policy", *figures.values()], rows)


def preemption_lengths() -> str:
    """A sequence brought back both ways, by its length."""
    models = results(_PREEMPTION_COST)
    head = ["tokens"]
    rows: dict[int, list[str]] = {}
    for model in models:
        head += [f"{model['model']}: computed again ms", "swapped ms", "the rule chose"]
        for row in model["lengths"]:
            cells = [number(row["recompute_ms"]), number(row["swap_ms"]), row["rule_chooses"]]
            rows.setdefault(row["tokens"], []).extend(cells)
    return markdown(head, [[number(tokens), *cells] for tokens, cells in rows.items()])


def preemption_links() -> str:
    """The same sequence behind slower and slower links: what is cheaper and what the rule chose."""
    rows = []
    for model in results(_PREEMPTION_COST):
        for row in model["links"]:
            cells = [row["cheaper"], row["rule_chooses"], f"{row['chosen_over_cheaper']:.2f}"]
            times = [number(row["link"]), number(row["recompute_ms"]), number(row["swap_ms"])]
            rows.append([model["model"], *times, *cells])
    head = ["model", "link's seconds times", "computed again ms", "swapped ms", "cheaper", "the rule chose"]
    return markdown([*head, "chosen over cheaper"], rows)


def _ratio(found: Mapping[str, float]) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f})"


def _cases(experiment: str, side: str) -> list[dict[str, Any]]:
    return results(f"experiments/{experiment}_{side}")["cases"]


def _cells(row: Mapping[str, Any], columns: Sequence[Panel]) -> list[str]:
    values = [(row.get(panel.key), panel.factor) for panel in columns]
    return [number(None if value is None else value * factor) for value, factor in values]


def _named(column: str, panel: Panel, tenant: str = "") -> Panel:
    return dataclasses.replace(panel, column=column, key=f"{tenant}.{panel.key}" if tenant else panel.key)


_MODES = (
    cases.THROUGHPUT,
    cases.TTFT,
    cases.TTFT_P99,
    _named("p99 e2e s", cases.E2E_P99),
    cases.UTILIZATION,
    cases.TAU,
)
_POLICIES = (
    cases.THROUGHPUT,
    cases.TTFT,
    cases.TTFT_P99,
    cases.E2E,
    cases.E2E_P99,
    _named("TTFT of chat ms", cases.TTFT, "chat"),
    _named("code", cases.TTFT, "code"),
    _named("write", cases.TTFT, "write"),
    cases.UTILIZATION,
    cases.IN_TIME,
    _named("Jain index", cases.JAIN),
    cases.TAU,
)
_PREDICTION = (cases.TTFT, cases.E2E, _named("p99 e2e", cases.E2E_P99), cases.TAU)
_FORMATIONS = (cases.THROUGHPUT, cases.TTFT, cases.TTFT_P99, cases.E2E, cases.UTILIZATION, cases.TAU)
_BATCH_SIZE = (cases.THROUGHPUT, cases.SERVICE, cases.SERVICE_P99, cases.TPOT)
_CHUNKED = (
    Panel("decoding.itl_max", "longest gap ms", "", 1e3),
    Panel("prompt.ttft_mean", "long TTFT ms", "", 1e3),
)
_MIXED = (
    _named("short TTFT ms", cases.TTFT, "short"),
    _named("p99", cases.TTFT_P99, "short"),
    _named("short p99 ITL", cases.ITL_P99, "short"),
    _named("short e2e s", cases.E2E, "short"),
    _named("long e2e s", cases.E2E, "long"),
)
_PAGED = (cases.THROUGHPUT, _named("sequences a step", cases.SEQUENCES))
_PREEMPTION = (cases.THROUGHPUT, cases.TTFT, cases.E2E, cases.PREEMPTIONS, cases.SWAPPED)
_PROFILE = (
    cases.THROUGHPUT,
    cases.TTFT,
    _named("p99 TTFT ms", cases.TTFT_P99),
    cases.ITL_P99,
    cases.UTILIZATION,
    cases.TAU,
)
_AGENTS = (
    cases.TTFT,
    _named("p99 TTFT ms", cases.TTFT_P99),
    _named("goodput, requests/s", cases.GOODPUT),
    cases.HIT_RATE,
)
_CHUNK_SIZE = (
    *_CHUNKED,
    _named("p99", Panel("prompt.ttft_p99", "", "", 1e3)),
    Panel("decoding.tpot_mean", "TPOT ms", "", 1e3),
    cases.UTILIZATION,
)
_HEAD_OF_LINE = (
    _named("short TTFT ms", cases.TTFT, "short"),
    _named("p99", cases.TTFT_P99, "short"),
    _named("long e2e s", cases.E2E, "long"),
    cases.THROUGHPUT,
    cases.PREEMPTIONS,
)

TABLES: dict[str, Callable[[], str]] = {
    "modes-at-once": functools.partial(down, "modes", BOTH, _MODES, "all at once"),
    "modes-arriving": functools.partial(down, "modes", BOTH, _MODES, "arriving at 60 % of capacity"),
    "policies-engine": functools.partial(down, "policies", ["engine"], _POLICIES),
    "policies-simulation": functools.partial(down, "policies", ["simulation"], _POLICIES),
    "prediction": functools.partial(down, "prediction", BOTH, _PREDICTION),
    "formations-engine": functools.partial(down, "formations", ["engine"], _FORMATIONS),
    "formations-simulation": functools.partial(down, "formations", ["simulation"], _FORMATIONS),
    "batch-size": functools.partial(down, "batch_size", BOTH, _BATCH_SIZE),
    "chunked-prefill": functools.partial(across, "chunked_prefill", "simulation", "tokens of a long prompt", _CHUNKED),
    "chunk-size-engine": functools.partial(down, "chunk_size", ["engine"], _CHUNK_SIZE),
    "chunk-size-simulation": functools.partial(down, "chunk_size", ["simulation"], _CHUNK_SIZE),
    "mixed-lengths": functools.partial(down, "mixed_lengths", BOTH, _MIXED),
    "head-of-line": functools.partial(down, "head_of_line", BOTH, _HEAD_OF_LINE),
    "paged": functools.partial(across, "paged", "simulation", "tokens of the pool", _PAGED),
    "preemption": functools.partial(down, "preemption", BOTH, _PREEMPTION),
    "load-profile-engine": functools.partial(across, "load_profile", "engine", "load", _PROFILE),
    "load-profile-simulation": functools.partial(across, "load_profile", "simulation", "load", _PROFILE),
    "papers": papers,
    "fleets": fleets,
    "simulation-check": simulation_check,
    "mooncake-replayed": mooncake_replayed,
    "mooncake-simulated": mooncake_simulated,
    "agent-policies": functools.partial(
        across, "agent_policies", "simulation", "agents that begin in a second", _AGENTS
    ),
    "preemption-lengths": preemption_lengths,
    "preemption-links": preemption_links,
}


def filled(text: str) -> str:
    """The text of a page with every table written anew; KeyError for a name that is not in `TABLES`."""
    return _MARK.sub(lambda found: found[1] + TABLES[found[2]](), text)


def names(text: str) -> list[str]:
    """The tables that a page has, in order."""
    return [found[2] for found in _MARK.finditer(text)]


def main(pages: Sequence[pathlib.Path] = PAGES) -> int:
    """Writes the tables of the pages; returns the exit status."""
    for page in pages:
        text = page.read_text(encoding="utf-8")
        page.write_text(filled(text), encoding="utf-8")
        print(f"{page.name}: {', '.join(names(text))}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
