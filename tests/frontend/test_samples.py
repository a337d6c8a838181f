"""Several samples of one request in the front end: one id, one stream, an index for each, and an end of its own."""

from __future__ import annotations

import asyncio
import re

import pytest

from jaxserve.config.queue_limits import QueueConfig, TenantConfig
from jaxserve.engine.messages import AddRequest, EngineFailed, EngineOutput, TokenBatch
from jaxserve.frontend.admission import Admission, Engine
from jaxserve.frontend.async_frontend import AsyncFrontEnd
from jaxserve.frontend.delta import Cause, DuplicateRequestError, QueueFullError
from jaxserve.frontend.frontend import FrontEnd
from jaxserve.request import FinishReason
from jaxserve.sampling_params import SamplingParams
from jaxserve.telemetry.request_meter import RequestMeter
from tests.frontend.fakes import HandPlayedEngine, asked
from tests.frontend.tokenizers_for_tests import EOS, load

THREE = SamplingParams(n=3, max_tokens=8, seed=7)
NAMES = ("r", "r/1", "r/2")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def engine():
    return HandPlayedEngine(max_num_waiting=14, max_n=12)


@pytest.fixture
def front_end(engine, tokenizer):
    return FrontEnd(engine, tokenizer, seed=0, clock=lambda: 1000.0)


def handle(front_end, name, token_ids=(), reason=None, error=""):
    return front_end.handle(EngineOutput(name, tuple(token_ids), reason, error))


def ids(tokenizer, text):
    return tuple(tokenizer.encode(text, add_special_tokens=False))


async def until_finished(stream) -> None:
    while not stream.finished:  # noqa: ASYNC110  as soon as it is
        await asyncio.sleep(0.001)


def test_the_engine_is_sent_one_message_with_a_name_for_each(front_end, engine):
    front_end.submit("hi", THREE, request_id="r")
    (message,) = engine.sent
    assert (message.request.request_id, *message.sample_ids) == NAMES
    assert message.request.seed == 7
    seeds = [message.request.sample(index, name).seed for index, name in enumerate(NAMES)]
    assert seeds == [7, 8, 9]
    assert [message.request.sample(index, "x").seed for index in (2**63 - 8, 2**63 - 7)] == [2**63 - 1, -(2**63)]


def test_without_a_seed_each_sample_has_its_own(front_end, engine):
    for _ in range(2):
        front_end.submit("hi", SamplingParams(n=3), request_id=None)
    seeds = [message.request.sample(index, "x").seed for message in engine.sent for index in range(3)]
    assert len(set(seeds)) == 6


def test_names_of_samples_are_nobody_elses(front_end, engine, tokenizer):
    front_end.submit("hi", SamplingParams(), request_id="r/1", owner="other")
    front_end.submit("hi", THREE, request_id="r")
    assert engine.sent[1].sample_ids == ("r/1#2", "r/2")
    with pytest.raises(DuplicateRequestError):
        front_end.submit("hi", THREE, request_id="r")
    (delta,) = handle(front_end, "r/1#2", ids(tokenizer, "a"))
    assert (delta.request_id, delta.owner, delta.index) == ("r", "", 1)
    (delta,) = handle(front_end, "r/1", ids(tokenizer, "b"))
    assert (delta.request_id, delta.owner, delta.index) == ("r/1", "other", 0)


def test_each_sample_ends_on_its_own_and_the_request_with_the_last(front_end, engine, tokenizer):
    metrics = front_end._metrics = RequestMeter(clock=lambda: 0.0)
    records = []
    metrics.on_finished = records.append
    front_end.submit("hi", SamplingParams(n=3, max_tokens=8, stop=("ab",)), request_id="r")
    batch = front_end.handle(TokenBatch(NAMES, ids(tokenizer, "xyz"), 5.0))
    assert [(delta.index, delta.text, delta.finish_reason) for delta in batch] == [
        (0, "x", None),
        (1, "y", None),
        (2, "z", None),
    ]
    (stopped,) = handle(front_end, "r/1", ids(tokenizer, "ab"))
    assert (stopped.index, stopped.text, stopped.finish_reason, stopped.samples_left) == (1, "", FinishReason.STOP, 2)
    assert (stopped.stop_string, stopped.output_tokens, stopped.ends_request) == ("ab", 3, False)
    assert engine.aborted == ["r/1"], "the engine ends this sample alone"
    (failed,) = handle(front_end, "r", (), FinishReason.ERROR, "its logits are not finite")
    assert (failed.index, failed.cause, failed.error) == (0, Cause.REQUEST, "its logits are not finite")
    assert front_end.num_open == 1
    (last,) = handle(front_end, "r/2", [EOS], FinishReason.STOP)
    assert (last.index, last.samples_left, last.ends_request, last.prompt_tokens) == (2, 0, True, 3)
    assert front_end.num_open == 0
    assert handle(front_end, "r/1", (), FinishReason.ABORT) == []
    assert front_end.has_room_for(16), "the engine has released all of them"
    (record,) = records
    assert (record.request_id, record.prompt_tokens, record.output_tokens) == ("r", 3, 6)
    assert (metrics.prompt_tokens, metrics.generation_tokens) == (3, 6)
    gaps = metrics.histograms()["inter_token_latency_seconds"]
    assert gaps.num_values == 3, "gaps between tokens of different samples count"


@pytest.mark.parametrize("way", ["abort", "expire", "close", "engine"])
def test_what_ends_the_request_ends_every_sample(front_end, engine, way):
    front_end.submit("hi", THREE, **asked(request_id="r", deadline=1001.0))
    handle(front_end, "r", [EOS], FinishReason.STOP)
    assert front_end.next_deadline == 1001.0, "of the others"
    ends = {
        "abort": lambda: front_end.abort("r"),
        "expire": lambda: front_end.expire(1002.0),
        "close": lambda: front_end.end_all("closing"),
        "engine": lambda: front_end.handle(EngineFailed("gone")),
    }
    deltas = ends[way]()
    assert [(delta.index, delta.samples_left) for delta in deltas] == [(2, 1), (1, 0)]
    assert engine.aborted == ([] if way == "engine" else ["r/2", "r/1"])
    assert front_end.next_deadline is None
    assert front_end.num_open == 0


def test_too_many_samples_are_refused_before_anything_is_done(front_end, engine):
    line = (
        "n is 13; at most 12 samples of one request are allowed (max_n, and max_num_seqs + max_num_waiting): lower it "
        "or send several requests"
    )
    for prompt in ("hi" * 9, [5], [-1] * 10**4):
        with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
            front_end.submit(prompt, SamplingParams(n=13))
    with pytest.raises(ValueError, match=r"^n is 16385; it must be from 1 to 16384$"):
        SamplingParams(n=16385)
    with pytest.raises(ValueError, match=r"^n is 0; it must be from 1 to 16384$"):
        SamplingParams(n=0)
    with pytest.raises(ValueError, match=r"^n is 2 and temperature is 0; all samples would be the same: set n to 1"):
        SamplingParams(n=2, temperature=0)
    front_end.submit("hi", SamplingParams(n=12))
    with pytest.raises(QueueFullError, match=r"^12 requests are unfinished; at most 16 .* this one has 5 samples"):
        front_end.submit("hi", SamplingParams(n=5))
    front_end.submit("hi", SamplingParams(n=4))
    assert len(engine.sent) == 2


def test_admission_counts_a_place_for_each_sample(engine, tokenizer):
    tenants = {"small": TenantConfig(max_requests=4)}
    admission = Admission(QueueConfig(tenants=tenants), Engine(2, 5))
    front_end = FrontEnd(engine, tokenizer, seed=0, clock=lambda: 1000.0, admission=admission)
    with pytest.raises(ValueError, match=r"n is 5; tenant 'small' may have 4 unfinished samples \(max_requests\)"):
        front_end.submit("hi", SamplingParams(n=5), **asked(tenant="small"))
    front_end.submit("hi", THREE, **asked(request_id="r", tenant="small"))
    assert (admission.num_open, admission.num_waiting, admission.waiting_tokens) == (3, 3, 3 + 3 * 8)
    with pytest.raises(QueueFullError, match="tenant 'small' has 3 unfinished requests; at most 4"):
        front_end.submit("hi", SamplingParams(n=2), **asked(tenant="small"))
    with pytest.raises(QueueFullError, match="3 requests are unfinished; at most 5"):
        front_end.submit("hi", THREE, **asked(tenant="big"))
    handle(front_end, "r", ids(tokenizer, "a"))
    assert (admission.num_open, admission.num_waiting, admission.waiting_tokens) == (3, 0, 0)
    for name in NAMES:
        handle(front_end, name, [EOS], FinishReason.STOP)
    assert admission.num_open == 0


def test_a_stream_brings_every_sample_in_order_however_slowly_it_is_read(engine, tokenizer):
    async def scenario():
        front_end = AsyncFrontEnd(engine, tokenizer, seed=0)
        charged: list[int] = []
        front_end._on_tokens = lambda owner, count: charged.append(count)
        stream = await front_end.submit("hi", THREE, request_id="r")
        engine.play(*[TokenBatch(NAMES, ids(tokenizer, text)) for text in ("adg", "beh", "cfi")])
        engine.play(*[EngineOutput(name, (EOS,), FinishReason.STOP) for name in ("r/2", "r", "r/1")])
        await until_finished(stream)
        assert stream.num_unread == 12
        deltas = [delta async for delta in stream]
        assert [(delta.index, delta.text, len(delta.token_ids)) for delta in deltas] == [
            (0, "abc", 4),
            (1, "def", 4),
            (2, "ghi", 4),
        ]
        assert stream.num_unread == 0
        assert charged == [3, 4, 4, 4]
        async with await front_end.submit("hi", THREE, request_id="s") as left:
            engine.play(EngineOutput("s/1", (EOS,), FinishReason.STOP))
            assert (await anext(left)).index == 1
        assert engine.aborted == ["s/2", "s"]
        await front_end.close()

    asyncio.run(asyncio.wait_for(scenario(), 60), debug=True)


def test_a_reader_that_is_far_behind_ends_every_sample(engine, tokenizer):
    async def scenario():
        front_end = AsyncFrontEnd(engine, tokenizer, seed=0, max_unread_tokens=5)
        stream = await front_end.submit("hi", THREE, request_id="r")
        engine.play(*[TokenBatch(NAMES, ids(tokenizer, "abc")) for _ in range(3)])
        deltas = [delta async for delta in stream]
        assert {delta.cause for delta in deltas if delta.finish_reason} == {Cause.READER}
        assert sorted(engine.aborted) == list(NAMES)
        await front_end.close()

    asyncio.run(asyncio.wait_for(scenario(), 60), debug=True)


def test_one_message_carries_a_request_whatever_its_samples(engine, front_end):
    front_end.submit("hi", SamplingParams(n=12), request_id="r")
    assert [type(message) for message in engine.sent] == [AddRequest]
