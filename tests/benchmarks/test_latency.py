"""The latency benchmark's arithmetic, and what it runs."""

from __future__ import annotations

import statistics

import pytest

from benchmarks import latency
from benchmarks.sides.side_process import Run


def test_a_repeat_is_the_batch_with_one_new_token_and_whole():
    options = latency.parse(["--batch-size", "3", "--input-len", "7", "--output-len", "5", "--repeats", "2"])
    works = latency.batches(options)
    assert [set(work.new_tokens) for work in works] == [{1}, {5}] * 3  # the first pair warms
    assert {len(prompt) for work in works for prompt in work.prompts} == {7}
    assert {len(work.prompts) for work in works} == {3}
    assert len({tuple(prompt) for work in works for prompt in work.prompts}) == 18  # no prompt comes twice


def test_figures_of_a_batch():
    first, whole = [0.1, 0.3, 0.2], [1.1, 1.7, 1.0]
    runs = [Run(seconds, 0, 2 * seconds, {}) for pair in zip(first, whole, strict=True) for seconds in pair]
    found = latency.figures(runs, output_len=5)
    assert found["avg_latency"] == pytest.approx(statistics.fmean(whole))
    assert found["latencies"] == whole
    assert found["percentiles"]["50"] == pytest.approx(1.1)
    assert found["median_ttft_ms"] == pytest.approx(200)
    assert found["p99_e2el_ms"] == pytest.approx(1e3 * statistics.quantiles(whole, n=100, method="inclusive")[98])
    assert found["mean_tpot_ms"] == pytest.approx(1e3 * statistics.fmean([1.0 / 4, 1.4 / 4, 0.8 / 4]))
    assert found["cpu_cores"] == pytest.approx(2.0)


@pytest.mark.parametrize("arguments", [["--output-len", "1"], ["--peers", "sglang"], ["--engine", "x"]])
def test_faulty_options(arguments, capsys):
    with pytest.raises(SystemExit):
        latency.parse(arguments)
    assert arguments[0] in capsys.readouterr().err
