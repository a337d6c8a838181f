"""The model over the Triton kernels in interpret mode: decode and mixed programs; the XLA implementation's tokens."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config import ATTENTION, CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.request import EngineRequest
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.runner.programs import ProgramKey
from jaxserve.scheduler import Scheduler
from jaxserve.scheduler.buckets import Buckets
from jaxserve.scheduler.page_pool import PagePool
from models.config import ModelConfig
from pallas_kernels.paged_attention import IMPLEMENTATIONS

MODEL = ModelConfig("LlamaForCausalLM", 96, 64, 48, 1, 2, 1, 64, 256, tie_word_embeddings=True)
CONFIG = EngineConfig(
    architecture=MODEL,
    load_format="dummy",
    scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32),
    cache=CacheConfig(num_pages=32),
    token_buckets=(8, 32),
    max_model_len=128,
    attention="triton_interpret",
    seed=5,
)


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner(CONFIG)


def run(runner: ModelRunner, requests: list[EngineRequest]) -> tuple[list[list[int]], set[ProgramKey]]:
    """Tokens of the requests, batched, and the forward programs that computed them. Unwritten pages hold NaN."""
    runner._pools = [jnp.full(pool.shape, jnp.nan, pool.dtype) for pool in runner._pools]
    scheduler = Scheduler(CONFIG.scheduler, PagePool(32, 16), Buckets.from_config(CONFIG, "cpu"))
    sequences = [scheduler.add(request) for request in requests]
    used = set()
    while scheduler.unfinished:
        plan = scheduler.schedule()
        assert plan is not None
        used.add(runner._shapes.forward_key(plan))
        scheduler.update(plan, runner.collect(runner.dispatch(plan)))
    return [sequence.output_token_ids for sequence in sequences], used


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
    tokens, used = run(runner, requests)
    assert {key.kind for key in used} == {"forward", "decode"}
    other = ModelRunner(dataclasses.replace(CONFIG, attention="xla"))
    expected, used = run(other, requests)
    assert {key.kind for key in used} == {"forward"}
    assert tokens == expected


def test_tokens_do_not_depend_on_the_batch(runner, requests):
    batched, _ = run(runner, requests)
    assert [run(runner, [request])[0][0] for request in requests] == batched


def test_the_choice_is_named_and_can_be_forced(runner):
    assert ("auto", *IMPLEMENTATIONS) == ATTENTION
    assert runner.info.attention == "triton_interpret"
    with pytest.raises(ValueError, match="'triton' runs on gpu; the platform is 'cpu'"):
        ModelRunner(dataclasses.replace(CONFIG, attention="triton"))
