"""What Python callers say to the prefix cache: salts, opting out, warm-up and flush, over the fake runner."""

from __future__ import annotations

import asyncio

import pytest

from jaxserve.async_llm import AsyncLLM
from jaxserve.config.scheduling import SchedulerConfig
from jaxserve.config.settings import CacheConfig, EngineConfig
from jaxserve.engine.inline import InlineEngine
from jaxserve.llm import LLM
from jaxserve.models.config import ModelConfig
from jaxserve.request_checks import InfeasibleError
from jaxserve.runner.fake import FakeRunner
from jaxserve.sampling_params import SamplingParams

ONE = SamplingParams(temperature=0, max_tokens=1)
PROMPT = {"prompt_token_ids": [*range(1, 51)]}
"""50 tokens: three full pages of 16."""


def engine(**cache) -> InlineEngine:
    config = EngineConfig(
        architecture=ModelConfig("LlamaForCausalLM", 101, 8, 8, 1, 1, 1, 8, 256),
        load_format="dummy",
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=16),
        cache=CacheConfig(num_pages=33, **cache),
    )
    return InlineEngine(config, FakeRunner(num_pages=33, page_size=16))


def found(llm: LLM, *prompts, **options) -> list[int]:
    return [one.num_cached_tokens for one in llm.generate(list(prompts) or PROMPT, ONE, use_tqdm=False, **options)]


def test_options_of_a_request():
    with LLM(client=engine()) as llm:
        assert found(llm, prefix_caching=False) == found(llm) == [0]
        assert found(llm) == [48]
        assert found(llm, prefix_caching=False) == found(llm, cache_salt="s") == found(llm, tenant="t") == [0]
        assert found(llm, PROMPT, PROMPT, PROMPT, cache_salt=["", "s", "r"]) == [48, 48, 0]
        assert found(llm, PROMPT, PROMPT, prefix_caching=[True, False]) == [48, 0]
        (output,) = llm.embed(PROMPT, use_tqdm=False, cache_salt="s")
        assert output.num_cached_tokens == 48
        with pytest.raises(ValueError, match=r"prompts\[1\]: prefix_caching is 1; it must be true or false"):
            found(llm, PROMPT, PROMPT, prefix_caching=[True, 1])
        with pytest.raises(ValueError, match="cache_salt has 2 items for 1 prompts"):
            found(llm, cache_salt=["a", "b"])
        with pytest.raises(ValueError, match="cache_salt has 257 characters"):
            llm.score(PROMPT, PROMPT, use_tqdm=False, cache_salt="x" * 257)


def test_warm_up_and_flush():
    with LLM(client=engine()) as llm:
        (first,) = llm.warm_prefix(PROMPT, tenant="t")
        assert (first.num_prompt_tokens, first.num_cached_tokens, first.num_computed_tokens) == (50, 0, 50)
        again, other = llm.warm_prefix([PROMPT, PROMPT], tenant=["t", ""])
        assert (again.num_cached_tokens, other.num_cached_tokens) == (48, 0)
        assert found(llm, PROMPT, PROMPT, tenant=["t", "u"]) == [48, 0]
        assert llm.reset_prefix_cache() == 9
        assert llm.reset_prefix_cache() == 0
        assert found(llm, tenant="t") == [0]
        with pytest.raises(ValueError, match=r"prompts\[1\]: prompt is empty"):
            llm.warm_prefix([PROMPT, {"prompt_token_ids": []}])
        with pytest.raises(ValueError, match=r"prompts\[0\]: prompt has 257 tokens"):
            llm.warm_prefix({"prompt_token_ids": [1] * 257})


def test_an_engine_that_shares_no_pages_says_so():
    with LLM(client=engine(enable_prefix_caching=False)) as llm:
        assert found(llm) == found(llm) == [0]
        with pytest.raises(InfeasibleError, match="enable_prefix_caching is False; this server shares no pages"):
            llm.warm_prefix(PROMPT)
        assert llm.reset_prefix_cache() == 0


def test_the_same_with_asyncio():
    async def body() -> None:
        async with AsyncLLM(client=engine()) as llm:
            warmed = await llm.warm_prefix(PROMPT, cache_salt="s")
            assert (warmed.num_cached_tokens, warmed.num_computed_tokens) == (0, 50)
            assert (await llm.warm_prefix(PROMPT, cache_salt="s")).num_cached_tokens == 48
            for options, expected in (({}, 0), ({"cache_salt": "s"}, 48), ({"prefix_caching": False}, 0)):
                async for output in llm.generate(PROMPT, ONE, **options):
                    assert output.num_cached_tokens == expected, options
            assert await llm.reset_prefix_cache() == 6
            with pytest.raises(TypeError):
                await llm.warm_prefix(PROMPT, color=1)

    asyncio.run(body())
