"""The batch command and `LLM` over the real engine with a model of random weights: only the texts are meaningless."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.models.config import ModelConfig
from tests.batch_helpers import line, results, write
from tests.frontend.tokenizers_for_tests import byte_level, save

CONFIG = """
EngineConfig.load_format = 'dummy'
EngineConfig.dtype = 'float32'
EngineConfig.tokenizer = {tokenizer!r}
EngineConfig.token_buckets = (8, 32)
EngineConfig.row_buckets = (8,)
SchedulerConfig.max_num_seqs = 8
SchedulerConfig.max_num_batched_tokens = 32
CacheConfig.num_pages = 65
ModelConfig.architecture = 'LlamaForCausalLM'
ModelConfig.vocab_size = 261
ModelConfig.hidden_size = 16
ModelConfig.intermediate_size = 32
ModelConfig.num_hidden_layers = 1
ModelConfig.num_attention_heads = 2
ModelConfig.num_key_value_heads = 1
ModelConfig.head_dim = 32
ModelConfig.max_position_embeddings = 256
ModelConfig.tie_word_embeddings = True
ModelConfig.eos_token_ids = (2,)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch")
    tokenizer = str(save(folder / "tokenizer", byte_level()))
    (folder / "random.gin").write_text(CONFIG.format(tokenizer=tokenizer))
    return folder


def command(folder, output):
    arguments = ["--config", folder / "random.gin", "--input", folder / "in.jsonl", "--output", folder / output]
    return [sys.executable, "-m", "jaxserve.batch", *map(str, arguments)]


def environment():
    return os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}


def bodies(number):
    """Requests of every kind: greedy, sampled with a seed and without, with a stop string."""
    kinds = (
        {"temperature": 0},
        {"temperature": 1.5, "seed": 7},
        {"temperature": 1.0},
        {"stop": ["never to be seen"], "min_tokens": 3},
    )
    return [
        {"prompt": f"prompt {index} 🍏", "max_tokens": 20 + index % 30, **kinds[index % 4]} for index in range(number)
    ]


@pytest.mark.slow(reason="three whole runs of the command over the real engine")
def test_a_batch_killed_half_way_gives_what_an_unbroken_one_gives(folder):
    lines = [line(str(index), **body) for index, body in enumerate(bodies(145))]
    for index, bad in enumerate([b"{", line(3), line("b", "/v2"), line("c", prompt=""), line("0", prompt="again")]):
        lines.insert(20 + 30 * index, bad)
    write(folder / "in.jsonl", lines)
    target = folder / "killed.jsonl"
    process = subprocess.Popen(command(folder, target.name), env=environment(), stderr=subprocess.PIPE)
    assert process.stderr is not None
    with process.stderr:
        while process.poll() is None and (not target.exists() or target.read_bytes().count(b"\n") < 50):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
    done = target.read_bytes().count(b"\n")
    assert 50 <= done < 150
    summaries = []
    for output in (target.name, "whole.jsonl"):
        run = subprocess.run(command(folder, output), env=environment(), capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        summaries.append(run.stdout.partition(";")[0])
    killed, whole = results(target), results(folder / "whole.jsonl")
    assert summaries[1] == "jaxserve.batch: 150 lines: 145 completed, 5 errors, 0 done before"
    assert re.fullmatch(rf"jaxserve\.batch: 150 lines: \d+ completed, \d errors, {done} done before", summaries[0])
    assert len(killed) == 150
    assert sum(result["error"] is not None for result in killed.values()) == 5
    assert {key: _choice(result) for key, result in killed.items()} == {
        key: _choice(result) for key, result in whole.items()
    }


def _choice(result):
    return result["error"] or result["response"]["body"]["choices"][0]


def test_a_missing_checkpoint_is_one_line(tmp_path):
    write(tmp_path / "in.jsonl", [line("a", prompt="x")])
    arguments = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    run = subprocess.run(
        [sys.executable, "-m", "jaxserve.batch", *arguments, f"--gin.EngineConfig.model='{tmp_path}/none'"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 1
    assert run.stderr.startswith(f"jaxserve.batch: model directory '{tmp_path}/none' does not exist; set EngineConfig.")
    assert run.stderr.count("\n") == 1


def test_llm_gives_the_same_tokens_alone_and_together(folder):
    options = {
        "load_format": "dummy",
        "dtype": "float32",
        "tokenizer": str(folder / "tokenizer"),
        "token_buckets": (8, 32),
        "row_buckets": (8,),
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "num_pages": 65,
    }
    requests = bodies(24)
    prompts = [body.pop("prompt") for body in requests]
    params = [SamplingParams(**{"seed": 1, **body}) for body in requests]
    with LLM(architecture=_architecture(), **options) as llm:
        together = llm.generate(prompts, params, use_tqdm=False)
        alone = [llm.generate(prompt, one, use_tqdm=False)[0] for prompt, one in zip(prompts, params, strict=True)]
        assert [output.outputs for output in together] == [output.outputs for output in alone]
        stats = llm.front_end.stats
        assert (stats.num_running, stats.pages_used, stats.compile_misses) == (0, 0, 0)
        assert all(output.outputs[0].finish_reason == "length" for output in together)
        _check_stop_strings(llm, prompts, params, [output.outputs[0].text for output in together])


def _check_stop_strings(llm, prompts, params, texts):
    """Three characters from the middle of each text, as its stop string, cut it where they first stand."""
    middles = [text[len(text) // 2 :][:3] for text in texts]
    params = [dataclasses.replace(one, stop=(middle,)) for one, middle in zip(params, middles, strict=True)]
    for output, text, middle in zip(llm.generate(prompts, params, use_tqdm=False), texts, middles, strict=True):
        assert output.outputs[0].text == text[: text.index(middle)]
        assert output.outputs[0].finish_reason == "stop"
        decoded = llm.get_tokenizer().decode(output.outputs[0].token_ids)
        assert decoded.startswith(text[: text.index(middle)] + middle)
    assert llm.front_end.num_open == 0


def _architecture():
    return ModelConfig("LlamaForCausalLM", 261, 16, 32, 1, 2, 1, 32, 256, tie_word_embeddings=True, eos_token_ids=(2,))


def test_the_output_is_ascii(folder):
    write(folder / "small.jsonl", [line("ü🍏", prompt="x", max_tokens=2)])
    run = subprocess.run(
        [*command(folder, "small_out.jsonl"), "--input", str(folder / "small.jsonl")],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    data = (folder / "small_out.jsonl").read_bytes()
    assert data.isascii()
    assert json.loads(data)["custom_id"] == "ü🍏"
