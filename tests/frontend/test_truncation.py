"""truncate_prompt_tokens: the end of the prompt is kept, and the output says how much was cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.frontend.preparation import Preparation
from jaxserve.frontend.preparation_steps import finish
from jaxserve.llm import LLM
from jaxserve.request import RequestOptions
from jaxserve.request_checks import ModelLimits
from jaxserve.sampling_params import SamplingParams
from tests.frontend.fakes import READY, RuleEngine
from tests.frontend.tokenizers_for_tests import load

MOST = READY.limits.pool_tokens  # a prompt with one output token; the context has 64, the pool 48


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load(tmp_path_factory.mktemp("tokenizer"))


def prepared(tokenizer, prompt, limits: ModelLimits = READY.limits, **options):
    steps = Preparation(tokenizer, limits).steps(prompt, SamplingParams(**options), RequestOptions())
    return finish(steps)


@settings(max_examples=50)
@given(
    text=st.text("abc é", min_size=1, max_size=80),
    kept=st.integers(1, 40),
    max_tokens=st.one_of(st.none(), st.integers(1, 8)),
)
def test_the_last_tokens_are_kept_of_texts_and_ids_alike(tokenizer, text, kept, max_tokens):
    ids = tokenizer.encode(text)
    for prompt in (text, ids):
        got = prepared(tokenizer, prompt, truncate_prompt_tokens=kept, max_tokens=max_tokens)
        assert got.prompt_token_ids == tuple(ids[-kept:])
        assert got.truncated_tokens == max(len(ids) - kept, 0)


@settings(max_examples=50)
@given(size=st.integers(1, 200), max_tokens=st.one_of(st.none(), st.integers(1, 47)), min_tokens=st.integers(0, 3))
def test_minus_one_keeps_as_many_as_there_is_room_for(tokenizer, size, max_tokens, min_tokens):
    if max_tokens is not None:
        min_tokens = min(min_tokens, max_tokens)
    options = {"truncate_prompt_tokens": -1, "max_tokens": max_tokens, "min_tokens": min_tokens}
    got = prepared(tokenizer, [5] * size, **options)
    kept = len(got.prompt_token_ids)
    assert kept + got.truncated_tokens == size
    if got.truncated_tokens:  # with one token more it would not fit
        longer = {**options, "truncate_prompt_tokens": None, "max_tokens": max_tokens or max(min_tokens, 1)}
        assert len(prepared(tokenizer, [5] * kept, **longer).prompt_token_ids) == kept
        with pytest.raises(ValueError, match="exceed"):
            prepared(tokenizer, [5] * (kept + 1), **longer)


def test_a_long_text_is_cut_in_steps_and_no_more_of_it_is_held_than_is_kept(tokenizer):
    text = "ab " * 50_000
    got = prepared(tokenizer, text, truncate_prompt_tokens=7)
    ids = tokenizer.encode(text)
    assert (got.prompt_token_ids, got.truncated_tokens) == (tuple(ids[-7:]), len(ids) - 7)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"truncate_prompt_tokens": 64}, "truncate_prompt_tokens is 64; at most 63 prompt tokens fit max_model_len 64"),
        (
            {"truncate_prompt_tokens": 40, "max_tokens": 30},
            "prompt has 40 tokens and max_tokens is 30; together 70 exceed max_model_len 64",
        ),
        (
            {"truncate_prompt_tokens": -1, "max_tokens": 64},
            "prompt has 1 tokens and max_tokens is 64; together 65 exceed max_model_len 64",
        ),
        ({}, "prompt has 90 tokens; with at least one output token it must fit max_model_len 64"),
    ],
)
def test_what_does_not_fit_all_the_same_is_refused(tokenizer, options, line):
    with pytest.raises(ValueError, match=f"^{line}"):
        prepared(tokenizer, [5] * 90, **options)


def test_an_output_says_how_many_tokens_were_cut(tokenizer):
    llm = LLM(client=RuleEngine(), tokenizer=tokenizer)
    params = [SamplingParams(truncate_prompt_tokens=3), SamplingParams(truncate_prompt_tokens=10), SamplingParams()]
    cut, whole, plain = llm.generate(["abcdef"] * 3, params, use_tqdm=False)
    ids = tuple(tokenizer.encode("abcdef"))
    assert (cut.prompt_token_ids, cut.num_truncated_tokens, cut.outputs[0].text) == (ids[-3:], len(ids) - 3, "def")
    for output in (whole, plain):
        assert (output.prompt_token_ids, output.num_truncated_tokens) == (ids, 0)
    assert cut.prompt == "abcdef"
