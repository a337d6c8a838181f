"""The serving benchmark from its command line to its result file, against a real gRPC server over an echo engine."""

from __future__ import annotations

import json
import math
import re
import time

import pytest

from benchmarks import report, serving
from benchmarks.load import runs
from benchmarks.load.datasets import LoadRequest
from benchmarks.load.runs import Target
from benchmarks.serving import Served
from benchmarks.sides.side_process import Run
from benchmarks.work import Work
from tests.server.fakes import EchoEngine
from tests.server.harness import serving_in_thread


@pytest.fixture
def results(tmp_path, monkeypatch):
    """The folder of result files."""
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    return tmp_path / "results"


def run(address: str, *arguments: str) -> int:
    sizes = ("--num-prompts", "6", "--inputs", "2,9", "--outputs", "2,12", "--warmup-prompts", "2")
    return serving.main(["--address", address, *sizes, *arguments, "--name", "trial"])


def test_a_sweep_with_slow_readers(results, capsys, monkeypatch):
    step = EchoEngine._step
    # Slow enough that tokens do not all come in one message.
    monkeypatch.setattr(EchoEngine, "_step", lambda engine: (time.sleep(0.005), step(engine)))
    with serving_in_thread(None) as served:
        extra = ("--slow-readers", "0.5", "--slow-pause", "0.01", "--repeats", "2", "--goodput", "ttft:60000")
        assert run(served.address, "--rates", "400,100", *extra) == 0
    document = json.loads((results / "trial.json").read_text())
    found = document["results"]
    assert [one["request_rate"] for one in found["sweep"]] == [100.0, 400.0, "inf"]
    for one in found["sweep"]:
        assert (one["completed"], one["failed"]) == (6, 0)
        assert one["request_goodput"] == pytest.approx(one["request_throughput"])
        assert one["total_output_tokens"] == found["sweep"][0]["total_output_tokens"]
    slow = found["slow_readers"]
    for one in slow["rounds"]:
        assert one["all_fast"]["others"]["completed"] == one["with_slow"]["others"]["completed"] == 3
        assert one["with_slow"]["slow"]["completed"] == 3
        assert one["all_fast"]["others"]["total_output_tokens"] == one["with_slow"]["others"]["total_output_tokens"]
        assert one["all_fast"]["slow"]["completed"] == 3
    assert len(slow["growth_of_p99_itl"]["rounds"]) == 2
    pooled = [slow["others_pooled"][name]["p99_itl_ms"] for name in ("all_fast", "with_slow")]
    assert slow["growth_of_pooled_p99_itl"] == pytest.approx(pooled[1] / pooled[0] - 1)
    assert found["server"]["num_compilations"] == 0
    assert (results / "trial.png").exists()
    assert document["settings"]["dataset"] == "random"
    assert served.address not in json.dumps(document)
    assert "growth of the others' p99 time between tokens" in capsys.readouterr().out


def test_a_failed_request_fails_the_run(results, capsys):
    with serving_in_thread(None) as served:
        assert run(served.address, "--inputs", "254,254", "--outputs", "250,250", "--repeats", "1") == 1
    assert "6 requests failed" in capsys.readouterr().err


def test_a_trace_keeps_its_arrivals(results, tmp_path):
    trace = tmp_path / "trace.csv"
    lines = [f"2023-11-16 18:15:{second:02d}.5000000,{5 + second},4" for second in range(3)]
    trace.write_text(
        "\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines, "2023-11-16 18:16:00.0,900,1"]) + "\n"
    )
    with serving_in_thread(None) as served:
        arguments = ("--dataset", "trace", "--trace", str(trace), "--trace-scale", "50", "--repeats", "1", "--details")
        assert run(served.address, *arguments) == 0
    (found,) = json.loads((results / "trial.json").read_text())["results"]["runs"]
    assert found["request_rate"] == "trace"
    assert found["input_lens"] == [5, 6, 7]  # the last one is longer than the context
    assert found["output_lens"] == [4, 4, 4]
    assert found["duration"] >= 2 / 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "trace"], "go together"),
        (["--address", "host:1", "--offline"], "leave --address out"),
        (["--slow-readers", "1"], "--slow-readers is 1.0"),
        (["--goodput", "itl:3"], "is not METRIC:MS"),
    ],
)
def test_faulty_options(arguments, message, capsys):
    with pytest.raises(SystemExit):
        serving.parse(arguments)
    assert re.search(message, capsys.readouterr().err)


def test_another_repeat_has_other_ids_of_the_same_lengths():
    options = serving.parse(["--num-prompts", "9"])
    first, second = (serving.make_requests(options, Served(500, 1024), repeat) for repeat in (0, 1))
    assert [len(request.prompt) for request in first] == [len(request.prompt) for request in second]
    assert all(one.prompt != other.prompt for one, other in zip(first, second, strict=True))


class Offline:
    """An offline engine that takes the seconds that it is told."""

    def __init__(self, seconds: list[float]):
        self.seconds, self.works = list(seconds), []

    def run(self, work: Work) -> Run:
        self.works.append(work)
        return Run(self.seconds.pop(0), work.most_output_tokens, 1.0, {})

    def settle(self) -> None:
        pass


def test_the_share_of_offline_throughput_is_taken_within_a_round():
    offline = Offline([9.0, 0.5, 2.0])

    def requests(repeat: int) -> list[LoadRequest]:
        return [LoadRequest([10 + repeat] * 4, 5)] * 3

    with serving_in_thread(None) as served:
        target = Target(served.address, 0, 1.0, None, {}, 1.0, 0, details=False)
        found = runs.beside_offline(target, offline, requests, 2)  # pyright: ignore[reportArgumentType]
    assert [one["offline_output_throughput"] for one in found["rounds"]] == [15 / 0.5, 15 / 2.0]
    for one, share in zip(found["rounds"], found["ratio"]["rounds"], strict=True):
        assert share == pytest.approx(one["serving"]["output_throughput"] / one["offline_output_throughput"])
        assert one["serving"]["total_output_tokens"] == 15
    assert [work.prompts[0][0] for work in offline.works] == [10, 11, 12]


def test_rates_of_a_sweep_follow_from_saturation(monkeypatch):
    asked = []

    def load(target, requests, rate):
        asked.append((rate, len(requests)))
        zero = dict.fromkeys(("duration", "completed", "failed", "output_throughput"), 0)
        zero |= dict.fromkeys(f"{name}_ms" for name in ("mean_ttft", "p99_ttft", "mean_tpot", "p99_itl"))
        return zero | {"request_rate": rate, "request_throughput": 20.0, "request_goodput": None, "cpu_seconds": {}}

    monkeypatch.setattr(runs, "load", load)
    requests = [LoadRequest([1], 1)] * 100
    runs.sweep(Target("x", 0, 1.0, None, {}, 1.0, 0, details=False), requests, None, most_seconds=4.0)
    assert asked[0] == (math.inf, 100)
    assert asked[1:] == [(share * 20, max(20, round(min(100, share * 80)))) for share in runs.SWEEP]
