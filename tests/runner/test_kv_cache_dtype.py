"""Engines whose pages hold another dtype than the model: the same tokens however they are scheduled, smaller pages."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.models import params
from jaxserve.models.config import ModelConfig
from jaxserve.models.loading import checkpoint
from jaxserve.planning.memory_plan import DeviceMemory, MemoryPlanner
from jaxserve.planning.resolve import resolve_shapes
from jaxserve.programs.program_needs import ProgramNeeds
from jaxserve.request import EngineRequest
from jaxserve.runner.model_runner import ModelRunner
from tests.models.checkpoints import BASE, random_tensors, write_checkpoint
from tests.runner.drive import drive

MODEL = ModelConfig("LlamaForCausalLM", 96, 32, 48, 2, 4, 2, 8, 256, tie_word_embeddings=True)
CONFIG = EngineConfig(
    architecture=MODEL,
    load_format="dummy",
    scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32),
    cache=CacheConfig(num_pages=48),
    token_buckets=(32,),
    max_model_len=128,
    seed=5,
)


def with_pages(name: str) -> EngineConfig:
    return dataclasses.replace(CONFIG, cache=dataclasses.replace(CONFIG.cache, kv_cache_dtype=name))


@pytest.fixture(scope="module")
def requests() -> list[EngineRequest]:
    random = np.random.default_rng(1)
    return [
        EngineRequest(
            f"r{i}",
            tuple(int(token) for token in random.integers(0, 96, length)),
            max_tokens=8,
            temperature=float(i % 2),
            seed=i,
        )
        for i, length in enumerate((3, 40, 17, 1, 33))
    ]


@pytest.mark.parametrize(("name", "held"), [("fp8", "float8_e4m3fn"), ("int8", "int8")])
def test_tokens_do_not_depend_on_scheduling(name: str, held: str, requests):
    runner = ModelRunner(with_pages(name))
    assert runner.info.kv_cache == f"{held}, scales measured with random tokens"
    batched = drive(runner, CONFIG, requests).tokens
    assert [drive(runner, CONFIG, [request]).tokens[0] for request in requests] == batched
    assert drive(runner, CONFIG, requests, long_prefill_token_threshold=5).tokens == batched


@pytest.mark.parametrize(
    ("name", "held", "bytes_a_number"),
    [
        ("auto", "float32", 4),
        ("bfloat16", "bfloat16", 2),
        ("float16", "float16", 2),
        ("fp8_e4m3", "float8_e4m3fn", 1),
        ("int8", "int8", 1),
    ],
)
def test_the_memory_plan_counts_what_pages_hold(name: str, held: str, bytes_a_number: int):
    shapes = resolve_shapes(with_pages(name), "cpu")
    assert shapes.pool_dtype == held
    planner = MemoryPlanner(shapes, CacheConfig(), params.make_mesh(), DeviceMemory(10**9, 10**9))
    plan = planner.plan(2, ProgramNeeds(0, 0))
    assert plan.page == 2 * 2 * 16 * 8 * bytes_a_number * MODEL.num_hidden_layers
    plain = dataclasses.replace(planner, shapes=resolve_shapes(CONFIG, "cpu"))
    weights = plain.plan(2, ProgramNeeds(0, 0)).weights
    scales = 4 * 2 * MODEL.num_key_value_heads * MODEL.num_hidden_layers
    assert plan.weights == weights + (scales if bytes_a_number == 1 else 0)


def test_scales_of_the_checkpoint_take_precedence(tmp_path):
    tensors = random_tensors(BASE, 0) | {
        f"model.layers.{layer}.self_attn.{side}_scale": np.float32(0.1 + layer) for layer in range(2) for side in "kv"
    }
    directory = write_checkpoint(tmp_path, BASE, tensors)
    config = dataclasses.replace(with_pages("int8"), model=str(directory), architecture=None, load_format="auto")
    runner = ModelRunner(config)
    assert runner.info.kv_cache == "int8, scales from the checkpoint"
    # They were made for fp8, as most are.
    wanted = checkpoint.load_kv_scales(directory, ModelConfig.from_directory(directory)).values * (448 / 127)
    np.testing.assert_allclose(np.array(runner._weights.kv_scales), wanted, rtol=1e-6)


def test_an_unknown_dtype_of_pages_is_refused():
    with pytest.raises(ValueError, match=r"kv_cache_dtype is 'int4'; it must be one of auto, .*, int8"):
        CacheConfig(kv_cache_dtype="int4")
