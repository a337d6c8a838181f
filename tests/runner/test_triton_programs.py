"""The model over the Triton kernels in interpret mode: decode and mixed programs; the XLA implementation's tokens."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxserve.config.settings import ATTENTION, CASCADE, CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.models.config import ModelConfig
from jaxserve.pallas_kernels.paged_attention import IMPLEMENTATIONS, api
from jaxserve.request import EngineRequest
from jaxserve.runner.model_runner import ModelRunner
from tests.runner.drive import drive

MODEL = ModelConfig("LlamaForCausalLM", 96, 64, 48, 1, 2, 1, 64, 256, tie_word_embeddings=True)
CONFIG = EngineConfig(
    architecture=MODEL,
    load_format="dummy",
    scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32),
    cache=CacheConfig(num_pages=32),
    token_buckets=(32,),
    max_model_len=128,
    attention="triton_interpret",
    seed=5,
)


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner(CONFIG)


@pytest.fixture(scope="module")
def requests() -> list[EngineRequest]:
    rng = np.random.default_rng(1)
    return [
        EngineRequest(
            f"r{i}",
            tuple(int(token) for token in rng.integers(0, 96, length)),
            max_tokens=6,
            temperature=0.0 if i % 2 else 1.0,
            seed=i,
        )
        for i, length in enumerate((3, 40, 17, 1))
    ]


def test_the_kernels_give_the_tokens_of_the_xla_implementation(runner, requests):
    run = drive(runner, CONFIG, requests)
    assert {key.kind for key in run.programs} == {"forward", "decode"}
    expected = drive(ModelRunner(dataclasses.replace(CONFIG, attention="xla")), CONFIG, requests)
    assert {key.kind for key in expected.programs} == {"forward"}
    assert run.tokens == expected.tokens


def test_tokens_do_not_depend_on_the_batch(runner, requests):
    batched = drive(runner, CONFIG, requests).tokens
    assert [drive(runner, CONFIG, [request]).tokens[0] for request in requests] == batched


def test_the_choice_is_named_and_can_be_forced(runner):
    assert ("auto", *IMPLEMENTATIONS) == ATTENTION
    assert api.CASCADE == CASCADE
    assert runner.info.attention == "triton_interpret"
    with pytest.raises(ValueError, match="'triton' runs on gpu; the platform is 'cpu'"):
        ModelRunner(dataclasses.replace(CONFIG, attention="triton"))
