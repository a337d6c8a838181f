"""Sampling parameters and requests: every refusal names field, value and limit."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig, ServerConfig
from jaxserve.request import check_identity
from jaxserve.request_checks import InfeasibleError, ModelLimits, validate_request
from jaxserve.sampling_params import SamplingParams

TEXT: Any = "x"
HALF: Any = 1.5
LIMITS = ModelLimits(vocab_size=100, max_model_len=64, pool_tokens=48, max_prompt_len=40, eos_token_ids=(2,))


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"temperature": math.nan}, "temperature is nan; it must be a finite number"),
        ({"temperature": math.inf}, "temperature is inf; it must be a finite number"),
        ({"temperature": -0.5}, "temperature is -0.5; it must be at least 0 and at most 100"),
        ({"temperature": 10**5000}, "temperature is a whole number of 16610 bits; it must be at most 100"),
        ({"temperature": "warm"}, "temperature is 'warm'; it must be a number"),
        ({"temperature": True}, "temperature is True; it must be a number"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ({"top_p": math.nan}, "top_p is nan"),
        ({"min_p": 1.5}, "min_p is 1.5; it must be at least 0 and at most 1"),
        ({"top_k": -2}, "top_k is -2; it must be from -1 to 2147483647"),
        ({"top_k": 1.5}, "top_k is 1.5; it must be a whole number"),
        (
            {"seed": -(2**63) - 1},
            "seed is -9223372036854775809; it must be from -9223372036854775808 to 9223372036854775807",
        ),
        ({"seed": 2**63}, "seed is 9223372036854775808; it must be from"),
        ({"typical_p": 0.0}, "typical_p is 0.0; it must be above 0 and at most 1"),
        ({"typical_p": math.nan}, "typical_p is nan; it must be a finite number"),
        ({"presence_penalty": 2.5}, "presence_penalty is 2.5; it must be at least -2 and at most 2"),
        ({"frequency_penalty": -math.inf}, "frequency_penalty is -inf; it must be a finite number"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be above 0 and at most 1000"),
        ({"logit_bias": {5: 101}}, "logit_bias[5] is 101; it must be at least -100 and at most 100"),
        ({"logit_bias": dict.fromkeys(range(1025), 0.0)}, "logit_bias has 1025 ids; at most 1024 are allowed"),
        ({"allowed_token_ids": []}, "allowed_token_ids has 0 ids; it must have at least 1, or be left out"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids is -1; it must be from 0"),
        ({"allowed_token_ids": 5}, "allowed_token_ids is 5; it must be a list"),
        ({"bad_words": [""]}, "bad_words has ''; each bad_words must be a string of at least one character"),
        ({"bad_words": ["a"] * 257}, "bad_words has 257 strings; at most 256 are allowed"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be from 1 to 2147483647"),
        ({"max_tokens": -3}, "max_tokens is -3"),
        ({"max_tokens": 2**31}, "max_tokens is 2147483648"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens is 4; it must be at most max_tokens 3"),
        ({"stop": ["a"] * 10_000}, "stop has 10000 strings; at most 16 are allowed"),
        ({"stop": 5}, "stop is 5; it must be a list"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5; it must be a list"),
        ({"stop": [""]}, "stop has ''; each stop must be a string of at least one character"),
        ({"stop": ["x" * 300]}, "stop has a string of 300 characters; at most 256"),
        ({"stop_token_ids": range(17)}, "stop_token_ids has 17 ids; at most 16 are allowed"),
        ({"stop_token_ids": [-1]}, "stop_token_ids is -1; it must be from 0"),
        ({"ignore_eos": 1}, "ignore_eos is 1; it must be true or false"),
    ],
)
def test_invalid_sampling_parameters(fields, line):
    with pytest.raises(ValueError, match="^" + re.escape(line)):
        SamplingParams(**fields)


@pytest.mark.parametrize(
    ("prompt", "fields", "line"),
    [
        ([], {}, "prompt is empty; at least one token is needed"),
        ([1, 100], {}, r"prompt_token_ids\[1\] is 100; token ids must be whole numbers from 0 to 99"),
        ([-1], {}, r"prompt_token_ids\[0\] is -1"),
        ([True], {}, r"prompt_token_ids\[0\] is True"),
        ([1] * 64, {}, "prompt has 64 tokens; with at least one output token it must fit max_model_len 64"),
        ([1] * 41, {"max_tokens": 1}, "prompt has 41 tokens; without chunked prefill at most .* 40 are allowed"),
        (
            [1] * 30,
            {"max_tokens": 35},
            "prompt has 30 tokens and max_tokens is 35; together 65 exceed max_model_len 64",
        ),
        ([1], {"stop_token_ids": [100]}, "stop_token_ids has 100; token ids must be from 0 to 99"),
        ([1], {"logit_bias": {100: 1.0}}, "logit_bias has 100; token ids must be from 0 to 99"),
        ([1], {"allowed_token_ids": [5, 100]}, "allowed_token_ids has 100; token ids must be from 0 to 99"),
        (
            [1],
            {"allowed_token_ids": [2], "min_tokens": 3},
            "min_tokens is 3 and allowed_token_ids has only stop tokens, which cannot be drawn before that: allow",
        ),
        ([1] * 40, {"min_tokens": 25}, "min_tokens is 25; only max_tokens 24 can be generated"),
    ],
)
def test_invalid_requests(prompt, fields, line):
    with pytest.raises(ValueError, match=line) as caught:
        validate_request(prompt, SamplingParams(**fields), LIMITS)
    assert not isinstance(caught.value, InfeasibleError)


def test_a_request_that_never_fits_the_pool():
    line = "prompt has 30 tokens and max_tokens is 30; together 60 exceed the page pool of 48 tokens"
    with pytest.raises(InfeasibleError, match=line):
        validate_request([1] * 30, SamplingParams(max_tokens=30), LIMITS)
    assert validate_request([1] * 30, SamplingParams(max_tokens=19), LIMITS) == 19  # the last token needs no page


def test_max_tokens_left_open_is_what_fits():
    assert validate_request([1] * 5, SamplingParams(), ModelLimits(100, 64, 1000, 64, ())) == 59
    assert validate_request([1] * 30, SamplingParams(), LIMITS) == 19


def test_none_is_no_stop():
    params = SamplingParams(stop=None, stop_token_ids=None)  # type: ignore[arg-type]
    assert (params.stop, params.stop_token_ids) == ((), ())


def test_identities_are_bounded():
    check_identity("tenant", "x" * 256)
    with pytest.raises(ValueError, match="tenant is 5; it must be text"):
        check_identity("tenant", 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tenant has 257 characters; at most 256 are allowed"):
        check_identity("tenant", "x" * 257)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: SchedulerConfig(max_num_seqs=0), "max_num_seqs is 0; it must be at least 1"),
        (lambda: SchedulerConfig(max_num_batched_tokens=4), "max_num_batched_tokens is 4; it must be at least 8"),
        (
            lambda: SchedulerConfig(max_num_seqs=64, max_num_batched_tokens=32),
            "max_num_batched_tokens is 32; it must be at least max_num_seqs 64",
        ),
        (lambda: SchedulerConfig(policy="lottery"), "policy is 'lottery'; it must be one of fcfs"),
        (lambda: CacheConfig(page_size=17), "page_size is 17; it must be one of 16, 32, 64, 128"),
        (lambda: CacheConfig(num_pages=1), "num_pages is 1; it must be at least 2"),
        (lambda: CacheConfig(gpu_memory_utilization=1.5), "gpu_memory_utilization is 1.5"),
        (lambda: CacheConfig(gpu_memory_utilization=TEXT), "gpu_memory_utilization is 'x'; it must be a number"),
        (lambda: CacheConfig(num_pages=9, kv_cache_memory_bytes=9), "num_pages is 9 and kv_cache_memory_bytes is 9"),
        (
            lambda: SchedulerConfig(enable_chunked_prefill=False, long_prefill_token_threshold=5),
            "long_prefill_token_threshold is 5; it needs enable_chunked_prefill",
        ),
        (lambda: ServerConfig(EngineConfig(model="m"), port=HALF), "port is 1.5; it must be a whole number"),
        (lambda: EngineConfig(model="m", seed=-1), "seed is -1; it must be at least 0"),
        (lambda: EngineConfig(), "model is not set"),
        (lambda: EngineConfig(load_format="dummy"), "architecture is not set"),
        (lambda: EngineConfig(model="m", dtype="int4"), "dtype is 'int4'; it must be one of auto, float32"),
        (lambda: EngineConfig(model="m", token_buckets=(8, 64)), "token_buckets ends at 64; it must reach .* 512"),
        (lambda: EngineConfig(model="m", row_buckets=(64, 8)), r"row_buckets is \(64, 8\); it must rise strictly"),
        (
            lambda: EngineConfig.from_options(model="m", color=1),
            "engine option 'color' is unknown; known are",
        ),
        (lambda: ServerConfig(EngineConfig(model="m"), port=70_000), "port is 70000; it must be from 0 to 65535"),
    ],
)
def test_invalid_configurations(make, line):
    with pytest.raises(ValueError, match=line):
        make()


def test_flat_options_find_their_section():
    config = EngineConfig.from_options(model="m", max_num_seqs=7, block_size=32, scheduling_policy="fcfs", seed=5)
    assert (config.scheduler.max_num_seqs, config.cache.page_size, config.seed) == (7, 32, 5)
