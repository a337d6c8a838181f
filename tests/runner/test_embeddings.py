"""Embeddings of real models against transformers in float32: over chunks, beside rows that generate, preempted."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
import pytest

from jaxserve.config.scheduling import PreemptionConfig
from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.embedding_output import EmbeddingRequestOutput
from jaxserve.engine.core import EngineCore
from jaxserve.engine.inline import InlineEngine
from jaxserve.llm import LLM
from jaxserve.pooling_params import PoolingParams
from jaxserve.programs.layout import pooling_layout
from jaxserve.programs.pooling import pool, sums
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.sampling_params import SamplingParams
from tests.models.checkpoints import SHAPES, write_shape

REFERENCES = pathlib.Path(__file__).parents[1] / "models" / "embedding_references.npz"
EMBEDDED_SHAPES = ("gqa_untied", "qwen3", "mistral")
LENGTHS = (1, 2, 15, 16, 17, 33, 60)
TOLERANCE = 1e-4
KINDS = ("LAST", "MEAN", "CLS")
GREEDY = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)


@pytest.fixture(scope="module")
def recorded():
    with np.load(REFERENCES) as file:
        return dict(file)


@pytest.fixture(scope="module", params=EMBEDDED_SHAPES)
def model(request, tmp_path_factory):
    """(name, config, runner) of one shape; prompts beyond 16 tokens take several steps."""
    directory = write_shape(tmp_path_factory.mktemp("checkpoint"), SHAPES[request.param])
    config = EngineConfig(
        model=str(directory),
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=128,
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=16),
        cache=CacheConfig(num_pages=64, page_size=16, swap_space=0.01),
        token_buckets=(16,),
        row_buckets=(8,),
    )
    return request.param, config, ModelRunner(config)


def prompts(name: str) -> list[dict[str, list[int]]]:
    shape = SHAPES[name]
    rng = np.random.RandomState(300 + shape.seed)
    return [{"prompt_token_ids": rng.randint(0, shape.raw["vocab_size"], length).tolist()} for length in LENGTHS]


def engine(model, runner=None, **scheduler) -> LLM:
    """An engine of its own, with its scheduler and pages, over the shape's runner."""
    _, config, made = model
    config = dataclasses.replace(config, scheduler=dataclasses.replace(config.scheduler, **scheduler))
    return LLM(config=config, client=InlineEngine(config, runner or made))


def vectors(outputs: Sequence[EmbeddingRequestOutput]) -> np.ndarray:
    assert not any(one.error for one in outputs)
    return np.array([one.outputs.embedding for one in outputs])


def raw(kind: str) -> PoolingParams:
    return PoolingParams(pooling_type=kind, normalize=False)


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_those_of_transformers(model, recorded, kind):
    name = model[0]
    with engine(model) as llm:
        found = vectors(llm.embed(prompts(name), raw(kind), use_tqdm=False))
        expected = recorded[f"{name}.{kind}"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
        unit = vectors(llm.embed(prompts(name), PoolingParams(pooling_type=kind), use_tqdm=False))
        few = vectors(llm.embed(prompts(name), PoolingParams(pooling_type=kind, dimensions=7), use_tqdm=False))
    lengths = np.linalg.norm(expected.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(unit, expected / lengths, rtol=0, atol=TOLERANCE)
    first = expected[:, :7] / np.linalg.norm(expected[:, :7], axis=1, keepdims=True)
    np.testing.assert_allclose(few, first, rtol=0, atol=TOLERANCE)


def test_not_a_bit_depends_on_chunks_and_neighbors(model):
    """Steps of 16 tokens, of 5, one prompt alone, and all beside generating rows: the same bits."""
    name, found = model[0], []
    for budget in (16, 5):
        with engine(model, long_prefill_token_threshold=budget) as llm:
            found.append([vectors(llm.embed(prompts(name), raw(kind), use_tqdm=False)) for kind in KINDS])
    with engine(model) as llm:
        found.append(
            [
                np.concatenate([vectors(llm.embed(one, raw(kind), use_tqdm=False)) for one in prompts(name)])
                for kind in KINDS
            ]
        )
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)


def mixed(llm: LLM, name: str) -> tuple[list[np.ndarray], list[list[int]], EngineCore]:
    """Embeds every prompt by every kind while every prompt generates, all at once; and what each came to."""
    front_end, client = llm.front_end, llm._client
    wanted: dict[str, list] = {}
    for number, prompt in enumerate(prompts(name)):
        ids = prompt["prompt_token_ids"]
        wanted[front_end.submit(ids, GREEDY, request_id=f"g{number}")] = []
        for kind in KINDS:
            wanted[front_end.submit(ids, raw(kind), request_id=f"{kind}{number}")] = []
    core = client.core
    while front_end.num_open:
        for message in client.receive():
            for delta in front_end.handle(message):
                assert not delta.error
                wanted[delta.request_id] += [delta.embedding] if delta.embedding else delta.token_ids
        core.check_integrity()
    embeddings = [
        np.stack([np.frombuffer(wanted[f"{kind}{number}"][0], "<f4") for number in range(len(LENGTHS))])
        for kind in KINDS
    ]
    return embeddings, [wanted[f"g{number}"] for number in range(len(LENGTHS))], core


@pytest.mark.parametrize("how", ["recompute", "swap"])
def test_beside_generating_rows_and_after_preemption(model, recorded, how):
    name, _, runner = model
    with engine(model) as llm:
        alone = [list(llm.generate(one, GREEDY, use_tqdm=False)[0].outputs[0].token_ids) for one in prompts(name)]
    preemption = PreemptionConfig(preemption_mode=how)
    few = dataclasses.replace(runner.info, num_pages=9)  # the longest prompt with its output has six

    class Small:
        """The runner, over fewer of its pages."""

        info = few

        def __getattr__(self, attribute: str):
            return getattr(runner, attribute)

    with engine(model, Small(), preemption=preemption) as llm:
        embeddings, generated, core = mixed(llm, name)
        assert core.scheduler.num_preemptions_by_kind[how] > 0
        assert core.runner.compile_misses == 0
    assert generated == alone
    for kind, found in zip(KINDS, embeddings, strict=True):
        np.testing.assert_allclose(found, recorded[f"{name}.{kind}"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("tokens", [8, 512, 8192])
def test_sums_are_exact_wherever_a_run_stands(tokens):
    """Against float64: values within a bit of the smallest part; what is no number stays with its own run."""
    rng = np.random.default_rng(tokens)
    hidden = (rng.normal(size=(tokens, 6)) * 10.0 ** rng.integers(-3, 3, size=(tokens, 1))).astype(np.float32)
    hidden[tokens - 1, 2], hidden[tokens - 2, 1] = np.nan, 8192.0
    runs = [(0, 0), (3, tokens - 6), (0, 2), (tokens - 1, 1), (tokens - 2, 1)]
    vector = np.zeros(pooling_layout(8).size, np.int32)
    fields = pooling_layout(8).views(vector)
    fields["first"][: len(runs)], fields["count"][: len(runs)] = zip(*runs, strict=True)
    pooled = np.asarray(jax.jit(functools.partial(pool, rows=8))(hidden, vector))
    found = sums(pooled, tokens)
    assert np.isnan(found[3]).all()
    assert np.isnan(found[4]).all()
    for (first, count), values in zip(runs[:3], found[:3], strict=True):
        expected = hidden[first : first + count].astype(np.float64).sum(axis=0)
        np.testing.assert_allclose(values, expected, rtol=0, atol=count * 2.0**-22)
    assert not found[5:].any()
