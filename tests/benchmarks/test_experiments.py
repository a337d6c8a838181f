"""The harness of the experiments, over a runner without a model and over the simulator."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest

from benchmarks import report
from benchmarks.experiments import __main__ as all_experiments
from benchmarks.experiments import experiment_plots as plots
from benchmarks.experiments import fleets, harness, mooncake_cache
from benchmarks.experiments.cases import EXPERIMENTS, TTFT, Case, Experiment, Panel, Scale
from benchmarks.experiments.run_figures import jain_index, summary
from benchmarks.experiments.sides import EngineSide, SimulationSide
from jaxserve.config.settings import EVICTION_POLICIES
from jaxserve.runner.fake import FakeRunner
from jaxserve.simulator.conversations import ConversationConfig, conversation_trace
from jaxserve.simulator.simulation import ClientRule
from jaxserve.simulator.traces import ROOT, make_trace
from jaxserve.telemetry.recorder import FirstToken, RequestArrived, RequestFinished, StepRecorded, TokensProduced

LIMITS = {"max_num_seqs": 4, "max_num_batched_tokens": 32}
TRACE = make_trace("mixed", np.zeros(9), [3, 9, 20] * 3, [1, 5, 12] * 3, tenants=["a", "b", "b"] * 3)


def make_side(name: str) -> EngineSide | SimulationSide:
    if name == "simulation":
        return SimulationSide(LIMITS | {"num_pages": 65})
    return EngineSide(LIMITS, FakeRunner(page_size=16, num_pages=65))


@pytest.mark.parametrize("name", ["engine", "simulation"])
@pytest.mark.parametrize("client", [ClientRule("exact"), ClientRule(40)])
@pytest.mark.parametrize("changes", [{}, {"concurrency": 2}, {"num_pages": 4}])
def test_requests_end_at_the_lengths_of_the_trace(name: str, client: ClientRule, changes: dict[str, Any]) -> None:
    """Whether a client's limit or a stop id ends them, open and closed loop, and where a small pool preempts."""
    run = make_side(name).run(Case("case", TRACE, client=client, **changes))
    ended = {event.request_id: event for event in run.events if isinstance(event, RequestFinished)}
    assert [ended[str(place)].output_tokens for place in range(9)] == TRACE.output_tokens.tolist()
    reason = "length" if client.max_tokens == "exact" else "stop"
    assert {event.reason for event in ended.values()} == {reason}
    steps = [event for event in run.events if isinstance(event, StepRecorded)]
    assert max(step.rows for step in steps) <= changes.get("concurrency", 4)
    if "num_pages" in changes:
        assert max(step.pages_used for step in steps) <= 4


@pytest.mark.parametrize("name", ["engine", "simulation"])
@pytest.mark.parametrize("concurrency", [None, 2])
def test_turns_of_sessions_come_one_after_another_and_share_pages(name: str, concurrency: int | None) -> None:
    config = ConversationConfig(sessions=4, rate=50, turns=3, shared=32, first=16, later=9, output=20, pause=0.01)
    trace = conversation_trace(dataclasses.replace(config, max_length=250))
    run = make_side(name).run(Case("case", trace, concurrency=concurrency))
    arrived = {event.request_id: event.time for event in run.events if isinstance(event, RequestArrived)}
    ended = {event.request_id: event for event in run.events if isinstance(event, RequestFinished)}
    for turn, parent in enumerate(trace.parents.tolist()):
        assert ended[str(turn)].output_tokens == trace.output_tokens[turn]
        if parent != ROOT:
            assert arrived[str(turn)] >= ended[str(parent)].time + trace.pauses[turn] - 1e-9
    row = summary(run)
    assert row["cached_tokens"] == run.cached_tokens
    assert 0.4 < row["hit_rate"] < 1.0


@pytest.mark.parametrize("name", ["engine", "simulation"])
def test_a_stand_in_predictor_decides_who_is_shortest(name: str) -> None:
    """With the order of lengths turned round, shortest-first takes the longest of those that wait."""

    class Reversed:
        kendall_tau = None

        def __init__(self, lengths: Any):
            self.lengths = lengths

        def expected(self, request: Any) -> float:
            return 100.0 - self.lengths[request.request_id]

        def observe(self, request: Any, output_tokens: int, expected: float) -> None:
            assert expected == self.expected(request)

    options = {"policy": "sjf", "max_num_seqs": 1}
    run = make_side(name).run(Case("case", TRACE, options=options, predictor=Reversed))
    first = [int(event.request_id) for event in run.events if isinstance(event, FirstToken)]
    lengths = TRACE.output_tokens[first].tolist()
    assert lengths[1:] == sorted(lengths[1:], reverse=True)


def test_summary_of_events_worked_by_hand() -> None:
    run = make_side("simulation").run(Case("case", TRACE, options={"mode": "none"}))
    tokens = sum(len(event.request_ids) for event in run.events if isinstance(event, TokensProduced))
    row = summary(run)
    assert row["completed"] == row["requests"] == 9
    assert row["output_tokens_per_second"] * row["seconds"] == pytest.approx(tokens) == TRACE.output_tokens.sum()
    assert row["sequences"] == 1.0
    assert row["a.requests"] == 3
    assert row["e2e_p99"] <= row["seconds"]
    assert summary(run, row["ttft_p50"])["in_time"] == pytest.approx(5 / 9)


def test_jain_index() -> None:
    assert jain_index([3.0, 3.0, 3.0]) == pytest.approx(1.0)
    assert jain_index([5.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)
    assert jain_index([0.0]) is None


def test_a_load_is_a_share_of_what_the_side_can_do() -> None:
    side = make_side("simulation")
    trace = dataclasses.replace(TRACE, arrivals=np.arange(9.0))
    experiment = Experiment("x", "?", lambda scale: [Case(f"{load}", trace, load=load) for load in (0.5, 1.0)], (TTFT,))
    half, full = harness.run_cases(experiment, side)
    assert full["requests_per_second_sent"] == pytest.approx(harness.capacity(side, Case("c", trace)))
    assert half["requests_per_second_sent"] == pytest.approx(full["requests_per_second_sent"] / 2)


def test_rounds_of_the_engine_are_medians() -> None:
    experiment = Experiment("x", "?", lambda scale: [Case("only", TRACE)], (TTFT,), engine_rounds=3)
    (row,) = harness.run_cases(experiment, make_side("engine"))
    assert row["output_tokens_per_second"] == sorted(row["rounds"])[1]
    assert len(row["rounds"]) == 3
    assert row["completed"] == 9


def test_two_chunks_beside_each_other_are_as_long_a_gap_as_a_limit_twice_as_large() -> None:
    side = SimulationSide({**harness.LIMITS["simulation"], **EXPERIMENTS["chunk_size"].limits["simulation"]})
    cases = {(case.series, case.x): case for case in EXPERIMENTS["chunk_size"].cases(side.scale)}
    assert [x for series, x in cases if series == "chunk size"] == [256, 512, 1024, 2048]
    assert [x for series, x in cases if series == "prefill limit of a step"] == [512, 2048, 8192]
    chunks, limit = (
        summary(side.run(cases[which])) for which in (("chunk size", 1024), ("prefill limit of a step", 2048))
    )
    assert chunks["decoding.itl_max"] == pytest.approx(limit["decoding.itl_max"], rel=0.02)
    assert limit["prompt.ttft_mean"] < 0.9 * chunks["prompt.ttft_mean"]  # the first of two ends before the second


def test_long_ones_that_give_way_let_short_ones_in_at_once() -> None:
    side = SimulationSide(harness.LIMITS["simulation"] | {"max_num_seqs": 8, "swap_space": 4.0})
    scale = dataclasses.replace(side.scale, prompt=200, output=100)
    keep, recompute, swap = (summary(side.run(case)) for case in EXPERIMENTS["head_of_line"].cases(scale)[1:])
    assert keep["preemptions"] == 0
    assert recompute["preemptions"] > 0
    assert swap["preempted_by_swap"] == swap["preemptions"] > 0
    assert max(recompute["short.ttft_p99"], swap["short.ttft_p99"]) < 0.1 * keep["short.ttft_p99"]
    assert keep["long.e2e_mean"] < recompute["long.e2e_mean"]


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="option 'speed' is unknown"):
        make_side("simulation").run(Case("case", TRACE, options={"speed": 11}))


def test_table_and_plot_show_every_case(tmp_path: Any) -> None:
    rows = [
        {"case": "one", "series": "s", "x": 1.0, "ttft_mean": 0.5, "a.ttft_mean": 0.25, "a.requests": 3},
        {"case": "flat", "series": "t", "x": None, "ttft_mean": 2.0, "a.ttft_mean": None, "a.requests": 0},
    ]
    experiment = Experiment("x", "?", lambda scale: [], (TTFT, Panel("a.ttft_mean", "", "a")), by_tenant=True)
    text = harness.table(experiment, rows)
    assert [line.split()[-1] for line in text.splitlines() if line.startswith(("one", "flat"))] == [
        "500",
        "2,000",
        "250",
        "-",
    ]
    for xlabel in ("", "number"):
        path = tmp_path / f"plot{xlabel}.png"
        plots.draw(dataclasses.replace(experiment, xlabel=xlabel), rows, "title", path)
        assert path.stat().st_size > 5000


def test_labels_of_fleets_that_cost_the_same_do_not_overlap(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

    drawn: list[Any] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (drawn.append(self), save(self, *args, **kw)))
    rows = [
        {"fleet": name, "replica_seconds_per_million_tokens": 800.0 + 200 * place, "ttft_p99": 1.0 / (place + 1),
         "changes": [[0.0, 2]]}
        for kind in ("fixed,", "forecast ewma, load", "forecast holt, load", "cost aware, price")
        for place, name in enumerate(one for one in fleets.FLEETS if one.startswith(kind))
    ]  # fmt: skip
    fleets.draw(rows, fleets.arrivals(), tmp_path / "fleets.png")
    axis = drawn[0].axes[0]
    places = [child.get_window_extent() for child in axis.get_children() if isinstance(child, Annotation)]
    assert len(places) == len(rows)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(places, 2))


def test_waits_are_drawn_on_an_axis_of_decades_where_batches_are_so_far_from_continuous() -> None:
    assert {panel.key for panel in EXPERIMENTS["max_wait"].panels if panel.log} == {"ttft_mean", "ttft_p99", "e2e_mean"}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_cases_of_every_experiment_are_valid(name: str) -> None:
    """Their settings exist and agree with the limits of both sides, and no two rows of a plot are one."""
    experiment = EXPERIMENTS[name]
    for side in experiment.sides:
        limits = harness.LIMITS[side] | experiment.limits.get(side, {})
        scale = Scale(side, 20, 64, 48, limits["max_num_seqs"], limits["max_num_batched_tokens"], limits)
        cases = experiment.cases(scale)
        assert len({(case.name, case.series) for case in cases}) == len(cases)
        for case in cases:
            if case.scheduler is None:
                EngineSide.configuration(limits | dict(case.options))


@pytest.mark.parametrize("arguments", [[], ["--simulate"], ["modes", "--all"]])
def test_all_results_are_written_over_only_when_asked_for(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        all_experiments.main(arguments)
    assert "give either names or --all, which writes over all results" in capsys.readouterr().err


def test_experiments_run_by_name_or_all(monkeypatch):
    ran = []
    monkeypatch.setattr(all_experiments.harness, "run", lambda experiment, options: ran.append(experiment))
    assert all_experiments.main(["modes", "--simulate"]) == 0
    assert len(ran) == 1
    assert all_experiments.main(["--all", "--simulate"]) == 0
    assert len(ran) == 1 + len(EXPERIMENTS)


def test_the_cache_of_a_trace_of_block_hashes_is_compared_with_its_bound(tmp_path, monkeypatch, capsys) -> None:
    chains = [[1, 2, 3], [1, 4], [1, 2, 3, 5], [6, 7], [1, 2, 3, 5, 8], [6, 7, 9]] * 3
    rows = [
        {"timestamp": 4000 * place, "input_length": 512 * len(ids) - 100, "output_length": 20, "hash_ids": ids}
        for place, ids in enumerate(chains)
    ]
    (tmp_path / "cake.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(mooncake_cache, "REPLAYED", (0.003, 1.0))
    monkeypatch.setattr(mooncake_cache, "SIMULATED", (1.0,))
    assert mooncake_cache.main([str(tmp_path / "cake.jsonl"), "--name", "cake"]) == 0
    found = json.loads((tmp_path / "cake.json").read_text())["results"]
    alone = {(row["policy"], row["pool_tokens"]): row["hit_rate"] for row in found["replayed"]}
    bound = alone["without end", None]
    assert bound == found["bounds"]["pages"]["512"] <= found["bounds"]["tokens_of_blocks"]
    for policy in EVICTION_POLICIES:
        small, large = (rate for (name, _), rate in alone.items() if name == policy)
        assert small < large == bound
    none, *cached = found["simulated"]
    assert none["hit_rate"] == 0.0
    for row in cached:
        assert row["hit_rate"] == pytest.approx(found["bounds"]["pages"]["64"])
        assert row["ttft_mean"] < none["ttft_mean"]
    assert (tmp_path / "cake.png").stat().st_size > 5000
    assert "of blocks" in (tmp_path / "cake.txt").read_text() + capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        mooncake_cache.main([])
