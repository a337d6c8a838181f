"""Explaining a configuration: plans that sum to the device's memory, worked examples, the text."""

from __future__ import annotations

import dataclasses
import json
import re
import types

import jax
import pytest

from jaxserve import explain as command
from jaxserve.config import gin_config
from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.models.config import ModelConfig
from jaxserve.models.params import make_mesh
from jaxserve.pallas_kernels.paged_attention.triton.backend import DEPRECATION
from jaxserve.planning import explanation as explaining
from jaxserve.planning.decode_roofline import decode_step, token_bytes
from jaxserve.planning.explanation import COMPILE_SECONDS, Explanation, explain, local_target
from jaxserve.planning.explanation_report import to_json, to_text
from jaxserve.planning.memory_plan import MARGIN_BYTES
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.programs.aot.plugin import PluginMissingError
from jaxserve.programs.compiler import compile_program, program_memory
from jaxserve.programs.program_needs import ProgramNeeds, largest_keys
from jaxserve.programs.step_programs import program_keys
from jaxserve.programs.target_devices import Target, load_target
from tests.models.test_expert_checkpoints import QWEN3_30B_A3B

pytestmark = pytest.mark.filterwarnings(f"ignore:{DEPRECATION}:DeprecationWarning")

MODEL = ModelConfig("LlamaForCausalLM", 96, 32, 48, 2, 4, 2, 32, 256)
CONFIG = EngineConfig(
    architecture=MODEL,
    load_format="dummy",
    scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32),
    token_buckets=(8, 32),
)
HEADS = 4 * 32
"""Query heads of 32 numbers; half as many are of keys, and of values."""
PARAMETERS = 2 * 96 * 32 + 32 + 2 * (2 * 32 + 2 * HEADS * 32 + HEADS * 32 + 3 * 32 * 48)
DEVICE = Target(
    "small",
    "cpu",
    "cpu",
    "",
    MARGIN_BYTES + 5 * 10**8,
    memory_bandwidth=1e9,
    peak_flops={"float32": 2e9, "bfloat16": 1e9},
)


def no_plugin(_: Target) -> None:
    raise PluginMissingError("the compiler is missing; install it")


def explained(target: str, *overrides: str) -> Explanation:
    server, _ = gin_config.load("llama.gin", overrides)
    return explain(server.engine, load_target(target))


# ------------------------------------------------------------------------------------------------- Llama-3.1-8B on GPUs


def check_llama(explanation: Explanation, target: str) -> None:
    """The sum, and what 8B is known to take: 8.03e9 parameters of 2 bytes, 128 KiB a token."""
    memory = to_json(explanation)["memory"]
    device = load_target(target).device_memory_bytes
    assert sum(memory["parts"].values()) == memory["total_bytes"] == device
    assert min(memory["parts"].values()) >= 0
    assert memory["parts"]["beyond gpu_memory_utilization"] == device - int(device * 0.92)
    assert memory["parts"]["weights"] == 8_030_261_248 * 2
    assert memory["page_bytes"] == memory["page_size"] * 128 * 1024
    assert memory["parts"]["pages"] == memory["page_bytes"] * memory["num_pages"]
    assert memory["pool_tokens"] == (memory["num_pages"] - 1) * memory["page_size"]
    assert memory["parts"]["margin"] == MARGIN_BYTES
    assert memory["parts"]["unused"] < memory["page_bytes"], "pages take all that is left"
    assert explanation.shapes.attention == "triton"
    assert sum(map(len, explanation.programs.values())) <= 40


@pytest.mark.parametrize("target", ["h200", "a100"])
def test_the_plan_of_8b_sums_to_the_device_without_its_compiler(target, monkeypatch):
    monkeypatch.setattr(explaining, "target_mesh", no_plugin)
    explanation = explained(target)
    check_llama(explanation, target)
    assert explanation.estimated == "the compiler is missing; install it"
    assert explanation.plan.programs.temporaries < 4e9
    text = to_text(explanation)
    assert re.search(r"temporaries .* an ESTIMATE, from above", text)
    assert "temporaries are an estimate: the compiler is missing; install it" in text


def test_quantized_pages_of_8b(monkeypatch):
    """Half the bytes a token, and the pool takes all memory."""
    monkeypatch.setattr(explaining, "target_mesh", no_plugin)
    explanation = explained("h200", "CacheConfig.kv_cache_dtype='fp8'")
    assert explanation.shapes.pool_dtype == "float8_e4m3fn"
    plan, shapes = explanation.plan, explanation.shapes
    assert plan.page == shapes.page_size * 64 * 1024
    assert sum(plan.parts().values()) == load_target("h200").device_memory_bytes
    assert plan.parts()["unused"] < plan.page
    bytes_of = {step.batch: step.bytes for step in explanation.decode_steps if step.context == 1024}
    assert bytes_of[8] - bytes_of[1] == 7 * (4096 * 2 + 1025 * 64 * 1024)
    with pytest.raises(ValueError, match=r"pool holds float8_e4m3fn; NVIDIA A100.* below 8.9"):
        explained("a100", "CacheConfig.kv_cache_dtype='fp8'")
    assert explained("a100", "CacheConfig.kv_cache_dtype='int8'").plan.parts()["unused"] < 10**8


def test_a_decode_step_reads_the_experts_that_its_rows_choose(monkeypatch, tmp_path):
    """Four layers of Qwen3-30B-A3B, of 623,120,640 parameters each."""
    monkeypatch.setattr(explaining, "target_mesh", no_plugin)
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B_A3B | {"num_hidden_layers": 4}))
    explanation = explained("h200", "EngineConfig.architecture=None", f"EngineConfig.model='{tmp_path}'")
    table, layers = 151936 * 2048, 4 * 623_120_640
    assert explanation.plan.parts()["weights"] == 2 * (layers + 2 * table + 2048)
    assert "4 layers have 128 experts, of which a token goes through 8" in to_text(explanation)
    bytes_of = {step.batch: step.bytes for step in explanation.decode_steps if step.context == 1024}
    experts, pages = 4 * 128 * 3 * 2048 * 768, 1025 * 2 * 4 * 128 * 4 * 2
    # All but 120 of 128 experts, and the head; of the embedding a row is read.
    assert bytes_of[1] == pytest.approx(2 * (layers - experts * 120 / 128 + table) + pages, rel=1e-4)
    chosen = 1 - (1 - 8 / 128) ** 8
    assert bytes_of[8] - bytes_of[1] == pytest.approx(2 * experts * (chosen - 8 / 128) + 7 * pages, rel=1e-4)


def test_the_plan_of_8b_sums_to_the_device_with_its_compiler(monkeypatch):
    compiled = explained("h200")
    check_llama(compiled, "h200")
    assert compiled.estimated == ""
    assert "ESTIMATE" not in to_text(compiled)
    monkeypatch.setattr(explaining, "target_mesh", no_plugin)
    assert compiled.plan.num_pages > explained("h200").plan.num_pages, "the estimate is an upper bound"


# ------------------------------------------------------------------------------------------------------ worked examples


@pytest.fixture(scope="module")
def small() -> Explanation:
    return explain(CONFIG, DEVICE, load_rate=1000.0)


def test_the_plan_is_that_of_the_compiled_programs(small):
    mesh = make_mesh()
    shapes = resolve_shapes(CONFIG, "cpu")
    found = {key: program_memory(compile_program(key, shapes, mesh)) for key in largest_keys(shapes)}
    temporaries = ProgramNeeds.from_largest(found, shapes).together
    assert temporaries > max(program.extra for program in found.values())
    assert small.plan.programs.temporaries == temporaries, "each program's own, on a CPU"
    assert small.num_parameters == PARAMETERS
    assert small.plan.weights == 4 * PARAMETERS
    assert {(kind, size) for kind, sizes in small.programs.items() for size in sizes} == {
        (key.kind, key.size) for key in program_keys(shapes)
    }
    assert sum(small.plan.parts().values()) == DEVICE.device_memory_bytes
    assert small.shapes.pool_dtype == "float32"


def test_concurrency_counts_pages_and_slots():
    config = dataclasses.replace(CONFIG, cache=CacheConfig(num_pages=33), max_model_len=250)
    explanation = explain(config, DEVICE)
    assert explanation.pool_tokens == 32 * 16
    assert [(one.length, one.requests) for one in explanation.concurrency] == [(250, 2.0)]
    assert "2.0 requests of 250 tokens (max_model_len)" in to_text(explanation)
    few = explain(dataclasses.replace(config, cache=CacheConfig(num_pages=9)), DEVICE)
    assert few.concurrency[0].requests == 0.5
    assert "a request of 250 tokens does not fit: lower max_model_len" in to_text(few)
    many = explain(dataclasses.replace(config, cache=CacheConfig(num_pages=1000)), DEVICE)
    assert many.concurrency[0].requests == 8


def test_start_takes_the_longer_of_loading_and_compiling(small):
    start = small.start
    assert start.load_bytes == 4 * PARAMETERS
    assert start.load_seconds == pytest.approx(4 * PARAMETERS / 1000)
    assert start.compile_seconds > 0
    assert start.seconds == max(start.load_seconds, start.compile_seconds)


def test_compile_times_come_from_a_report(tmp_path, monkeypatch):
    monkeypatch.setattr(explaining, "target_mesh", no_plugin)
    monkeypatch.setattr(explaining.os, "cpu_count", lambda: 2)
    programs = [
        {"kind": kind, "size": size, "seconds": 3.0}
        for kind, sizes in explain(CONFIG, DEVICE).programs.items()
        for size in sizes
    ]
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"target": {"name": "small"}, "programs": programs}))
    start = explain(CONFIG, DEVICE, report=path).start
    assert start.compile_seconds == 3.0 * len(programs) / 2
    assert start.compile_source == f"3.0 s for each program, from {path}"
    faults = {
        "is for the target other; the target is small": {"target": {"name": "other"}, "programs": programs},
        r"is for other programs: \[.*\] are in one of both": {"target": {"name": "small"}, "programs": programs[1:]},
        "is not one of jaxserve.compile": {"programs": programs},
    }
    for message, told in faults.items():
        path.write_text(json.dumps(told))
        with pytest.raises(ValueError, match=message):
            explain(CONFIG, DEVICE, report=path)


def test_without_a_compiler_the_stated_time_of_a_program_counts(monkeypatch):
    monkeypatch.setattr(explaining, "target_mesh", no_plugin)
    monkeypatch.setattr(explaining.os, "cpu_count", lambda: 4)
    explanation = explain(CONFIG, DEVICE)
    programs = sum(map(len, explanation.programs.values()))
    assert explanation.start.compile_seconds == pytest.approx(programs * COMPILE_SECONDS / 4)


@pytest.mark.parametrize("tied", [False, True])
def test_bound_of_a_decode_step(tied):
    model = dataclasses.replace(MODEL, tie_word_embeddings=tied)
    shapes = resolve_shapes(dataclasses.replace(CONFIG, architecture=model), "cpu")
    token = 2 * (HEADS // 2) * 2 * 4  # keys and values, their heads, layers, bytes
    assert token_bytes(shapes) == token
    step = decode_step(shapes, DEVICE, batch=3, context=100)
    matrices = 96 * 32 + 2 * (2 * HEADS * 32 + HEADS * 32 + 3 * 32 * 48)
    embedded = 0 if tied else 3 * 32
    assert step.bytes == 4 * (matrices + 5 * 32 + embedded) + 3 * (100 + 1) * token
    assert step.flops == 3 * (2 * matrices + 2 * 4 * HEADS * 100)
    assert step.seconds == max(step.bytes / 1e9, step.flops / 2e9)
    assert step.bound == ("memory" if step.bytes / 1e9 > step.flops / 2e9 else "compute")
    assert step.tokens_per_second == pytest.approx(3 / step.seconds)
    fast = dataclasses.replace(DEVICE, memory_bandwidth=1e15)
    assert decode_step(shapes, fast, batch=3, context=100).bound == "compute"
    unknown = dataclasses.replace(DEVICE, memory_bandwidth=0.0, peak_flops={})
    assert (decode_step(shapes, unknown, 3, 100).seconds, decode_step(shapes, unknown, 3, 100).bound) == (0.0, "")


# ----------------------------------------------------------------------------------------------------- the command line


def test_the_table_in_the_text_sums_to_its_total(small):
    lines = to_text(small).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("memory of one device"))
    sizes = [
        int(match[1].replace(",", ""))
        for line in lines[first:]
        if (match := re.search(r" ([\d,]+)  +\S+ [GMk]?B\b", line))
    ]
    *parts, total = sizes[:9]
    assert len(parts) == 8
    assert sum(parts) == total == DEVICE.device_memory_bytes


def test_the_command_prints_text_or_json(capsys):
    assert command.main(["--config", "tiny.gin", "--target", "cpu"]) == 0
    assert "2,049 pages" in capsys.readouterr().out
    assert command.main(["--config", "tiny.gin", "--json", "--load-rate", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["target"]["name"], told["memory"]["num_pages"]) == ("cpu", 2049)
    assert sum(told["memory"]["parts"].values()) == told["target"]["device_memory_bytes"]
    assert told["start"]["load_rate"] == 2e9
    assert told["num_programs"] == sum(map(len, told["programs"].values()))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--target", "h900"], 2, r"target 'h900' is unknown; known are cpu, a100"),
        (["--report", "nowhere.json"], 1, "No such file or directory: 'nowhere.json'"),
        (["--load-rate", "0"], 2, "0 is not a number above 0"),
        (["--gin.CacheConfig.num_pages=100000000"], 1, r"page pool of 100000000 pages has .* lower num_pages"),
        (["--gin.EngineConfig.max_model_len=4096"], 1, "max_model_len is 4096; the model's context"),
    ],
)
def test_faults_are_one_line(arguments, code, message, capsys):
    try:
        got = command.main(["--config", "tiny.gin", *arguments])
    except SystemExit as ended:
        got = ended.code
    assert got == code
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


def test_the_target_of_this_machine(monkeypatch):
    kept = jax.config.jax_pjrt_client_create_options
    try:
        assert local_target().name == "cpu"
        for kind, name in (("NVIDIA H200", "h200"), ("NVIDIA L4", "l4")):
            device = types.SimpleNamespace(platform="gpu", device_kind=kind)
            monkeypatch.setattr(explaining.jax, "devices", lambda device=device: [device])
            assert local_target().name == name
        device.device_kind = "Another"
        with pytest.raises(ValueError, match=r"none of cpu, .* is this machine's 'Another'"):
            local_target()
    finally:
        jax.config.update("jax_pjrt_client_create_options", kept)
