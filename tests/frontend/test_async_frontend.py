"""Streams on an event loop, against an engine played by hand and one that answers by a rule."""

import asyncio
import contextlib
import gc
import math
import threading
import time

import pytest

from jaxserve.engine.messages import AddRequest, EngineFailed, EngineOutput, EngineStats, TokenBatch
from jaxserve.frontend.async_frontend import AsyncFrontEnd
from jaxserve.frontend.delta import Cause, DeadlineError, DuplicateRequestError, EngineDeadError, QueueFullError
from jaxserve.frontend.encoding import SHORT_TEXT, Encoder
from jaxserve.request import FinishReason
from jaxserve.sampling_params import SamplingParams
from tests.frontend.fakes import HandPlayedEngine, RuleEngine, asked
from tests.frontend.tokenizers_for_tests import EOS, load

PARAMS = SamplingParams(temperature=0.0, max_tokens=20)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load(tmp_path_factory.mktemp("tokenizer"))


def run(scenario):
    """Runs an async scenario; the debug loop reports coroutines and callbacks that were forgotten."""
    asyncio.run(asyncio.wait_for(scenario, 60), debug=True)
    gc.collect()


@contextlib.asynccontextmanager
async def serving(engine, tokenizer):
    front_end = AsyncFrontEnd(engine, tokenizer, seed=0)
    try:
        yield front_end
    finally:
        await front_end.close()
        assert engine.closed


async def until(condition):
    while True:
        if condition():
            return
        await asyncio.sleep(0.001)


def ids(tokenizer, text):
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def output(request_id, token_ids=(), reason=None):
    return EngineOutput(request_id, tuple(token_ids), reason)


def test_a_stream_from_submit_to_the_last_delta(tokenizer):
    async def scenario():
        engine = HandPlayedEngine()
        async with serving(engine, tokenizer) as front_end:
            stream = await front_end.submit("hi", PARAMS, request_id="r")
            assert stream.request_id == "r"
            engine.play(output("r", ids(tokenizer, "a")))
            delta = await anext(stream)
            assert (delta.text, delta.finish_reason) == ("a", None)
            engine.play(output("r", ids(tokenizer, "b")), output("r", [EOS], FinishReason.STOP))
            delta = await anext(stream)
            assert (delta.text, delta.token_ids[-1], delta.finish_reason) == ("b", EOS, FinishReason.STOP)
            assert (delta.output_tokens, delta.prompt_tokens) == (3, 3)
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            assert not engine.aborted

    run(scenario())


def test_many_streams_at_once_over_an_inline_engine(tokenizer):
    async def scenario():
        engine = RuleEngine(max_num_seqs=4, max_num_waiting=60)

        async def one(front_end, index):
            text = f"prompt {index} 🍏"
            deltas = [delta async for delta in front_end.generate(text, SamplingParams(max_tokens=100))]
            assert "".join(delta.text for delta in deltas) == text
            assert [delta.finish_reason for delta in deltas][-1] is FinishReason.STOP
            assert sum(len(delta.token_ids) for delta in deltas) == deltas[-1].output_tokens

        async with serving(engine, tokenizer) as front_end:
            await asyncio.gather(*(one(front_end, index) for index in range(50)))
            assert front_end.num_open == 0
            await front_end.submit([5], PARAMS)  # an idle engine wakes again
            await until(lambda: front_end.num_open == 0)

    run(scenario())


def test_a_reader_that_is_behind_finds_one_delta(tokenizer):
    async def scenario():
        engine = HandPlayedEngine(max_model_len=4000, usable_pages=250)
        async with serving(engine, tokenizer) as front_end:
            stream = await front_end.submit("hi", SamplingParams(max_tokens=2000), request_id="r")
            (a,) = ids(tokenizer, "a")
            for _ in range(999):
                engine.play(output("r", [a]))
            engine.play(output("r", [a], FinishReason.LENGTH))
            await until(lambda: stream.finished)
            deltas = [delta async for delta in stream]
            assert len(deltas) == 1
            assert (deltas[0].text, deltas[0].token_ids) == ("a" * 1000, (a,) * 1000)
            assert (deltas[0].finish_reason, deltas[0].output_tokens) == (FinishReason.LENGTH, 1000)

    run(scenario())


def test_a_reader_that_is_too_far_behind_loses_its_request_and_no_other(tokenizer):
    async def scenario():
        engine = HandPlayedEngine(max_model_len=4000, usable_pages=250)
        (a,) = ids(tokenizer, "a")
        front_end = AsyncFrontEnd(engine, tokenizer, max_unread_tokens=100)
        slow = await front_end.submit("hi", SamplingParams(max_tokens=1000), request_id="slow")
        fast = await front_end.submit("hi", SamplingParams(max_tokens=1000), request_id="fast")
        for _ in range(100):
            engine.play(TokenBatch(("slow", "fast"), (a, a)))
        await until(lambda: slow.num_unread == 100)
        assert (await anext(fast)).text == "a" * 100
        assert not engine.aborted
        for _ in range(200):
            engine.play(TokenBatch(("slow", "fast"), (a, a)))
        engine.play(EngineStats(num_steps=7))
        await until(lambda: front_end.stats.num_steps == 7 or len(engine.aborted) > 1)
        assert engine.aborted == ["slow", "fast"]  # nobody read the 200 tokens of the second either
        for stream in (slow, fast):
            (last,) = [delta async for delta in stream]
            assert (last.finish_reason, last.cause, last.token_ids, last.text) == (
                FinishReason.ABORT, Cause.READER, (), ""
            )  # fmt: skip
            assert last.error == "101 output tokens wait to be read; at most 100 (max_unread_tokens) may: read faster"
        await front_end.close()

    run(scenario())


def test_a_batch_reaches_every_stream(tokenizer):
    async def scenario():
        engine = HandPlayedEngine(max_num_seqs=20)
        async with serving(engine, tokenizer) as front_end:
            names = [f"r{index}" for index in range(20)]
            streams = [await front_end.submit([5], PARAMS, request_id=name) for name in names]
            tokens = ids(tokenizer, "abcdefghijklmnopqrst")
            front_end.abort("r7")
            engine.play(TokenBatch(tuple(names), tokens))
            texts = [(await anext(stream)).text for stream in streams]
            assert texts == [*"abcdefg", "", *"ijklmnopqrst"]

    run(scenario())


@pytest.mark.parametrize("early", ["aclose", "async with", "cancel", "generate closed", "generate cancelled"])
def test_leaving_a_stream_aborts_its_request(tokenizer, early):
    async def scenario():
        engine = HandPlayedEngine()
        async with serving(engine, tokenizer) as front_end:
            if early.startswith("generate"):
                stream = front_end.generate("hi", PARAMS, request_id="r")
                reader = asyncio.create_task(anext(stream))
                await until(lambda: engine.requests)
            else:
                stream = await front_end.submit("hi", PARAMS, request_id="r")
                reader = asyncio.create_task(anext(stream))
            engine.play(output("r", ids(tokenizer, "a")))
            assert (await reader).text == "a"
            if early == "async with":
                async with stream:
                    pass
            elif early in ("aclose", "generate closed"):
                await stream.aclose()
            else:
                reader = asyncio.create_task(anext(stream))
                await asyncio.sleep(0)
                reader.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await reader
            assert engine.aborted == ["r"]
            assert front_end.num_open == 0
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
            engine.play(output("r", ids(tokenizer, "b")), output("r", (), FinishReason.ABORT), EngineStats(num_steps=5))
            await until(lambda: front_end.stats.num_steps == 5)

    run(scenario())


def test_closing_a_finished_stream_aborts_nothing(tokenizer):
    async def scenario():
        engine = HandPlayedEngine()
        async with serving(engine, tokenizer) as front_end:
            stream = await front_end.submit("hi", PARAMS, request_id="r")
            engine.play(output("r", [EOS], FinishReason.STOP))
            await until(lambda: stream.finished)
            await stream.aclose()
            await stream.aclose()
            assert not engine.aborted

    run(scenario())


def test_abort_by_id_ends_the_stream_with_a_last_delta(tokenizer):
    async def scenario():
        engine = HandPlayedEngine()
        async with serving(engine, tokenizer) as front_end:
            stream = await front_end.submit("hi", PARAMS, request_id="r")
            assert front_end.abort("r")
            assert not front_end.abort("r")
            assert not front_end.abort("unknown")
            deltas = [delta async for delta in stream]
            assert [(d.finish_reason, d.cause) for d in deltas] == [(FinishReason.ABORT, Cause.CLIENT)]

    run(scenario())


def test_errors_are_raised_by_submit(tokenizer):
    async def scenario():
        engine = HandPlayedEngine()
        async with serving(engine, tokenizer) as front_end:
            with pytest.raises(ValueError, match=r"^prompt is empty; at least one token is needed$"):
                await front_end.submit("", PARAMS)
            with pytest.raises(ValueError, match=r"^prompt has a lone surrogate at character 50"):
                await front_end.submit("a" * 50 + "\ud800", PARAMS)
            with pytest.raises(ValueError, match=r"^prompt is empty"):
                await anext(front_end.generate([], PARAMS))
            with pytest.raises(DeadlineError, match=r"before the request arrived$"):
                await front_end.submit("hi", PARAMS, **asked(deadline=time.time() - 1))
            streams = [await front_end.submit("hi", PARAMS, request_id=name) for name in "abc"]
            with pytest.raises(DuplicateRequestError, match=r"^request_id 'a' belongs"):
                await front_end.submit("hi", PARAMS, request_id="a")
            streams.append(await front_end.submit("hi", PARAMS))
            with pytest.raises(QueueFullError, match=r"^4 requests are unfinished"):
                await front_end.submit("hi", PARAMS)
            assert len(engine.requests) == len(streams)

    run(scenario())


def test_a_large_prompt_is_tokenized_in_a_thread(tokenizer):
    async def scenario():
        engine = HandPlayedEngine(max_model_len=20000, max_prompt_len=20000, usable_pages=2000)
        async with serving(engine, tokenizer) as front_end:
            await front_end.submit("a" * (SHORT_TEXT + 1), PARAMS, request_id="r")
            assert len(engine.requests["r"].prompt_token_ids) == SHORT_TEXT + 2
            with pytest.raises(ValueError, match=r"^prompt_token_ids\[5000\] is 300; token ids must be"):
                await front_end.submit([5] * 5000 + [300], PARAMS)
            with pytest.raises(ValueError, match=r"^prompt has a lone surrogate at character 5000"):
                await front_end.submit("a" * 5000 + "\ud800", PARAMS)

    run(scenario())


@contextlib.contextmanager
def encoding_held(monkeypatch):
    """Holds every text that is encoded in a thread until the block ends; yields an event: one has begun."""
    begun, go_on, parts = threading.Event(), threading.Event(), Encoder.parts

    def wait(self, text, add_special_tokens, apart=None):
        if len(text) > SHORT_TEXT:
            begun.set()
            assert go_on.wait(60)
        return parts(self, text, add_special_tokens)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "parts", wait)
        try:
            yield begun
        finally:
            go_on.set()


LONG_CONTEXT = {"max_model_len": 10**6, "max_prompt_len": 10**6, "usable_pages": 10**5}


def test_a_deadline_that_passes_while_a_prompt_is_encoded(tokenizer, monkeypatch):
    async def scenario():
        engine = HandPlayedEngine(**LONG_CONTEXT)
        async with serving(engine, tokenizer) as front_end:
            with encoding_held(monkeypatch):
                with pytest.raises(DeadlineError, match=r"^deadline passed while the prompt was tokenized$"):
                    await front_end.submit("a" * 5000, PARAMS, **asked(deadline=time.time() + 0.1))
                with pytest.raises(DeadlineError, match=r"before the request arrived$"):
                    await front_end.submit("a" * 5000, PARAMS, **asked(deadline=-1e308))
                with pytest.raises(ValueError, match=r"^deadline is nan; it must be"):
                    await front_end.submit("a" * 5000, PARAMS, **asked(deadline=math.nan))
            assert not engine.sent
            await front_end.submit("a" * 5000, PARAMS, **asked(deadline=1e308))

    run(scenario())


def test_closing_while_a_prompt_is_encoded(tokenizer, monkeypatch):
    async def scenario():
        engine = HandPlayedEngine(**LONG_CONTEXT)
        async with serving(engine, tokenizer) as front_end:
            with encoding_held(monkeypatch) as begun:
                submits = [asyncio.ensure_future(front_end.submit("a" * 5000, PARAMS)) for _ in range(3)]
                await until(begun.is_set)
                await front_end.close()
            for submit in submits:
                with pytest.raises(EngineDeadError, match=r"^the server is shutting down$"):
                    await submit
            assert not [message for message in engine.sent if isinstance(message, AddRequest)]

    run(scenario())


def test_a_deadline_ends_a_stream(tokenizer):
    async def scenario():
        engine = HandPlayedEngine()
        async with serving(engine, tokenizer) as front_end:
            late = await front_end.submit("hi", PARAMS, **asked(deadline=time.time() + 1000))
            soon = await front_end.submit("hi", PARAMS, **asked(request_id="soon", deadline=time.time() + 0.05))
            deltas = [delta async for delta in soon]
            assert [(d.finish_reason, d.cause) for d in deltas] == [(FinishReason.DEADLINE, Cause.DEADLINE)]
            assert deltas[0].error == "deadline passed after 0 output tokens"
            assert engine.aborted == ["soon"]
            assert not late.finished

    run(scenario())


@pytest.mark.parametrize("death", ["message", "exception"])
def test_an_engine_that_dies_ends_every_stream(tokenizer, death, caplog):
    async def scenario():
        engine = HandPlayedEngine()
        if death == "exception":
            engine.receive = lambda: (_ for _ in ()).throw(RuntimeError("socket"))
        async with serving(engine, tokenizer) as front_end:
            if death == "message":
                stream = await front_end.submit("hi", PARAMS)
                engine.play(EngineFailed("out of memory"))
                (delta,) = [delta async for delta in stream]
                assert (delta.finish_reason, delta.cause) == (FinishReason.ERROR, Cause.ENGINE)
                assert delta.error == front_end.failure == "out of memory"
            else:
                await until(lambda: front_end.failure)
                assert front_end.failure == "the engine's messages cannot be received: socket"
            with pytest.raises(EngineDeadError, match=f"^the engine has ended: {front_end.failure}$"):
                await front_end.submit("hi", PARAMS)

    run(scenario())


def test_close_drains_and_then_cuts_off(tokenizer):
    async def scenario():
        engine = HandPlayedEngine()
        front_end = AsyncFrontEnd(engine, tokenizer)
        done = await front_end.submit("hi", PARAMS, request_id="done")
        cut = await front_end.submit("hi", PARAMS, request_id="cut")
        closing = asyncio.create_task(front_end.close(drain_seconds=0.3))
        await asyncio.sleep(0)
        with pytest.raises(EngineDeadError, match=r"^the server is shutting down$"):
            await front_end.submit("hi", PARAMS)
        engine.play(output("done", [EOS], FinishReason.STOP))
        assert [delta.finish_reason async for delta in done] == [FinishReason.STOP]
        await closing
        (last,) = [delta async for delta in cut]
        assert (last.finish_reason, last.cause) == (FinishReason.ERROR, Cause.CLOSING)
        assert last.error == "the server is shutting down"
        assert engine.closed
        await front_end.close()

    run(scenario())


def test_close_does_not_wait_when_nothing_runs(tokenizer):
    async def scenario():
        front_end = AsyncFrontEnd(HandPlayedEngine(), tokenizer)
        await front_end.close(drain_seconds=1e6)

    run(scenario())
