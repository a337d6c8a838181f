"""Log-probabilities of a real runner, against transformers in float32 and against numpy in float64."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from jaxserve.config.logprobs_config import LOGPROBS_MODES
from jaxserve.config.scheduling import PreemptionConfig
from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.constraints import pack_mask
from jaxserve.engine.inline import InlineEngine
from jaxserve.llm import LLM
from jaxserve.logprob_columns import LogprobColumns
from jaxserve.outputs import RequestOutput
from jaxserve.programs.logprobs import drawn_logprobs, likeliest, packed_logprobs
from jaxserve.programs.penalties import Penalties
from jaxserve.programs.sampler import processed_logits
from jaxserve.programs.slots import Slots
from jaxserve.runner.model_runner import ModelRunner
from jaxserve.runner.wrapper import RunnerWrapper
from jaxserve.sampling_params import SamplingParams
from tests.models.checkpoints import NEW_TOKENS, PROMPT_TOKENS, SHAPES, write_shape
from tests.runner.test_sampler import kept_by_sorting

SHAPE = "gqa_untied"
STRIDE = 5  # of the positions whose logits are recorded
REFERENCES = pathlib.Path(__file__).parents[1] / "models" / "references.npz"
EVERYTHING = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=-1)


@pytest.fixture(scope="module")
def recorded() -> tuple[list[int], np.ndarray]:
    """What transformers computes: a prompt and its greedy continuation, and log-probabilities of what follows every
    fifth position, float64 [positions, V]."""
    with np.load(REFERENCES) as file:
        tokens, logits = file[f"{SHAPE}.tokens"], file[f"{SHAPE}.logits"].astype(np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return tokens.tolist(), shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> EngineConfig:
    directory = write_shape(tmp_path_factory.mktemp("checkpoint"), SHAPES[SHAPE])
    return EngineConfig(
        model=str(directory),
        skip_tokenizer_init=True,
        scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64),
        cache=CacheConfig(num_pages=64, swap_space=0.001),
        token_buckets=(8, 64),
    )


@pytest.fixture(scope="module")
def runner(config) -> ModelRunner:
    return ModelRunner(config)


class FewPages(RunnerWrapper):
    """A runner that says that it has fewer pages than it has."""

    def __init__(self, runner: ModelRunner, num_pages: int):
        super().__init__(runner)
        self.info = dataclasses.replace(runner.info, num_pages=num_pages)


def engine(config: EngineConfig, runner: ModelRunner, num_pages: int | None = None, **limits: Any) -> LLM:
    config = dataclasses.replace(config, scheduler=dataclasses.replace(config.scheduler, **limits))
    return LLM(client=InlineEngine(config, runner if num_pages is None else FewPages(runner, num_pages)))


def generate(llm: LLM, prompts: Sequence[Sequence[int]], *params: SamplingParams) -> list[RequestOutput]:
    given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return llm.generate(given, params[0] if len(params) == 1 else params, use_tqdm=False)


def compare(positions: Sequence[dict | None], tokens: Sequence[int], first: int, logprobs: np.ndarray) -> int:
    """Compares those positions that are recorded; returns their number. first: index of the first of `tokens`."""
    count = 0
    for index, (position, token) in enumerate(zip(positions, tokens, strict=True), start=first):
        if (index - 1) % STRIDE or not index:
            continue
        row, count = logprobs[(index - 1) // STRIDE], count + 1
        assert position is not None
        assert position[token].rank == 1 + np.sum(row > row[token])
        order = np.argsort(-row)[: len(position)].tolist()
        by_rank = {one.rank: token_id for token_id, one in position.items()}
        wanted = order if token in order else [*order[:-1], token]
        assert [by_rank[rank] for rank in sorted(by_rank)] == wanted
        for token_id, one in position.items():
            assert_allclose(one.logprob, row[token_id], rtol=0, atol=1e-4)
    return count


def _core(llm: LLM) -> Any:
    client: Any = llm._client
    return client.core


CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "in chunks": {"long_prefill_token_threshold": 7},
    "recomputed": {
        "long_prefill_token_threshold": 7,
        "num_pages": 14,
        "preemption": PreemptionConfig(preemption_mode="recompute"),
    },
    "swapped": {
        "long_prefill_token_threshold": 7,
        "num_pages": 14,
        "preemption": PreemptionConfig(preemption_mode="swap"),
    },
}


@pytest.mark.parametrize("case", CASES)
def test_values_ranks_and_ids_are_those_of_transformers(config, runner, recorded, case):
    """Of a prompt and of greedy output, beside other requests that want other things, or nothing."""
    tokens, logprobs = recorded
    before = runner.num_compilations
    llm = engine(config, runner, **CASES[case])
    prompt = tokens[:PROMPT_TOKENS]
    greedy = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, logprobs=5, prompt_logprobs=0, ignore_eos=True)
    beside = SamplingParams(temperature=1.0, max_tokens=9, seed=1, ignore_eos=True)
    found = generate(llm, [tokens, prompt, tokens[3:50], tokens], EVERYTHING, greedy, beside, EVERYTHING)
    for output in (found[0], found[3]):
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        assert len(next(one for one in output.prompt_logprobs if one)) in (20, 21)
        assert compare(output.prompt_logprobs, tokens, 0, logprobs) == 16
    assert found[0].prompt_logprobs == found[3].prompt_logprobs
    (answer,) = found[1].outputs
    assert list(answer.token_ids) == tokens[PROMPT_TOKENS:]
    assert answer.logprobs is not None
    assert compare(answer.logprobs, answer.token_ids, PROMPT_TOKENS, logprobs) == 13
    assert compare(found[1].prompt_logprobs or (), prompt, 0, logprobs) == 3
    own = [position[token].logprob for position, token in zip(answer.logprobs, answer.token_ids, strict=True)]
    assert answer.cumulative_logprob == pytest.approx(sum(own), abs=1e-9)
    (other,) = found[2].outputs
    assert (other.logprobs, other.cumulative_logprob, found[2].prompt_logprobs) == (None, None, None)
    core = _core(llm)
    kind = {"recomputed": "recompute", "swapped": "swap"}.get(case)
    assert kind is None or core.scheduler.num_preemptions_by_kind[kind] >= 1
    assert runner.num_compilations == before
    assert runner.compile_misses == 0


def test_values_are_the_same_to_the_bit_alone_and_among_others(config, runner, recorded):
    tokens, _ = recorded
    params = SamplingParams(temperature=0.0, max_tokens=9, logprobs=5, prompt_logprobs=1, ignore_eos=True)
    prompts = [tokens[i : 9 + 8 * i] for i in range(8)]
    alone = [generate(engine(config, runner), [prompt], params)[0] for prompt in prompts]
    together = generate(engine(config, runner), prompts, params)
    for one, other in zip(alone, together, strict=True):
        assert one.outputs[0].logprobs == other.outputs[0].logprobs
        assert one.prompt_logprobs == other.prompt_logprobs


def test_tokens_are_the_same_whoever_wants_log_probabilities(config, runner, recorded):
    tokens, _ = recorded
    params = [SamplingParams(temperature=0.7 * (i % 3), max_tokens=12, seed=i, ignore_eos=True) for i in range(8)]
    plain = generate(engine(config, runner), [tokens[i : 20 + i] for i in range(8)], *params)
    wanting = [
        dataclasses.replace(one, logprobs=[None, 3, 0][i % 3], prompt_logprobs=[1, None][i % 2])
        for i, one in enumerate(params)
    ]
    scored = generate(engine(config, runner), [tokens[i : 20 + i] for i in range(8)], *wanting)
    assert [one.outputs[0].token_ids for one in plain] == [one.outputs[0].token_ids for one in scored]


def test_continuations_are_scored_by_the_sum_of_their_tokens(config, runner, recorded):
    tokens, logprobs = recorded
    llm = engine(config, runner, long_prefill_token_threshold=7)
    # From a recorded position on, one token, whatever it is; and the greedy continuation, token by token.
    prompt = {"prompt_token_ids": tokens[:31]}
    row = logprobs[30 // STRIDE]
    ones = llm.score(prompt, [{"prompt_token_ids": [token]} for token in range(0, 160, 9)], use_tqdm=False)
    assert_allclose([float(one) for one in ones], row[::9], rtol=0, atol=1e-4)
    assert [one.ranks[0] for one in ones] == [1 + int(np.sum(row > row[token])) for token in range(0, 160, 9)]
    (whole,) = generate(llm, [tokens], EVERYTHING)
    assert whole.prompt_logprobs is not None
    (longer,) = llm.score(prompt, {"prompt_token_ids": tokens[31:]}, use_tqdm=False)
    expected = [(whole.prompt_logprobs[place] or {})[tokens[place]] for place in range(31, len(tokens))]
    assert longer.token_ids == tuple(tokens[31:])
    assert list(longer.token_logprobs) == [one.logprob for one in expected]
    assert longer.ranks == tuple(one.rank for one in expected)
    assert longer.score == pytest.approx(sum(longer.token_logprobs), abs=1e-9)
    # One prompt for each, in the order given.
    pairs = llm.score(
        [{"prompt_token_ids": tokens[:n]} for n in (5, 2, 40)],
        [{"prompt_token_ids": tokens[n : n + 3]} for n in (5, 2, 40)],
        use_tqdm=False,
    )
    for n, pair in zip((5, 2, 40), pairs, strict=True):
        wanted = [(whole.prompt_logprobs[place] or {})[tokens[place]].logprob for place in range(n, n + 3)]
        assert list(pair.token_logprobs) == wanted


# ---- the programs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "most"), [(50, 0), (50, 7), (50, 50), (128 * 40, 20), (137 * 31, 5), (7919, 3)])
def test_the_likeliest_are_those_of_a_stable_sort(size, most):
    values = np.random.default_rng(size).integers(-40, 40, (5, size)).astype(np.float32)  # with many ties
    found, ids = jax.jit(likeliest, static_argnums=1)(values, most)
    order = np.argsort(-values, axis=-1, kind="stable")[:, :most]
    assert_array_equal(ids, order)
    assert_array_equal(found, np.take_along_axis(values, order, axis=-1))


def test_packed_values_against_float64():
    rng = np.random.default_rng(4)
    logits = (rng.standard_normal((6, 300)) * 9).astype(np.float32)
    logits[1, 250] = logits[1, 7] = 60.0  # of two equal ones each has the rank 2, as in vLLM
    logits[2, :290] = -np.inf
    ids = np.array([3, 7, 295, -1, 0, 299], np.int32)
    columns = LogprobColumns(np.asarray(jax.jit(packed_logprobs, static_argnums=2)(logits, ids, 4)))
    wide = logits.astype(np.float64)
    exact = wide - wide.max(-1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(-1, keepdims=True))
    own = exact[np.arange(6), np.maximum(ids, 0)]
    assert_allclose(columns.values, own, rtol=0, atol=2e-5)
    assert columns.ranks.tolist() == [
        int(np.sum(row >= row[max(token, 0)])) for row, token in zip(wide, ids, strict=True)
    ]
    assert columns.ranks[1] == 2
    order = np.argsort(-wide, axis=-1, kind="stable")[:, :4]
    assert_array_equal(columns.top_ids, order)
    assert_allclose(columns.top_values, np.take_along_axis(exact, order, -1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("mode", LOGPROBS_MODES)
def test_modes_against_float64(mode):
    """Rows: greedy; by temperature and filters; masked, suppressed and penalized; nearly greedy; padding."""
    size, rng = 60, np.random.default_rng(8)
    logits = (rng.standard_normal((5, size)) * 3).astype(np.float32)
    temperature = np.array([0.0, 0.7, 1.3, 1e-30, 1.0], np.float32)
    mask = rng.random(size) < 0.5
    slots = Slots.zeros(5, 1)
    fields = {
        "temperature": temperature,
        "top_k": np.array([5, 9, 0, 0, 0], np.int32),
        "top_p": np.array([0.1, 0.8, 1.0, 1.0, 1.0], np.float32),
        "min_p": np.array([0.9, 0.01, 0.0, 0.0, 0.0], np.float32),
        "typical_p": np.ones(5, np.float32),
        "penalty_row": np.array([-1, -1, 0, -1, -1], np.int32),
        "presence_penalty": np.full(5, 1.5, np.float32),
        "repetition_penalty": np.ones(5, np.float32),
        "stop_token_ids": np.tile(np.array([3] + [-1] * 31, np.int32), (5, 1)),
    }
    slots = dataclasses.replace(slots, sampling=slots.sampling | {name: jnp.asarray(v) for name, v in fields.items()})
    told = {
        "slot": np.array([0, 1, 2, 3, 5], np.int32),
        "position": np.zeros(5, np.int32),
        "suppress_stop": np.array([0, 0, 1, 0, 0], np.int32),
        "masked": np.array([0, 0, 1, 0, 0], np.int32),
        "logprobs": np.array([0, 1, 0, 0, 0], np.int32),  # one is enough
    }
    ids = np.array([0, int(np.argmax(logits[1])), int(np.argmax(np.where(mask, logits[2], -9))), 7, 1], np.int32)
    masks = np.stack([pack_mask(mask)] * 5)
    seen = np.flatnonzero(mask)[:2]
    penalties = Penalties.zeros(1, size)
    penalties = dataclasses.replace(penalties, counts=penalties.counts.at[0, seen].set(2))

    def drawn(logits, ids, slots, masks, told):
        processed = lambda: processed_logits(logits, slots, masks, penalties, told)  # noqa: E731
        return drawn_logprobs(logits, ids, told["logprobs"], processed, 6, mode)

    call = jax.jit(drawn)
    found = LogprobColumns(np.asarray(call(logits, ids, slots, masks, told)))

    values = logits.astype(np.float64)
    if mode.startswith("processed"):
        allowed = mask & (np.arange(size) != 3)
        values[2][seen] -= 1.5
        values[2] = np.where(allowed, values[2], -np.inf)
        values -= values.max(-1, keepdims=True)
        kept = kept_by_sorting(values[1] / temperature[1], 9, 0.8, 0.01)
        values[1] = [value / temperature[1] if i in kept else -np.inf for i, value in enumerate(values[1])]
        values[2] /= temperature[2]
        values[3] = np.where(values[3] == 0, 0.0, -np.inf)  # so small a temperature leaves the best alone
    if mode.endswith("logprobs"):
        shifted = values - values.max(-1, keepdims=True)
        values = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    for row in range(5):
        order = np.argsort(-values[row], kind="stable")[:6]
        real = np.isfinite(values[row][order])
        assert_array_equal(found.top_ids[row][real], order[real])
        assert_allclose(found.top_values[row][real], values[row][order][real], rtol=1e-6, atol=1e-5)
        assert (found.top_values[row][~real] < -1e20).all()
        if np.isfinite(values[row][ids[row]]):
            assert_allclose(found.values[row], values[row][ids[row]], rtol=1e-6, atol=1e-5)
    none = call(logits, ids, slots, masks, told | {"logprobs": np.zeros(5, np.int32)})
    assert not np.asarray(none).any()
