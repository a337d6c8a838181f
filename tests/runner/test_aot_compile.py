"""`python -m jaxserve.compile`, the targets and the compiler that it needs."""

from __future__ import annotations

import json
import pathlib
import shutil
import sys

import pytest

from jaxserve import compile as compile_program
from jaxserve.pallas_kernels.paged_attention.triton.backend import DEPRECATION
from jaxserve.planning.reports.inspection import ProgramReport
from jaxserve.planning.reports.markdown import render
from jaxserve.programs.aot import plugin
from jaxserve.programs.layout import PENALTY_RUNS
from jaxserve.programs.target_devices import TARGET_DIRECTORY, Target, known_targets, load_target, target_mesh

pytestmark = pytest.mark.filterwarnings(f"ignore:{DEPRECATION}:DeprecationWarning")

CONFIG = """
CacheConfig.num_pages = 513
EngineConfig.load_format = 'dummy'
EngineConfig.dtype = 'bfloat16'
EngineConfig.token_buckets = (8,)
EngineConfig.row_buckets = (8,)
SchedulerConfig.max_num_seqs = 8
SchedulerConfig.max_num_batched_tokens = 8
ModelConfig.architecture = 'LlamaForCausalLM'
ModelConfig.vocab_size = 1024
ModelConfig.hidden_size = 256
ModelConfig.intermediate_size = 512
ModelConfig.num_hidden_layers = 1
ModelConfig.num_attention_heads = 4
ModelConfig.num_key_value_heads = 2
ModelConfig.head_dim = 64
ModelConfig.max_position_embeddings = 2048
"""


@pytest.fixture
def config(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "small.gin"
    path.write_text(CONFIG)
    return str(path)


def test_bundle_and_report_for_an_h200(config, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["--config", config, "--target", "h200", "--output", str(output)]
    # 512 pages of 16 positions beside the null page hold eight rows of 1024, and no more.
    contexts = ["--context", "512", "--context", "1024", "--context", "1026"]
    assert compile_program.main([*arguments, *contexts]) == 0
    printed = capsys.readouterr()
    page = (output / "report.md").read_text()
    assert page in printed.out
    report = json.loads((output / "report.json").read_text())
    assert report["problems"] == []
    programs = {(program["kind"], program["size"]): program for program in report["programs"]}
    penalty_writes = {("penalty_write", size) for size in PENALTY_RUNS}
    writes = {("table_write", 64), ("option_write", 1), ("mask_write", 8), ("page_copy", 16), *penalty_writes}
    assert set(programs) == {*((kind, 8) for kind in ("decode", "forward", "sample", "score", "pooling")), *writes}
    for key, program in programs.items():
        few = key in writes or key[0] == "pooling"
        assert program["command_buffers"] in ((0, 1) if few else (1,))  # few kernels are no graph
        assert program["pool_copies"] == 0
        assert program["alias_bytes"] == program["donated_bytes"] >= program["pool_bytes"]
        assert few or program["temp_bytes"] > 0
        assert all(kernel["spill_store_bytes"] == kernel["spill_load_bytes"] == 0 for kernel in program["kernels"])
        names = {kernel["name"] for kernel in program["kernels"] if kernel["pallas"]}
        assert ("paged_attention_decode" in names) == (key[0] in ("forward", "decode"))
    steps = report["decode_steps"]
    assert [(step["rows"], step["context"]) for step in steps] == [(8, 512), (8, 1024)]
    assert all(1 < step["ratio"] < 2 for step in steps)
    assert (report["shapes"]["num_pages"], report["shapes"]["page_size"]) == (513, 16)
    memory = report["memory"]
    assert sum(bytes for name, bytes in memory.items() if name != "total") == memory["total"] == 150109945856
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["device_kind"] == "NVIDIA H200"
    assert manifest["target"]["description"] == (TARGET_DIRECTORY / "h200.txtpb").read_text()
    assert len(manifest["programs"]) == 12
    for program in manifest["programs"]:
        assert str(tmp_path).encode() not in (output / program["file"]).read_bytes()
    assert plugin.TOOLKIT_OPTION not in manifest["compiler_options"]
    for expected in ("`paged_attention_decode`", "| decode 8 |", "## Roofline", "ratio", "jax"):
        assert expected in page

    assert programs["page_copy", 16]["outside_command_buffers"] == 2, "one kernel reads, one writes"
    assert "| 1 | 0 | 0 to 1 | 10 | yes | 0 | 0 | " in page  # launches of the writes and of pooling
    both = render([report, report | {"versions": {"jax": "9.9"}, "problems": ["a kernel spills"]}])
    for expected in ("ratio, run 2", "run 2, GiB", "Run 2, jax 9.9", "- run 2: a kernel spills"):
        assert expected in both


def test_problems_are_told_by_the_exit_code(config, tmp_path, capsys, monkeypatch):
    def with_problems(report: ProgramReport, target: Target) -> list[str]:
        return [f"{report.kind} {report.size}: falls short for {target.name}"]

    monkeypatch.setattr(ProgramReport, "problems", with_problems)
    output = tmp_path / "out"
    arguments = ["--config", config, "--output", str(output), "--context", "512"]  # for this machine
    assert compile_program.main(arguments) == compile_program.PROBLEMS_STATUS == 3
    printed = capsys.readouterr()
    assert "jaxserve.compile: forward 8: falls short for cpu\n" in printed.err
    assert "- run 1: forward 8: falls short for cpu" in (output / "report.md").read_text()
    assert (output / "manifest.json").is_file()


def test_faulty_command_lines(config, tmp_path, capsys):
    for arguments, reason in (
        (["--target", "h300"], "target 'h300' is unknown; known are cpu, a100, h100, h200, l4"),
        (["--target", "cpu", "--context", "0"], "--context is 0; it must be at least 1"),
    ):
        with pytest.raises(SystemExit) as end:
            compile_program.main(["--config", config, "--output", str(tmp_path), *arguments])
        assert end.value.code == 2
        assert reason in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_refused(config, tmp_path, capsys):
    arguments = ["--config", config, "--output", str(tmp_path / "out"), "--target", "l4"]
    assert compile_program.main([*arguments, "--gin.CacheConfig.num_pages=9999999"]) == 1
    assert "page pool of 9999999 pages has" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "kind", "capability"),
    [
        ("h200", "NVIDIA H200", "9.0a"),
        ("h100", "NVIDIA H100 80GB HBM3", "9.0a"),
        ("a100", "NVIDIA A100-SXM4-80GB", "8.0"),
        ("l4", "NVIDIA L4", "8.9"),
    ],
)
def test_targets(name, kind, capability):
    target = load_target(name)
    assert (target.device_kind, target.compute_capability, target.platform) == (kind, capability, "gpu")
    assert target.peak_flops["bfloat16"] > 1e14
    assert 1e11 < target.memory_bandwidth < 1e13
    assert target.source
    mesh = target_mesh(target, devices=2)
    assert [device.device_kind for device in mesh.devices.flat] == [kind] * 2
    assert name in known_targets()


def test_a_target_of_ones_own(tmp_path):
    for suffix in ("txtpb", "json"):
        shutil.copy(TARGET_DIRECTORY / f"l4.{suffix}", tmp_path / f"mine.{suffix}")
    path = tmp_path / "mine.txtpb"
    assert load_target(str(path)).name == "mine"
    path.write_text(path.read_text().replace("core_count: 58", ""))
    with pytest.raises(ValueError, match=r"mine\.txtpb has no field 'core_count'"):
        load_target(str(path))
    whole = (TARGET_DIRECTORY / "l4.txtpb").read_text()
    path.write_text(whole.rstrip().rpartition("}")[0])
    with pytest.raises(ValueError, match="cannot be read: one brace too many, or too few"):
        load_target(str(path))
    path.write_text(whole)
    (tmp_path / "mine.json").write_text('{"dense_tflops": {}}')
    with pytest.raises(ValueError, match=r"needs .*mine\.json with dense_tflops"):
        load_target(str(path))


def test_a_missing_compiler_names_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "path", [place for place in sys.path if not place.endswith(plugin.DIRECTORY)])
    with pytest.raises(plugin.PluginMissingError, match=r"needs the CUDA plugin of jax .*run `make gpu-compiler`"):
        plugin.find_plugin()
    (tmp_path / plugin.DIRECTORY / "jax_plugins" / "xla_cuda99").mkdir(parents=True)
    (tmp_path / plugin.DIRECTORY / "jax_plugins" / "xla_cuda99" / "__init__.py").touch()
    information = tmp_path / plugin.DIRECTORY / "jax_cuda99_plugin-0.1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: jax-cuda99-plugin\nVersion: 0.1\n")
    with pytest.raises(plugin.PluginMissingError, match=r"jax-cuda99-plugin in .* has version 0\.1; jax has"):
        plugin.find_plugin()
