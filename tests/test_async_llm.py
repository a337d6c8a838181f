"""AsyncLLM: streams that run side by side and are canceled in every way, over the echo engine and over real ones."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math

import numpy as np
import pytest

import jaxserve
from jaxserve.async_llm import AsyncLLM
from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.engine.inline import InlineEngine
from jaxserve.frontend.delta import DeadlineError, DuplicateRequestError, EngineDeadError
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.llm import LLM
from jaxserve.pooling_params import PoolingParams
from jaxserve.sampling_params import RequestOutputKind, SamplingParams
from jaxserve.structured_outputs import StructuredOutputsParams
from tests.server.fakes import WAIT_SECONDS, EchoEngine, save_tokenizer

GREEDY = SamplingParams(temperature=0.0)
LONG = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer(save_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def run(test, tokenizer, engine=None):
    """Runs an asyncio test over the echo engine, which must be left without requests."""
    engine = engine or EchoEngine()

    async def body():
        async with AsyncLLM(client=engine, tokenizer=tokenizer) as llm:
            await test(llm, engine)
            engine.resume()
        assert engine.closed

    asyncio.run(asyncio.wait_for(body(), WAIT_SECONDS))


async def last_of(outputs):
    return [output async for output in outputs][-1]


def test_is_what_the_package_exports():
    assert (jaxserve.AsyncLLM, jaxserve.PoolingParams) == (AsyncLLM, PoolingParams)


def test_output_so_far(tokenizer):
    async def test(llm, engine):
        engine.pause()
        outputs = llm.generate("abc", GREEDY, "r")
        texts = []
        for _ in range(3):
            engine_steps = asyncio.to_thread(engine.wait_for_requests, 1)
            step = asyncio.ensure_future(anext(outputs))
            await engine_steps
            engine.allow(1)
            output = await step
            texts.append(output.outputs[0].text)
            assert not output.finished
            assert output.outputs[0].finish_reason is None
        assert texts == ["a", "ab", "abc"]
        engine.resume()
        last = await last_of(outputs)
        assert (last.request_id, last.prompt, last.finished) == ("r", "abc", True)
        assert last.prompt_token_ids == tuple(tokenizer.encode("abc"))
        assert (last.outputs[0].text, last.outputs[0].finish_reason) == ("abc", "stop")

    run(test, tokenizer)


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_several_samples(tokenizer, kind):
    """Each output is of one sample, or of all at the end; only the last one is finished."""

    async def test(llm, engine):
        params = SamplingParams(n=3, seed=1, output_kind=kind)
        outputs = [output async for output in llm.generate("abcd", params, "r")]
        assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
        texts = ["", "", ""]
        for output in outputs:
            for sample in output.outputs:
                before = texts[sample.index] if kind is RequestOutputKind.DELTA else ""
                texts[sample.index] = before + sample.text
        assert texts == ["abcd", "bcd", "cd"]
        assert len(outputs[-1].outputs) == (3 if kind is RequestOutputKind.FINAL_ONLY else 1)
        assert all(output.finished or len(output.outputs) == 1 for output in outputs)

    run(test, tokenizer)


def test_many_at_once(tokenizer):
    async def test(llm, engine):
        prompts = [f"prompt {number}" for number in range(30)]
        outputs = await asyncio.gather(*(last_of(llm.generate(prompt, GREEDY)) for prompt in prompts))
        assert [output.outputs[0].text for output in outputs] == prompts
        ids = await last_of(llm.generate({"prompt_token_ids": [100, 101]}, GREEDY))
        assert (ids.prompt, ids.outputs[0].token_ids[:2]) == (None, (100, 101))

    run(test, tokenizer)


@pytest.mark.parametrize("how", ["aclose", "break", "cancel", "abort", "exception"])
def test_what_is_left_early_is_aborted(tokenizer, how):
    async def test(llm, engine):
        engine.pause()
        engine.allow(2)

        async def read():
            async for output in llm.generate("abcdef", LONG, "r"):
                if how == "break" and len(output.outputs[0].token_ids) == 2:
                    break
                if how == "exception":
                    raise KeyError

        if how == "aclose":
            outputs = llm.generate("abcdef", LONG, "r")
            await anext(outputs)
            await outputs.aclose()
        elif how == "exception":
            with pytest.raises(KeyError):
                await read()
        else:
            task = asyncio.ensure_future(read())
            await asyncio.to_thread(engine.wait_for_requests, 1)
            if how == "cancel":
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            elif how == "abort":
                await llm.abort("r")
                await task
            else:
                await task
        await asyncio.to_thread(engine.wait_for_abort, "r")
        assert llm.num_unfinished_requests == 0

    run(test, tokenizer)


def test_an_abort_is_the_last_output(tokenizer):
    async def test(llm, engine):
        engine.pause()
        task = asyncio.ensure_future(last_of(llm.generate("abc", GREEDY, "r")))
        await asyncio.to_thread(engine.wait_for_requests, 1)
        await llm.abort(["r", "unknown"])
        last = await task
        assert (last.finished, last.outputs[0].finish_reason) == (True, "abort")

    run(test, tokenizer)


def test_embeddings(tokenizer):
    async def test(llm, engine):
        (output,) = [one async for one in llm.encode("abc", PoolingParams(pooling_type="mean"), "r")]
        assert (output.request_id, output.finished, output.outputs.hidden_size) == ("r", True, 160)
        assert np.isclose(np.linalg.norm(output.outputs.embedding), 1)
        found = await asyncio.gather(*(llm.embed(text, PoolingParams(dimensions=3)) for text in ("a", "b", "abc")))
        assert [one.prompt for one in found] == ["a", "b", "abc"]
        assert {len(one.outputs.embedding) for one in found} == {3}
        engine.pause()
        task = asyncio.ensure_future(llm.embed("abc", request_id="e"))
        await asyncio.to_thread(engine.wait_for_requests, 5)
        task.cancel()
        await asyncio.to_thread(engine.wait_for_abort, "e")

    run(test, tokenizer)


def test_errors(tokenizer):
    async def test(llm, engine):
        with pytest.raises(ValueError, match="prompt is empty"):
            await last_of(llm.generate("", GREEDY))
        with pytest.raises(ValueError, match="dimensions is 161; the model's embeddings have 160"):
            await llm.embed("a", PoolingParams(dimensions=161))
        with pytest.raises(ValueError, match="prompt is of type int"):
            await last_of(llm.generate(5, GREEDY))
        with pytest.raises(DeadlineError):
            await llm.embed("a", deadline=1.0)
        engine.pause()
        task = asyncio.ensure_future(last_of(llm.generate("abc", GREEDY, "r")))
        await asyncio.to_thread(engine.wait_for_requests, 1)
        with pytest.raises(DuplicateRequestError):
            await last_of(llm.generate("abc", GREEDY, "r"))
        assert not llm.errored
        engine.die("no more")
        with pytest.raises(EngineDeadError, match="no more"):
            await task
        assert llm.errored
        with pytest.raises(EngineDeadError, match="no more"):
            await llm.check_health()

    run(test, tokenizer)


def test_after_shutdown(tokenizer):
    async def test(llm, engine):
        engine.pause()
        task = asyncio.ensure_future(last_of(llm.generate("abc", GREEDY, "r")))
        await asyncio.to_thread(engine.wait_for_requests, 1)
        await llm.shutdown()
        with pytest.raises(EngineDeadError):
            await task
        with pytest.raises(EngineDeadError, match="was shut down"):
            await last_of(llm.generate("abc", GREEDY))
        await llm.shutdown()

    run(test, tokenizer)


def test_options_are_checked_before_anything_starts(tokenizer):
    with pytest.raises(ValueError, match="it takes no model or engine options"):
        AsyncLLM("x", client=EchoEngine())
    with pytest.raises(ValueError, match="engine option 'max_seqs' is unknown"):
        AsyncLLM("models/tiny/checkpoint", max_seqs=1)


CONFIG = EngineConfig(
    model="models/tiny/checkpoint",
    scheduler=SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=32),
    cache=CacheConfig(num_pages=64),
    token_buckets=(32,),
    row_buckets=(8,),
)


def added_up(outputs):
    """The output that those of kind delta make together."""
    parts = [output.outputs[0] for output in outputs]
    completion = dataclasses.replace(
        parts[-1],
        text="".join(part.text for part in parts),
        token_ids=tuple(token_id for part in parts for token_id in part.token_ids),
        logprobs=[position for part in parts for position in part.logprobs],
        cumulative_logprob=math.fsum(position[own].logprob for part in parts for own, position in positions(part)),
    )
    (prompt_logprobs,) = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
    return dataclasses.replace(outputs[-1], outputs=(completion,), prompt_logprobs=prompt_logprobs)


def positions(completion):
    return zip(completion.token_ids, completion.logprobs, strict=True)


@pytest.mark.one_lane
def test_an_engine_process_of_its_own_gives_what_llm_gives():
    prompt = "copy: abc; 12+34=\n"
    wanted = SamplingParams(
        temperature=1.2, seed=3, min_tokens=6, max_tokens=12, logprobs=2, prompt_logprobs=1, truncate_prompt_tokens=9
    )
    with LLM(client=InlineEngine(CONFIG), tokenizer=Tokenizer("models/tiny/checkpoint")) as llm:
        (expected,) = llm.generate(prompt, wanted, use_tqdm=False)
        vector = llm.embed(prompt, use_tqdm=False)[0].outputs.embedding
    assert len(expected.outputs[0].token_ids) >= 6
    assert len(expected.outputs[0].logprobs[0]) >= 2
    assert len(expected.prompt_logprobs) == len(expected.prompt_token_ids) == 9
    assert expected.num_truncated_tokens > 0
    expected = dataclasses.replace(expected, request_id="r")

    async def body():
        async with AsyncLLM(config=CONFIG) as llm:
            found = {}
            for kind in (None, *RequestOutputKind):
                params = dataclasses.replace(wanted, output_kind=kind)
                found[kind] = [output async for output in llm.generate(prompt, params, "r")]
            assert (await llm.embed(prompt)).outputs.embedding == vector
            digits = StructuredOutputsParams(regex="[0-9]{4}")
            last = await last_of(llm.generate(prompt, SamplingParams(structured_outputs=digits)))
            assert last.outputs[0].text.isdecimal()
        return found

    found = asyncio.run(asyncio.wait_for(body(), 4 * WAIT_SECONDS))
    assert found[RequestOutputKind.FINAL_ONLY] == [expected]
    for kind in (None, RequestOutputKind.CUMULATIVE):
        assert found[kind][-1] == expected
        for output in found[kind]:
            completion = output.outputs[0]
            assert expected.outputs[0].text.startswith(completion.text)
            assert completion.logprobs == expected.outputs[0].logprobs[: len(completion.token_ids)]
            assert output.prompt_logprobs == expected.prompt_logprobs
    deltas = added_up(found[RequestOutputKind.DELTA])
    total = deltas.outputs[0].cumulative_logprob
    assert total == pytest.approx(expected.outputs[0].cumulative_logprob, rel=1e-12)
    completion = dataclasses.replace(deltas.outputs[0], cumulative_logprob=expected.outputs[0].cumulative_logprob)
    assert dataclasses.replace(deltas, outputs=(completion,)) == expected


def test_canceled_streams_of_a_model_free_their_pages():
    """Two engines at once over a real model; half of the streams of each are canceled in the middle."""
    tokenizer = Tokenizer("models/tiny/checkpoint")
    engines = [InlineEngine(CONFIG), InlineEngine(CONFIG)]

    async def body():
        async with (
            AsyncLLM(client=engines[0], tokenizer=tokenizer) as one,
            AsyncLLM(client=engines[1], tokenizer=tokenizer) as other,
        ):
            whole, canceled = [], []
            for llm in (one, other):
                whole += [asyncio.ensure_future(last_of(llm.generate("12+34=\n", GREEDY))) for _ in range(4)]
                canceled += [(llm, llm.generate("copy: abc\n", LONG)) for _ in range(4)]
            for _, outputs in canceled:
                await anext(outputs)
                await outputs.aclose()
            texts = {(await task).outputs[0].text.strip() for task in whole}
            assert len(texts) == 1
            vector = (await one.embed("12+34=")).outputs.embedding
            assert vector == (await other.embed("12+34=")).outputs.embedding
            while any(engine.core.busy for engine in engines):  # noqa: ASYNC110  the engines have no event for it
                await asyncio.sleep(0.005)
            for engine in engines:
                assert engine.core.scheduler.pool.num_used == 0
                engine.core.check_integrity()

    asyncio.run(asyncio.wait_for(body(), WAIT_SECONDS))
