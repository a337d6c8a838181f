"""Masks of token lists: bad words, which may begin in an earlier step, and allowed tokens that no slot has room for."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.constraints import token_masks
from jaxserve.engine.constraints.token_masks import TokenMasks
from jaxserve.engine.core import EngineCore
from jaxserve.engine.messages import AddRequest, outputs
from jaxserve.models.config import ModelConfig
from jaxserve.request import NO_TOKEN_LEFT, EngineRequest
from jaxserve.runner.fake import FakeRunner
from jaxserve.sampling_params import ALLOWED_WIDTH
from tests.budgets import budget

VOCAB = 101
ids = st.integers(0, VOCAB - 1)


def allowed(mask: np.ndarray, size: int = VOCAB) -> set[int]:
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert not bits[size:].any()
    return set(bits.nonzero()[0].tolist())


def request(**fields: Any) -> EngineRequest:
    return EngineRequest("r", (1, 2), 20, **fields)


@budget(100)
@given(
    st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple), max_size=6).map(tuple),
    st.lists(st.integers(0, 4), max_size=8),
)
def test_no_mask_lets_a_bad_word_be_completed(words, output):
    """And none forbids more: a token is allowed exactly if the output with it ends with no bad word."""
    masks, one = TokenMasks(VOCAB), request(bad_words_token_ids=words)
    assert masks.constrains(one) == bool(words)
    for end in range(len(output) + 1):
        so_far = output[:end]
        expected = {
            token for token in range(VOCAB) if not any(tuple([*so_far, token][-len(word) :]) == word for word in words)
        }
        assert allowed(masks.mask(one, so_far)) == expected


def test_only_too_many_allowed_tokens_need_a_mask():
    size = 5_000
    few, many = range(0, 2 * ALLOWED_WIDTH, 2), range(0, 2 * ALLOWED_WIDTH + 2, 2)
    masks = TokenMasks(size)
    assert not masks.constrains(request())
    assert not masks.constrains(request(allowed_token_ids=tuple(few)))
    one = request(allowed_token_ids=tuple(many), bad_words_token_ids=((4,), (6, 8)))
    assert masks.constrains(one)
    assert allowed(masks.mask(one, [6]), size) == set(many) - {4, 8}
    assert allowed(masks.mask(one, [8]), size) == set(many) - {4}


def test_masks_of_many_requests_are_not_kept_for_ever(monkeypatch):
    monkeypatch.setattr(token_masks, "_MOST_KEPT", 3)
    masks = TokenMasks(VOCAB)
    for number in range(10):
        one = EngineRequest(f"r{number}", (1,), 2, bad_words_token_ids=((number,),))
        assert allowed(masks.mask(one, [])) == set(range(VOCAB)) - {number}
    assert len(masks._kept) == 3
    again = EngineRequest("r9", (1,), 2, bad_words_token_ids=((50,),))  # another request of the same id
    assert allowed(masks.mask(again, [])) == set(range(VOCAB)) - {50}


def serve(requests: Sequence[EngineRequest]) -> dict[str, list[int]]:
    config = EngineConfig(
        architecture=ModelConfig("LlamaForCausalLM", VOCAB, 8, 8, 1, 1, 1, 8, 256),
        load_format="dummy",
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16),
        cache=CacheConfig(num_pages=20),
    )
    core = EngineCore(config, FakeRunner(num_pages=20))
    tokens: dict[str, list[int]] = {one.request_id: [] for one in requests}
    for one in requests:
        assert core.handle(AddRequest(one)) == []
    while core.busy:
        for message in core.step():
            for output in outputs(message):
                tokens[output.request_id] += output.token_ids
                if output.error:
                    tokens[f"{output.request_id} error"] = [output.error]  # type: ignore[list-item]
        core.check_integrity()
    return tokens


def test_an_engine_forbids_bad_words_of_itself():
    """Each two tokens in a row that the request has without bad words never follow each other with them."""
    plain = EngineRequest("plain", (1, 2, 3), 12)
    free = serve([plain])["plain"]
    words = tuple(itertools.pairwise(free))
    found = serve([plain, dataclasses.replace(plain, request_id="words", bad_words_token_ids=words)])
    assert found["plain"] == free
    assert not set(zip(found["words"], found["words"][1:], strict=False)) & set(words)
    assert len(found["words"]) == 12


def test_a_request_whose_lists_forbid_all_ends_alone():
    plain = EngineRequest("plain", (1, 2, 3), 6)
    nothing = dataclasses.replace(plain, request_id="r", allowed_token_ids=(4,), bad_words_token_ids=((4, 4),))
    found = serve([plain, nothing])
    assert found["r"] == [4]
    assert found["r error"] == [NO_TOKEN_LEFT]
    assert len(found["plain"]) == 6
