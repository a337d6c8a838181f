"""Requests with sampling options over the real runner: the same tokens whatever is beside them, and what options
promise."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from jaxserve.config.scheduling import PreemptionConfig
from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.messages import AddRequest, EngineStats, outputs
from jaxserve.models.config import ModelConfig
from jaxserve.request import EngineRequest
from jaxserve.runner.model_runner import ModelRunner

VOCAB = 101
CONFIG = EngineConfig(
    architecture=ModelConfig("LlamaForCausalLM", VOCAB, 32, 48, 1, 2, 1, 32, 256, tie_word_embeddings=True),
    load_format="dummy",
    scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=64, max_penalty_rows=5),
    cache=CacheConfig(num_pages=24, page_size=16, swap_space=0.001),
    token_buckets=(8, 64),
    row_buckets=(8,),
    seed=7,
)


@pytest.fixture(scope="module")
def runner() -> ModelRunner:
    return ModelRunner(CONFIG)


def serve(
    runner: ModelRunner, requests: Sequence[EngineRequest], **limits: Any
) -> tuple[dict[str, list[int]], EngineStats]:
    config = dataclasses.replace(CONFIG, scheduler=dataclasses.replace(CONFIG.scheduler, **limits))
    core = EngineCore(config, runner)
    tokens: dict[str, list[int]] = {one.request_id: [] for one in requests}
    for one in requests:
        assert core.handle(AddRequest(one)) == []
    while core.busy:
        for message in core.step():
            for output in outputs(message):
                assert not output.error
                tokens[output.request_id] += output.token_ids
        core.check_integrity()
    return tokens, core.stats()


def mixed(count: int) -> list[EngineRequest]:
    """Requests of which each uses some options, and every third none."""
    rng = random.Random(7)
    choices: dict[str, Sequence[Any]] = {
        "top_k": (5, 40),
        "top_p": (0.5, 0.9),
        "min_p": (0.05,),
        "typical_p": (0.6,),
        "presence_penalty": (-1.0, 1.5),
        "frequency_penalty": (0.4, 2.0),
        "repetition_penalty": (1.3, 0.8),
        "logit_bias": (((3, 2.0), (7, -100.0)),),
        "allowed_token_ids": (tuple(range(0, 101, 2)),),
        "bad_words_token_ids": (((4,), (5, 6)),),
        "min_tokens": (3,),
    }
    found = []
    for number in range(count):
        names = rng.sample(sorted(choices), rng.randint(1, 6)) if number % 3 else []
        found.append(
            EngineRequest(
                f"r{number}",
                tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, 90))),
                rng.randint(10, 40),
                temperature=rng.choice((0.0, 0.8, 1.5)),
                seed=rng.randrange(-(2**63), 2**63),
                stop_token_ids=(1, 2),
                **{name: rng.choice(choices[name]) for name in names},
            )
        )
    return found


def test_tokens_are_the_same_alone_batched_chunked_preempted_and_swapped(runner):
    requests, before = mixed(14), runner.num_compilations
    alone: dict[str, list[int]] = {}
    for one in requests:
        alone |= serve(runner, [one])[0]
    found, stats = serve(runner, requests, preemption=PreemptionConfig(preemption_mode="recompute"))
    assert found == alone
    assert stats.num_preemptions_recompute
    swapping = PreemptionConfig(preemption_mode="swap")
    found, stats = serve(runner, requests[::-1], preemption=swapping, max_num_batched_tokens=16, max_penalty_rows=2)
    assert found == alone
    assert stats.num_preemptions_swap
    assert runner.num_compilations == before
    assert runner.compile_misses == 0


def test_penalties_count_what_was_drawn(runner):
    """A token drawn before loses to any other less than 2 behind; the four allowed ones are less than 4 apart."""
    plain = EngineRequest("plain", (1, 2, 3), 40)
    once = dataclasses.replace(plain, request_id="once", presence_penalty=2.0)
    evenly = dataclasses.replace(plain, request_id="evenly", frequency_penalty=2.0, allowed_token_ids=(5, 6, 7, 8))
    tokens, _ = serve(runner, [plain, once, evenly])
    assert len(set(tokens["plain"])) < 40 == len(set(tokens["once"]))
    for end in range(1, 41):
        counts = Counter(tokens["evenly"][:end])
        assert max(counts.values()) - min(counts.get(token, 0) for token in (5, 6, 7, 8)) <= 2


def test_the_prompt_counts_for_repetition_alone(runner):
    prompt = tuple(range(0, 101, 2))
    every = tuple((token, 50.0) for token in range(VOCAB))  # so that all logits are positive
    lowered = EngineRequest("lowered", prompt, 30, repetition_penalty=1000.0, logit_bias=every)
    others = dataclasses.replace(lowered, request_id="others", repetition_penalty=1.0, presence_penalty=2.0)
    tokens, _ = serve(runner, [lowered, others])
    assert not set(tokens["lowered"]) & set(prompt)
    assert set(tokens["others"]) & set(prompt)


def test_masks_and_biases_hold_what_they_promise(runner):
    some = tuple(range(10, 40))
    requests = [
        EngineRequest("biased", (1,), 12, logit_bias=((77, 100.0),)),
        EngineRequest("allowed", (1,), 30, temperature=2.0, allowed_token_ids=some),
        EngineRequest("words", (1,), 30, allowed_token_ids=(5, 6), temperature=2.0, bad_words_token_ids=((5, 5, 6),)),
        EngineRequest("word", (1,), 30, allowed_token_ids=(5, 6), temperature=2.0, bad_words_token_ids=((5,),)),
    ]
    tokens, _ = serve(runner, requests)
    assert tokens["biased"] == [77] * 12
    assert set(tokens["allowed"]) <= set(some)
    assert "556" not in "".join(map(str, tokens["words"]))
    assert set(tokens["words"]) == {5, 6}
    assert set(tokens["word"]) == {6}


def test_a_row_on_the_device_is_the_ids_of_its_request(runner):
    request = EngineRequest("r", (4, 4, 90), 9, frequency_penalty=0.1)
    tokens, _ = serve(runner, [request])
    penalties = runner._arrays.penalties
    assert np.asarray(penalties.counts[0]).tolist() == np.bincount(tokens["r"], minlength=VOCAB).tolist()
    bits = np.unpackbits(np.asarray(penalties.prompts[0]).view(np.uint8), bitorder="little")
    assert bits.nonzero()[0].tolist() == [4, 90]
