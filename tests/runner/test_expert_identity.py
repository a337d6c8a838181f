"""Tokens of a model with experts: the same alone, batched, in chunks, after preemption, swaps and prefix hits."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from jaxserve.models.config import ModelConfig
from jaxserve.request import EngineRequest
from jaxserve.runner.model_runner import ModelRunner
from tests.runner.drive import drive
from tests.runner.test_prefix_hits import CONFIG as PREFIX_CONFIG
from tests.runner.test_prefix_hits import Engine, ask, undisturbed

EXPERTS = ModelConfig.from_hf(
    {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
    }
)
# bfloat16, so that kernels with packed weights and those for experts run in one program where the CPU has both.
CONFIG = dataclasses.replace(PREFIX_CONFIG, architecture=EXPERTS, dtype="bfloat16", token_buckets=(16, 64))
REQUESTS = [
    EngineRequest(f"r{number}", tuple(np.random.RandomState(number).randint(0, 96, length).tolist()), max_tokens=24)
    for number, length in enumerate((53, 9, 30, 41, 17))
]


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner(CONFIG)


def test_tokens_do_not_depend_on_companions_chunks_or_preemption(runner: ModelRunner) -> None:
    alone = [drive(runner, CONFIG, [request]).tokens[0] for request in REQUESTS]
    assert len({tuple(tokens) for tokens in alone}) == len(alone)
    assert drive(runner, CONFIG, REQUESTS).tokens == alone
    chunked = drive(runner, CONFIG, REQUESTS, max_num_batched_tokens=16, long_prefill_token_threshold=0)
    assert chunked.tokens == alone
    assert {key.size for key in chunked.programs} == {16}
    few = drive(runner, CONFIG, REQUESTS, num_pages=9)
    assert few.num_preemptions
    assert few.tokens == alone


def test_log_probabilities_do_not_depend_on_hits_or_swaps(runner: ModelRunner) -> None:
    requests = [ask(f"r{number}", request.prompt_token_ids, 20) for number, request in enumerate(REQUESTS)]
    expected = undisturbed(runner, *requests)
    engine = Engine(runner)
    again = [dataclasses.replace(request, request_id=f"{request.request_id}-again") for request in requests]
    assert engine.serve(*requests) == expected
    assert engine.serve(*again) == expected
    assert engine.cached["r0-again"] == 48
    swapping = Engine(runner, caching=False, num_pages=9)
    assert swapping.serve(*requests) == expected
    assert swapping.core.stats().num_preemptions_swap
