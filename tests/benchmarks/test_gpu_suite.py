"""The GPU suite without a GPU: what it counts, what it survives, what it writes."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import gpu_suite
from benchmarks.gpu import child, counts, dense, device, kit
from benchmarks.gpu import llama_shape as llama
from benchmarks.gpu import products_part as products
from benchmarks.gpu import suite_pages as pages
from benchmarks.gpu import suite_plots as plots
from benchmarks.gpu import suite_process as process
from benchmarks.gpu import tune_part as tune
from benchmarks.gpu import values_part as values
from benchmarks.gpu.bundle_part import try_bundle, usable
from benchmarks.gpu.parts import PARTS, TUNING, Part
from benchmarks.gpu.record import FAILED, NOT_RUN, OK, RUNNING, STATUSES, AbsentError, Record, Settings, dumps
from jaxserve.config import gin_config
from jaxserve.config.settings import EngineConfig
from jaxserve.models.params import abstract_params, make_mesh
from jaxserve.pallas_kernels.paged_attention.triton import tuning

SCRIPT = process.ROOT / "benchmarks" / "gpu_suite.py"
ABOUT = {"tune": False, "probe": {"platform": "cpu"}, "commands": []}


def settings(output: pathlib.Path, mode: str = "cpu") -> Settings:
    return Settings(mode, "auto", str(output), str(output), None, 0)


def record(tmp_path: pathlib.Path, seconds: float = 60) -> Record:
    return Record(tmp_path / "parts" / "x.json", time.time() + seconds)


# What is counted


def test_operations_are_those_that_causality_leaves():
    heads = counts.Heads(kv_heads=2, group=3, head_dim=8)
    rows = [(1, 7), (5, 5), (3, 10), (0, 0)]
    seen = sum(place + 1 for new, length in rows for place in range(length - new, length))
    assert counts.attention_flops(heads, rows) == seen * 6 * (2 * 8 + 2 * 8)


def test_bytes_of_a_decode_are_those_of_keys_values_queries_and_results():
    heads = counts.Heads()
    assert counts.kv_bytes(heads, 1, 2) == 4096
    assert counts.attention_bytes(heads, [(1, 1000), (1, 24)], 2, 2) == 1024 * 4096 + 2 * 2 * 32 * 128 * 2
    assert counts.attention_bytes(heads, [(1, 1000)], 2, 1) == 1000 * 2048 + 2 * 32 * 128 * 2


def test_the_measured_model_is_that_of_llama_gin():
    config, _ = gin_config.build(EngineConfig, "llama.gin")
    assert config.architecture == llama.LLAMA_8B
    assert config.cache.page_size == llama.PAGE_SIZE
    assert config.scheduler.max_num_seqs == llama.engine_config(gpu=True).scheduler.max_num_seqs


def test_page_tables_use_every_page_but_the_null_page_before_one_comes_again():
    tables = np.concatenate([table.ravel() for table in device.page_tables(3, 4, 2, 13, 0)])
    assert sorted(tables[:12]) == list(range(1, 13))
    assert (tables[12:24] == tables[:12]).all()


# Values


@pytest.mark.parametrize("stored", ["", "int8", "float8_e4m3fn"])
def test_kernels_agree_with_the_float64_reference(stored: str):
    problem = dense.Problem(
        ((1, 9), (4, 20), (0, 0)), kv_heads=2, group=2, head_dim=64, dtype="float32", pool_dtype=stored,
        sliding_window=6, soft_cap=5.0, sinks=True,
    )  # fmt: skip
    result = values.check_attention(problem, "reference", 0)
    assert "reason" not in result
    assert result["relative_error"] < 1e-5


def test_a_wrong_value_and_nan_are_reasons_to_fail():
    expected = np.ones((4, 4))
    assert "reason" not in values.compare(expected + 1e-4, expected, 1e-3)
    assert "above" in values.compare(expected + 1e-2, expected, 1e-3)["reason"]
    assert "nan" in values.compare(np.where(np.eye(4), np.nan, 1.0), expected, 1e-3)["reason"]


def test_what_must_not_be_read_is_poisoned():
    inputs = dense.make_inputs(dense.Problem(((1, 17),), kv_heads=1, group=1, head_dim=64, dtype="float32"), 0)
    page, unread = inputs.page_table[0, 1], inputs.page_table[0, 2:]
    assert np.isnan(inputs.pool[0]).all()
    assert np.isnan(inputs.pool[page, :, :, 1:]).all()
    assert np.isfinite(inputs.pool[page, :, :, 0]).all()
    assert (unread >= inputs.pool.shape[0]).all()
    assert np.isnan(inputs.q[1:]).all()


# Keeping results


def test_a_failed_case_costs_only_itself(tmp_path: pathlib.Path):
    kept = record(tmp_path)

    def fail() -> dict[str, Any]:
        raise ValueError("broken")

    def miss() -> dict[str, Any]:
        raise AbsentError("no such library")

    kept.case("a", fail)
    kept.case("b", lambda: {"share": np.float32(0.5), "limit": float("nan")}, batch=np.int64(3))
    kept.case("c", miss)
    kept.case("d", lambda: {"reason": "wrong"})
    written = json.loads((tmp_path / "parts" / "x.json").read_text())["cases"]
    assert [case["status"] for case in written] == [FAILED, OK, "absent", FAILED]
    assert "fail" in written[0]["traceback"]
    assert str(process.ROOT) not in written[0]["traceback"]
    assert (written[1]["share"], written[1]["limit"], written[1]["batch"]) == (0.5, "nan", 3)
    assert child.verdict(kept)[0] == FAILED


def test_a_part_started_again_goes_on_after_the_case_that_ended_it(tmp_path: pathlib.Path):
    first = record(tmp_path)
    first.case("a", lambda: {"value": 1})
    first.cases.append({"case": "b", "status": RUNNING})
    first.write()
    second = record(tmp_path)
    again: list[str] = []
    assert second.case("a", lambda: again.append("a") or {}) is not None
    assert second.case("b", lambda: again.append("b") or {}) is None
    assert second.case("c", lambda: again.append("c") or {}) is not None
    assert again == ["c"]
    assert [case["status"] for case in second.cases] == [OK, FAILED, OK]


def test_the_budget_counts_from_the_first_case(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    clock = [1000.0]
    monkeypatch.setattr("benchmarks.gpu.record.time.time", lambda: clock[0])
    kept = Record(tmp_path / "parts" / "x.json", 2000.0, budget=20.0)
    clock[0] = 1500.0  # a process that was slow to start
    for label, later in (("a", 19.0), ("b", 2.0), ("c", 0.0)):
        kept.case(label, dict)
        clock[0] += later
    assert [case["status"] for case in kept.cases] == [OK, OK, NOT_RUN]


def test_nothing_is_started_when_the_time_is_up(tmp_path: pathlib.Path):
    kept = record(tmp_path, seconds=-1)
    kept.case("a", dict)
    assert [case["status"] for case in kept.cases] == [NOT_RUN]
    assert child.verdict(kept) == (NOT_RUN, "time")


# Processes


def test_a_process_that_hangs_is_ended_with_its_children(tmp_path: pathlib.Path):
    code = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
    code += "print('case', p.pid, flush=True); time.sleep(60)"
    heard: list[str] = []
    ended = process.run([sys.executable, "-c", code], tmp_path / "log", 3.0, env=os.environ, heard=heard.append)
    assert ended.status is None
    pid = int(heard[0].split()[1])
    deadline = time.monotonic() + 10
    while pathlib.Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        if state == "Z":  # ended; whoever inherited it has not looked yet
            return
        time.sleep(0.05)
    assert not pathlib.Path(f"/proc/{pid}").exists()


FAKE_PART = """
import json, os, pathlib, sys, time
sys.path.insert(0, {root!r})
from benchmarks.gpu.record import Record
name, folder = sys.argv[1], pathlib.Path(sys.argv[2]).parent
kept = Record(folder / "parts" / (name + ".json"), time.time() + 60)
kept.case("first", lambda: {{"value": 1}})
if name == "crashes":
    kept.case("second", lambda: os.abort())
    kept.case("third", lambda: {{"value": 3}})
if name == "hangs":
    kept.case("second", lambda: time.sleep(60))
kept.summary |= {{"status": "ok", "reason": ""}}
kept.write()
"""


def test_parts_that_crash_or_hang_cost_only_themselves(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(gpu_suite, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(gpu_suite, "START_SECONDS", 0.5)
    monkeypatch.setattr(gpu_suite, "REPORT_SECONDS", 0.0)
    code = FAKE_PART.format(root=str(process.ROOT))
    monkeypatch.setattr(process, "python", lambda module, *rest: [sys.executable, "-c", code, *rest])
    parts = [Part(name, name, seconds, 0) for name, seconds in (("crashes", 8), ("hangs", 3), ("fine", 8))]
    suite = gpu_suite.Suite(settings(tmp_path), parts, time.monotonic() + 30)
    suite.about = ABOUT
    written: dict[str, str] = {}

    def heard(line: str) -> None:
        """What is in the file by the time that a case is told: a suite that is killed then has lost nothing."""
        if line.startswith("   case "):
            cases = [
                case for part in json.loads((tmp_path / "suite.json").read_text())["parts"] for case in part["cases"]
            ]
            written[line.split()[1].rstrip(":")] = cases[-1]["case"]

    monkeypatch.setattr(gpu_suite, "say", heard)
    suite.run()
    assert written == {"first": "first", "third": "third"}
    crashes, hangs, fine = (suite.results[name] for name in ("crashes", "hangs", "fine"))
    assert [(case["case"], case["status"]) for case in crashes["cases"]] == [
        ("first", OK),
        ("second", FAILED),
        ("third", OK),
    ]
    assert hangs["status"] == FAILED
    assert hangs["reason"].startswith("time")
    assert [case["status"] for case in hangs["cases"]] == [OK, FAILED]
    assert fine["status"] == OK


def test_parts_without_time_are_not_run(tmp_path: pathlib.Path):
    suite = gpu_suite.Suite(settings(tmp_path), PARTS, time.monotonic())
    suite.about = ABOUT
    suite.run()
    suite.write(final=False)
    document = json.loads((tmp_path / "suite.json").read_text())
    assert {part["status"] for part in document["parts"]} == {NOT_RUN}
    check_document(document)


# The whole


def check_document(document: dict[str, Any]) -> None:
    """What every suite.json has."""
    assert document["benchmark"] == "gpu_suite"
    assert document["mode"] in ("gpu", "cpu")
    assert bool(document["note"]) == (document["mode"] == "cpu")
    assert {"date", "complete", "tune", "machine", "versions", "settings", "probe", "commands"} <= set(document)
    for part in document["parts"]:
        assert {"name", "title", "status", "reason", "seconds", "summary", "cases"} <= set(part)
        assert part["status"] in STATUSES
        for case in part["cases"]:
            assert case["status"] in STATUSES
            assert case["status"] == OK or case["reason"]


def test_the_suite_goes_on_with_results_and_tries_itself_on_a_cpu(tmp_path: pathlib.Path):
    measured = {"case": "copy 4 MiB", "status": OK, "gb_per_s": 123.0, "microseconds": 1.0}
    before = gpu_suite.Suite(settings(tmp_path), PARTS, 0)
    before.about = ABOUT | {"commands": [{"minutes": 9.0}]}
    before.results["environment"] = gpu_suite._entry(PARTS[0], OK, "") | {
        "cases": [measured],
        "summary": {"copy_bytes_per_s": 123e9},
    }
    earlier = tmp_path / "earlier.json"
    earlier.write_text(dumps(before.document(complete=False)))
    command = [sys.executable, str(SCRIPT), "--cpu", "--only", "environment,products", "--resume", str(earlier)]
    output = tmp_path / "output"
    done = subprocess.run([*command, "--output", str(output)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads((output / "suite.json").read_text())
    check_document(document)
    assert document["complete"]
    assert document["mode"] == "cpu"
    assert [command["minutes"] for command in document["commands"]] == [9.0, 9.0]
    environment, products_part = document["parts"]
    assert environment["cases"] == [measured]
    assert products_part["status"] == OK
    assert products_part["summary"]["copy_bytes_per_s"] == 123e9
    assert all(case["tflop_per_s"] > 0 for case in products_part["cases"])
    assert pages.CPU_NOTE in (output / "suite.md").read_text()
    assert {path.name for path in output.iterdir()} == {"suite.json", "suite.md", "suite.log"}


def test_what_a_command_did_not_end_is_run_again(tmp_path: pathlib.Path):
    cases = {"done": (OK, ""), "wrong": (FAILED, "above"), "under way": (RUNNING, ""), "cut": (NOT_RUN, "time")}
    part = Part("environment", "Machine", 10, 1)
    entry = gpu_suite._entry(part, RUNNING, "") | {
        "cases": [{"case": name, "status": status, "reason": reason} for name, (status, reason) in cases.items()]
    }
    absent = Part("peers_torch", "Peers in torch", 10, 1)
    suite = gpu_suite.Suite(settings(tmp_path), [part, absent], time.monotonic())
    suite.resume({"parts": [entry, gpu_suite._entry(absent, "absent", "torch is not here")]})
    assert gpu_suite.unfinished(suite.results["environment"], again=False)
    assert not gpu_suite.unfinished(suite.results["peers_torch"], again=True)
    kept = Record(settings(tmp_path).result("environment"), time.time() + 60)
    again: list[str] = []
    for name in cases:
        kept.case(name, lambda name=name: again.append(name) or {})
    assert again == ["under way", "cut"]


def test_results_of_something_else_are_not_gone_on_with(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    document = {"benchmark": "gpu_suite", "format": 1, "parts": []}
    (tmp_path / "suite.json").write_text(json.dumps(document))
    with pytest.raises(SystemExit):
        gpu_suite.main(["--output", str(tmp_path), "--resume", str(tmp_path / "suite.json")])
    assert "format 2" in capsys.readouterr().err
    assert (tmp_path / "suite.json").is_file()


def test_the_plan_fits_the_first_command():
    starts = 5 * len(PARTS)  # seconds
    assert starts + sum(part.budget for part in PARTS) <= 60 * gpu_suite.MINUTES - gpu_suite.REPORT_SECONDS
    assert all(part.case_seconds <= part.budget for part in (*PARTS, *TUNING))
    assert len(gpu_suite.RESULTS) <= 8
    for part in (*PARTS, *TUNING):
        assert importlib.util.find_spec(f"benchmarks.gpu.{part.name}_part") is not None


def test_a_kit_is_unpacked_as_it_was_packed(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    def compile_it(command: Sequence[str], **_: Any) -> None:
        made = pathlib.Path(command[-2])
        (made / "programs").mkdir()
        (made / "programs" / "decode_8").write_bytes(b"code" * 1000)
        (made / "manifest.json").write_text("{}")

    monkeypatch.setattr(kit.subprocess, "run", compile_it)
    kit.pack_bundle(tmp_path, "h200")
    assert (tmp_path / kit.BUNDLE).stat().st_size < 1000
    found = kit.unpack_bundle(tmp_path, tmp_path / "unpacked")
    assert found is not None
    assert (found / "programs" / "decode_8").read_bytes() == b"code" * 1000
    assert kit.unpack_bundle(found, tmp_path / "other") is None
    assert kit.install_wheels(tmp_path, tmp_path / "site") is None


def test_programs_are_compiled_with_the_options_of_the_engine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device, "compiler_options", lambda platform: {"xla_no_such_option": platform})
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_no_such_option"):
        device.compile_program(lambda x: x + 1, np.ones(3, np.float32))


def test_a_termination_leaves_what_was_measured(tmp_path: pathlib.Path):
    command = [sys.executable, "-u", str(SCRIPT), "--cpu", "--only", "environment,decode", "--output", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        assert running.stdout is not None
        for line in running.stdout:
            if "case copy" in line:
                running.send_signal(signal.SIGTERM)
                break
        running.stdout.read()
        assert running.wait() == 130
    document = json.loads((tmp_path / "suite.json").read_text())
    check_document(document)
    assert [part["reason"] for part in document["parts"]] == [gpu_suite.INTERRUPTED] * 2
    assert document["parts"][0]["cases"][0]["status"] == OK
    assert (tmp_path / "suite.md").is_file()


def synthetic() -> dict[str, Any]:
    """A document with figures in every part that is drawn."""

    def part(name: str, cases: list[dict[str, Any]], **summary: Any) -> dict[str, Any]:
        cases = [{"status": OK, **case} for case in cases]
        return {
            "name": name,
            "title": name,
            "status": OK,
            "reason": "",
            "seconds": 1,
            "summary": summary,
            "cases": cases,
        }

    decode = [
        {
            "case": f"batch {batch} context {context} page 64", "batch": batch, "context": context, "page_size": 64,
            "pool_dtype": "", "ragged": False, "gb_per_s": 3000.0 + batch, "microseconds": 10.0 * batch, "share": 0.8,
        }
        for batch in (1, 64)
        for context in (512, 8192)
    ]  # fmt: skip
    prefill = {"before": 0, "decodes": 0, "page_size": 64, "pool_dtype": "", "tflop_per_s": 400.0, "microseconds": 9.0}
    profiled = {"case": "profile", "ms_per_step": {"matmul": 4.5}, "kernels": [{"name": "k", "ms_per_step": 0.25}]}
    steps = {
        "dense_ms": 4.0,
        "attention_ms": 1.0,
        "sample_ms": 0.5,
        "limit_ms": 4.5,
        "step_ms": 5.6,
        "model": "M",
        "pool_dtype": "",
    }
    return {
        "date": "2026-01-01", "note": "", "complete": True, "probe": {"kind": "NVIDIA H200"}, "mode": "gpu",
        "versions": {"python": "3.12", "jax": "0.11.2", "jaxserve_commit": "abc", "dirty": False},
        "parts": [
            part("environment", [], copy_bytes_per_s=4.3e12, read_bytes_per_s=4.4e12, bf16_flop_per_s=7.9e14),
            part("decode", decode),
            part("prefill", [{"case": f"1 x {new}", "new": new, **prefill} for new in (512, 8192)]),
            part("step", [*({"case": "s", "batch": batch, "context": 1024, **steps} for batch in (1, 64)), profiled]),
            part("peers_jax", [{"case": f"P: {decode[2]['case']}", "peer": "P", "kind": "x", "microseconds": 12.5}]),
        ],
    }  # fmt: skip


def test_plots_and_page_of_a_full_run(tmp_path: pathlib.Path):
    document = synthetic()
    (tmp_path / "suite.json").write_text(dumps(document))
    assert plots.draw_in_a_process(tmp_path, 100) == (["decode.png", "prefill.png", "step.png"], "")
    page = pages.markdown(document, ["decode.png"])
    assert "copy (read and written) 4,300 GB/s" in page
    assert "| batch 64 context 512 page 64 | 640.0 | 12.5 |" in page
    assert "| matmul | 4.5 |" in page
    assert "![decode.png](decode.png)" in page


def test_ceilings_of_a_part_that_ended_early_come_from_its_cases():
    cases = [
        {"case": "copy 256 MiB", "gb_per_s": 4000.0},
        {"case": "copy 4096 MiB", "gb_per_s": 4200.0},
        {"case": "matmul bfloat16 8192", "dtype": "bfloat16", "tflop_per_s": 690.0},
    ]
    found = {"copy_bytes_per_s": 4.2e12, "read_bytes_per_s": None, "bf16_flop_per_s": 6.9e14}
    assert plots.ceilings({"summary": {}}, cases) == found
    assert plots.ceilings({"summary": {"copy_bytes_per_s": 1.0}}, cases) == found | {"copy_bytes_per_s": 1.0}
    assert set(plots.ceilings({}, []).values()) == {None}


# Tuning and bundles


def test_the_search_takes_what_is_faster_and_right(tmp_path: pathlib.Path):
    start = tuning.DecodeConfig(block=32, chunk=256, splits=32, programs=264, num_warps=4, num_stages=2)

    class Bench:
        def score(self, kept: Record, config: tuning.DecodeConfig, best: float = 9.0) -> float | None:
            if config.num_warps == 8:
                return None  # fails
            return 1.0 - 0.1 * (config.block == 64) - 0.2 * (config.num_stages == 3)

    found = tune.search(record(tmp_path), Bench(), start, {"num_stages": (2, 3), "block": (32, 64), "num_warps": (8,)})
    assert found is not None
    first, best, config, tried = found
    assert (first, best) == (1.0, pytest.approx(0.7))
    assert config == dataclasses.replace(start, block=64, num_stages=3)
    assert tried == 5


def test_machine_code_that_cannot_be_read_leaves_spills_unknown(monkeypatch: pytest.MonkeyPatch):
    assert tune.spilled_bytes(b"no cubin") == 0

    def refuse(data: bytes) -> None:
        raise ValueError("executable holds machine code with flags 0x64")

    monkeypatch.setattr(tune.cubin, "kernels", refuse)
    assert tune.spilled_bytes(b"") is None


def test_a_broken_bundle_ends_its_own_case_alone(tmp_path: pathlib.Path):
    (tmp_path / "manifest.json").write_text("{")
    kept = record(tmp_path)
    brought = dataclasses.replace(settings(tmp_path), bundle=str(tmp_path))
    assert usable(brought, kept) is None
    assert "has a manifest.json that is not valid JSON" in kept.summary["bundle"]
    try_bundle(kept, brought, tmp_path, "broken")
    (case,) = kept.cases
    assert (case["case"], case["status"]) == ("broken: load", "absent")
    assert "has a manifest.json that is not valid JSON" in case["reason"]


def test_the_table_that_tuning_writes_is_one_that_kernels_read(tmp_path: pathlib.Path):
    table = [dict(entry, config=dataclasses.asdict(config)) for entry, config in tuning.load()]
    target = tune.Target("decode", "bfloat16", "bfloat16", counts.Heads())
    config = tuning.DecodeConfig(block=128, chunk=512, splits=16, programs=132, num_warps=8, num_stages=4)
    for _ in range(2):  # the second time it is replaced
        table = tune.replaced(table, "NVIDIA H200", target, config)
    path = tmp_path / "tuning.json"
    path.write_text(tune.table_text(table))
    assert len(tuning.load(path)) == len(tuning.load()) + 1
    assert tuning.lookup("NVIDIA H200", "decode", "bfloat16", "bfloat16", 128, path) == config
    other = tuning.lookup("NVIDIA H200", "decode", "bfloat16", "bfloat16", 64, path)
    assert other == tuning.lookup("NVIDIA H200", "decode", "bfloat16", "bfloat16", 64)


def test_the_products_of_a_step_are_all_of_its_weights():
    model = llama.LLAMA_8B
    weights = sum(count * inputs * outputs for inputs, outputs, count in products.matrices(model).values())
    leaves = jax.tree.leaves(abstract_params(model, model.dtype, make_mesh()))
    vectors = (2 * model.num_hidden_layers + 1) * model.hidden_size
    embedding = model.vocab_size * model.hidden_size
    assert weights == sum(leaf.size for leaf in leaves) - vectors - embedding
