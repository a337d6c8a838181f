"""The runner over a small random model: tokens independent of the batch, a closed compile set, pages in place."""

from __future__ import annotations

import contextlib
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.inline import InlineEngine
from jaxserve.engine.messages import AddRequest
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers.attention_backends import dense_attend
from jaxserve.models.params import bind, make_mesh, random_params
from jaxserve.programs.compiler import CompileMissError
from jaxserve.programs.step_programs import ProgramKey, program_keys
from jaxserve.request import EngineRequest
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.runner.protocol import StepNotStartedError
from jaxserve.scheduler import StepPlan
from jaxserve.scheduler.plan import NO_DECODES, NO_SAMPLES
from tests.runner.drive import drive

MODEL = ModelConfig("LlamaForCausalLM", 96, 32, 48, 2, 4, 2, 32, 256, tie_word_embeddings=True)
CONFIG = EngineConfig(
    architecture=MODEL,
    load_format="dummy",
    scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32),
    cache=CacheConfig(num_pages=64),
    token_buckets=(8, 32),
    compilation_cache_dir=None,  # a program that was loaded has lost its text
    seed=3,
)


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner(CONFIG)


@pytest.fixture(scope="module")
def requests() -> list[EngineRequest]:
    rng = np.random.default_rng(0)
    return [
        EngineRequest(
            f"r{i}",
            tuple(int(token) for token in rng.integers(0, 96, rng.integers(1, 70))),
            max_tokens=int(rng.integers(1, 30)),
            temperature=0.0 if i % 2 else 1.5,
            top_k=int(rng.integers(0, 20)),
            top_p=0.9 if i % 3 else 1.0,
            min_p=0.02 if i % 5 else 0.0,
            seed=i,
        )
        for i in range(16)
    ]


def test_tokens_do_not_depend_on_scheduling(runner, requests):
    batched = drive(runner, CONFIG, requests).tokens
    assert [drive(runner, CONFIG, [request]).tokens[0] for request in requests] == batched
    assert drive(runner, CONFIG, requests, long_prefill_token_threshold=5).tokens == batched
    preempted = drive(runner, CONFIG, requests, num_pages=9)
    assert preempted.num_preemptions >= 5
    assert preempted.tokens == batched


@pytest.mark.parametrize("prompt", [48, 53])
def test_samples_are_separate_requests_whose_prompt_is_computed_once(runner, prompt):
    """All at once, on four slots, in chunks of five and preempted; every page holds NaN until something is written."""
    first = EngineRequest(
        "r", tuple(7 * token % 96 for token in range(prompt)), max_tokens=20, temperature=1.2, seed=2**63 - 3
    )
    samples = [first, *[first.sample(index, f"r/{index}") for index in range(1, 8)]]
    assert samples[3].seed == -(2**63)
    alone = [drive(runner, CONFIG, [sample]).tokens[0] for sample in samples]
    assert len({tuple(tokens) for tokens in alone}) == 8
    compiled = runner.num_compilations
    together = drive(runner, CONFIG, [samples])
    assert (together.tokens, together.prefill_tokens) == (alone, prompt)
    waves = drive(runner, CONFIG, [samples], max_num_seqs=4, long_prefill_token_threshold=5)
    assert (waves.tokens, waves.prefill_tokens) == (alone, prompt + 4)
    preempted = drive(runner, CONFIG, [samples], num_pages=9)
    assert preempted.num_preemptions >= 3
    assert preempted.tokens == alone
    assert runner.num_compilations == compiled
    assert runner.compile_misses == 0


def test_greedy_tokens_are_the_dense_models(runner, requests):
    """Against the same weights through plain causal attention over the whole sequence, without pages or buckets."""
    params = random_params(MODEL, "float32", make_mesh(), CONFIG.seed)
    model = bind(MODEL, params)
    attend = dense_attend()

    @jax.jit
    def logits(tokens: jax.Array) -> jax.Array:
        hidden, _ = model(tokens, jnp.arange(128), [None] * MODEL.num_hidden_layers, attend)
        return model.logits(hidden)

    for request in [one for one in requests if one.temperature == 0][:4]:
        (tokens,) = drive(runner, CONFIG, [request]).tokens
        context = list(request.prompt_token_ids)
        for token in tokens:
            row = np.asarray(logits(np.array(context + [0] * (128 - len(context)))))[len(context) - 1]
            assert row[token] >= row.max() - 1e-4
            context.append(token)


def test_parts_of_the_loop_have_names_in_a_profile(runner, requests, monkeypatch):
    named = []

    def annotation(name: str) -> contextlib.AbstractContextManager[None]:
        named.append(name)
        return contextlib.nullcontext()

    monkeypatch.setattr(jax.profiler, "TraceAnnotation", annotation)
    engine = InlineEngine(CONFIG, runner)
    engine.send(AddRequest(dataclasses.replace(requests[0], max_tokens=1, prompt_token_ids=(1,) * 50)))
    while engine.core.busy or not named:
        engine.receive()
    assert named == ["Schedule", "Execute", "Schedule", "Execute", "Sample", "Schedule"]  # a chunk, a chunk, the end


def test_nothing_compiles_after_start(runner, requests):
    before = runner.num_compilations
    drive(runner, CONFIG, requests)
    drive(runner, CONFIG, requests[:3], long_prefill_token_threshold=3)
    assert runner.num_compilations == before > 0
    assert runner.info.num_executables == len(program_keys(runner._shapes)) == 12


def test_a_compile_miss_is_an_error_and_counted(runner):
    plan = StepPlan(0, NO_DECODES, (), NO_SAMPLES, token_bucket=16, row_bucket=0, num_tokens=0)
    with pytest.raises(
        StepNotStartedError, match=r"no forward program of size 16 was compiled at start.*\[8, 32\]"
    ) as error:
        runner.dispatch_forward(plan)
    assert isinstance(error.value.__cause__, CompileMissError)
    assert runner.compile_misses == 1


@pytest.mark.parametrize("size", [8, 32])
def test_the_pool_is_updated_in_place(runner, size):
    """The donated pools, slots and hidden buffer are aliased, and no instruction copies something pool-shaped."""
    executable = runner.programs.executables[ProgramKey("forward", size)]
    shapes = runner._shapes
    pool = shapes.num_pages * 2 * MODEL.num_key_value_heads * 16 * MODEL.head_dim * 4
    assert runner.programs.memory[ProgramKey("forward", size)].aliased >= pool * MODEL.num_hidden_layers
    pool_shape = re.escape(f"[{shapes.num_pages},2,{MODEL.num_key_value_heads},16,{MODEL.head_dim}]")
    text = executable.as_text()
    assert re.search(pool_shape, text)
    assert not re.search(rf"= \w+{pool_shape}\S* (copy|transpose|convert)\(", text)
