"""The serving benchmark's arithmetic against independent computations, and its requests."""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter

import pytest

from benchmarks.load import datasets
from benchmarks.load.arrivals import gamma_arrivals, scaled
from benchmarks.load.load_figures import Seen, figures, is_good, most_open, parse_goodput, statistics_ms
from benchmarks.load.load_plots import latency_against_throughput
from benchmarks.load.runs import line, slow_marks
from benchmarks.spread import spread
from jaxserve.models.tiny.tasks import KINDS, is_held_out
from jaxserve.simulator.trace_files import TraceRow


@pytest.mark.parametrize(("rate", "burstiness"), [(5.0, 1.0), (0.5, 0.25), (40.0, 4.0)])
def test_gaps_have_the_mean_and_the_variation_that_were_asked_for(rate, burstiness):
    times = gamma_arrivals(rate, burstiness, 40_000, seed=3)
    gaps = [later - sooner for sooner, later in itertools.pairwise(times)]
    assert times[0] == 0
    assert min(gaps) >= 0
    # The standard error of a mean of n gaps is cv / sqrt(n); five of them.
    variation = 1 / math.sqrt(burstiness)
    assert statistics.fmean(gaps) * rate == pytest.approx(1, abs=5 * variation / math.sqrt(len(gaps)))
    assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(variation, rel=0.05)


def test_arrivals_at_an_infinite_rate_are_all_at_once():
    assert gamma_arrivals(math.inf, 1.0, 3, seed=0) == [0.0, 0.0, 0.0]
    assert gamma_arrivals(2.0, 1.0, 0, seed=0) == []


@pytest.mark.parametrize(("rate", "burstiness"), [(0.0, 1.0), (-1.0, 1.0), (math.nan, 1.0), (1.0, 0.0)])
def test_faulty_arrivals(rate, burstiness):
    with pytest.raises(ValueError, match="must be above 0"):
        gamma_arrivals(rate, burstiness, 3, seed=0)


def test_a_traces_arrivals_keep_their_proportions():
    assert scaled([100.0, 104.0, 101.0], 2.0) == [0.0, 2.0, 0.5]
    with pytest.raises(ValueError, match="trace scale is 0"):
        scaled([1.0], 0.0)


def seen(sent: float, tokens: list[tuple[float, int]], *, wait: float = 0.0, error: str = "", prompt: int = 10) -> Seen:
    ended = tokens[-1][0] + 0.5 if tokens else sent + 1
    return Seen(sent - wait, sent, ended, tuple(tokens), prompt, error=error)


def test_times_of_one_request():
    one = seen(10.0, [(11.0, 1), (11.5, 1), (13.0, 3)], wait=2.0)
    assert one.ttft == 1.0
    assert one.latency == 3.0
    assert one.output_tokens == 5
    assert one.tpot == pytest.approx(2.0 / 4)
    assert one.itls == [0.5, 1.5]
    assert seen(10.0, [(11.0, 1)]).tpot is None
    assert seen(10.0, [(11.0, 1)]).itls == []


def test_figures_of_a_run():
    run = [
        seen(1.0, [(2.0, 1), (3.0, 1)], wait=1.0, prompt=5),
        seen(2.0, [(2.5, 1), (4.5, 2)], prompt=7),
        seen(2.5, [(3.0, 1)], error="INTERNAL: x", prompt=100),
        seen(3.0, [(5.5, 1)], prompt=9),
    ]
    found = figures(run, {"ttft": 1000.0, "tpot": 1000.0}, details=True)
    assert found["duration"] == 6.0  # from the first arrival at 0 to the last end at 6
    assert (found["completed"], found["failed"]) == (3, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (21, 6)
    assert found["request_throughput"] == pytest.approx(3 / 6)
    assert found["output_throughput"] == pytest.approx(6 / 6)
    assert found["total_token_throughput"] == pytest.approx(27 / 6)
    assert found["request_goodput"] == pytest.approx(2 / 6)  # the last one's first token came too late
    assert found["max_concurrent_requests"] == 4
    assert found["mean_ttft_ms"] == pytest.approx(1e3 * statistics.fmean([1.0, 0.5, 2.5]))
    assert found["median_tpot_ms"] == pytest.approx(1e3 * statistics.median([1.0, 1.0]))
    assert found["mean_itl_ms"] == pytest.approx(1e3 * statistics.fmean([1.0, 2.0]))
    assert found["std_e2el_ms"] == pytest.approx(1e3 * statistics.pstdev([2.0, 2.5, 2.5]))
    assert found["queue_times"] == [1.0, 0.0, 0.0, 0.0]
    assert found["itls"] == [[1.0], [2.0], [], []]
    assert found["errors"][2] == "INTERNAL: x"
    assert "ttfts" not in figures(run)
    assert figures(run)["request_goodput"] is None


def test_percentiles_are_interpolated():
    values = [0.001 * value for value in (5, 1, 4, 2, 3, 9)]
    found = statistics_ms("itl", values)
    exact = statistics.quantiles(values, n=100, method="inclusive")
    for part in (90, 95, 99):
        assert found[f"p{part}_itl_ms"] == pytest.approx(1e3 * exact[part - 1])
    assert statistics_ms("itl", [])["p99_itl_ms"] is None


def test_goodput_limits():
    assert parse_goodput(["ttft:500", "tpot:50.5"]) == {"ttft": 500.0, "tpot": 50.5}
    one = seen(0.0, [(0.4, 1), (1.4, 1)])
    assert is_good(one, {"ttft": 400.1, "tpot": 1000.1, "e2el": 1400.1})
    assert not is_good(one, {"tpot": 999.0})
    assert not is_good(one, {"e2el": 1399.0})
    assert not is_good(seen(0.0, [(0.1, 1)], error="x"), {"ttft": 500.0})
    assert is_good(seen(0.0, [(0.1, 1)]), {"tpot": 1.0})


@pytest.mark.parametrize("pair", ["itl:5", "ttft", "ttft:x", "ttft:0", "ttft:nan"])
def test_faulty_goodput_limits(pair):
    with pytest.raises(ValueError, match="is not METRIC:MS"):
        parse_goodput([pair])


def test_most_open_counts_overlaps():
    spans = [(0.0, 2.0), (1.0, 3.0), (2.0, 4.0), (2.5, 2.6)]
    moments = [moment for span in spans for moment in span]
    assert most_open(spans) == max(sum(begin <= moment < end for begin, end in spans) for moment in moments) == 3


@pytest.mark.parametrize(("count", "share"), [(10, 0.5), (7, 0.5), (9, 1 / 3), (5, 0.0)])
def test_slow_readers_are_spread_evenly(count, share):
    marks = slow_marks(count, share)
    assert len(marks) == count
    for end in range(count + 1):
        assert abs(sum(marks[:end]) - end * share) < 1


def test_a_spread():
    assert spread([3.0, 1.0, 2.0]) == {"rounds": [3.0, 1.0, 2.0], "min": 1.0, "median": 2.0, "max": 3.0}


def test_requests_of_a_trace_come_in_order_and_repeat_blocks():
    found = [
        TraceRow(3.0, 700, 5, blocks=(7, 9)),
        TraceRow(0.0, 600, 6, blocks=(7, 8)),
        TraceRow(4.5, 1200, 6, blocks=(1, 2, 3)),
    ]
    requests, skipped = datasets.trace_requests(found, 5, max_model_len=1000, vocab_size=100, seed=0)
    assert skipped == 1
    assert [len(request.prompt) for request in requests] == [600, 700]
    assert [request.max_tokens for request in requests] == [6, 5]
    assert [request.arrival for request in requests] == [0.0, 3.0]
    assert requests[0].prompt[:512] == requests[1].prompt[:512]
    assert requests[0].prompt[512:600] != requests[1].prompt[512:600]


def test_requests_of_a_trace_without_blocks_have_ids_of_their_own():
    rows = [TraceRow(float(number), 20, 3) for number in range(4)]
    requests, _ = datasets.trace_requests(rows, 3, max_model_len=100, vocab_size=1000, seed=0)
    assert len({tuple(request.prompt) for request in requests}) == 3


def test_prefixes_are_repeated_equally_often():
    requests = datasets.prefix_requests(12, 3, 40, 5, 7, vocab_size=500, seed=1)
    assert set(Counter(tuple(request.prompt[:40]) for request in requests).values()) == {4}
    assert len({tuple(request.prompt[40:]) for request in requests}) == 12
    assert {(len(request.prompt), request.max_tokens) for request in requests} == {(45, 7)}
    with pytest.raises(ValueError, match="num_prefixes is 13"):
        datasets.prefix_requests(12, 13, 40, 5, 7, vocab_size=500, seed=1)


def test_tasks_are_held_out_and_of_every_kind():
    requests = datasets.task_requests(50, seed=0)
    assert len(requests) == 50
    assert {request.kind for request in requests} == set(KINDS)
    assert all(is_held_out(request.prompt) and request.answer is not None for request in requests)
    work = datasets.as_work(requests)
    assert not work.ignore_eos
    assert work.prompts == [request.prompt for request in requests]


def test_a_plot_of_a_sweep_is_written(tmp_path):
    runs = [figures([seen(0.0, [(0.1 * number, 1), (0.3 * number, 1)])]) for number in (1, 2, 3)]
    latency_against_throughput(runs, "a title", tmp_path / "plot.png", offline=40.0)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_in_a_line():
    found = figures([seen(0.0, [(0.1, 1)])], {"ttft": 200.0})
    text = line(found | {"request_rate": "inf", "cpu_seconds": {"client": 0.25}, "exact_match": 0.5})
    for part in (
        "rate inf",
        "1 completed, 0 failed",
        "mean_ttft 100.0 ms",
        "p99_itl none",
        "50.0 % right",
        "client 0.25",
    ):
        assert part in text
