"""The model over the kernels for CPUs: packed products and pages read where they lie, in the programs of a step."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers.attention_backends import dense_attend
from jaxserve.models.params import bind, make_mesh, random_params
from jaxserve.pallas_kernels.cpu import linear
from jaxserve.request import EngineRequest
from jaxserve.runner.model_runner import ModelRunner
from tests.runner.drive import drive

needs_avx512_bf16 = pytest.mark.skipif(not linear.runs_here(), reason="this CPU has no AVX512_BF16 instructions")

MODEL = ModelConfig("LlamaForCausalLM", 96, 64, 96, 2, 4, 2, 32, 256)
CONFIG = EngineConfig(
    architecture=MODEL,
    load_format="dummy",
    dtype="bfloat16",
    scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64),
    cache=CacheConfig(num_pages=48),
    max_model_len=128,
    seed=5,
)


@pytest.fixture(scope="module", params=[pytest.param("bfloat16", marks=needs_avx512_bf16), "float32"])
def config(request: pytest.FixtureRequest) -> EngineConfig:
    return dataclasses.replace(CONFIG, dtype=request.param)


@pytest.fixture(scope="module")
def runner(config) -> ModelRunner:
    return ModelRunner(config)


@pytest.fixture(scope="module")
def requests() -> list[EngineRequest]:
    rng = np.random.default_rng(1)
    return [
        EngineRequest(
            f"r{i}",
            tuple(int(token) for token in rng.integers(0, 96, length)),
            max_tokens=24,
            temperature=0.0 if i % 2 else 1.0,
            seed=i,
        )
        for i, length in enumerate((3, 70, 33, 1, 90, 16))
    ]


def test_the_kernels_are_chosen(runner, config):
    assert runner.info.attention == {"bfloat16": "cpu", "float32": "cpu_float32"}[config.dtype]
    assert runner._shapes.packed


@pytest.mark.parametrize("limits", [{}, {"max_num_batched_tokens": 16}, {"max_num_seqs": 3}])
def test_tokens_are_those_of_each_request_alone(runner, config, requests, limits):
    alone = [drive(runner, config, [request]).tokens[0] for request in requests]
    assert drive(runner, config, requests, **limits).tokens == alone


def test_tokens_survive_preemption(runner, config, requests):
    preempted = drive(runner, config, requests, num_pages=12)
    assert preempted.num_preemptions > 0
    assert preempted.tokens == drive(runner, config, requests).tokens


def test_hidden_states_are_those_of_the_model_computed_densely(runner, config, requests):
    prompt = requests[4].prompt_token_ids[:60]
    drive(runner, config, [dataclasses.replace(requests[4], prompt_token_ids=prompt, max_tokens=1)])
    # The same weights in float32: what is left is the rounding of bfloat16 states, weights of attention and pages.
    params = random_params(MODEL, config.dtype, make_mesh(), config.seed)
    model = bind(MODEL, params)
    tokens = jnp.asarray(prompt, jnp.int32)
    hidden, _ = model(tokens, jnp.arange(60, dtype=jnp.int32), [None] * 2, dense_attend())
    got, expected = (np.asarray(array, np.float32) for array in (runner._arrays.hidden[:60], hidden))
    most, mean = {"bfloat16": (2.0**-4, 2.0**-8), "float32": (2.0**-17, 2.0**-20)}[config.dtype]
    assert np.abs(got - expected).max() < most * np.abs(expected).max()
    assert np.abs(got - expected).mean() < mean * np.abs(expected).max()
