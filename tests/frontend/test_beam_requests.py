"""Beam search in the front end: the requests of its steps, one final answer, and what ends it early."""

from __future__ import annotations

import asyncio
import contextlib
import re

import pytest

from jaxserve.config.queue_limits import QueueConfig
from jaxserve.engine.messages import AddRequest, EngineFailed, EngineOutput, Logprobs
from jaxserve.frontend.admission import Admission, Engine
from jaxserve.frontend.async_frontend import AsyncFrontEnd
from jaxserve.frontend.delta import Cause, DuplicateRequestError, QueueFullError
from jaxserve.frontend.frontend import FrontEnd
from jaxserve.logprob_columns import LogprobColumns
from jaxserve.request import FinishReason, RequestOptions
from jaxserve.sampling_params import SamplingParams
from jaxserve.telemetry.request_meter import RequestMeter
from tests.frontend.fakes import HandPlayedEngine, asked
from tests.frontend.tokenizers_for_tests import EOS, load

TWO = SamplingParams(n=2, use_beam_search=True, max_tokens=3)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def engine():
    return HandPlayedEngine(max_num_waiting=14, max_n=12, eos_token_ids=(EOS,))


@pytest.fixture
def front_end(engine, tokenizer):
    return FrontEnd(engine, tokenizer, seed=0, clock=lambda: 1000.0)


def answer(name, values, *, reason=FinishReason.LENGTH, prompt_logprobs=None, cached=0):
    """The engine's answer to a beam: log-probabilities by id, the likeliest first. What was drawn does not matter."""
    top = sorted(values.items(), key=lambda one: -one[1])
    columns = Logprobs.of(LogprobColumns.of([(-99.0, 99, top)]))
    prompt = None if prompt_logprobs is None else Logprobs.of(prompt_logprobs)
    return EngineOutput(name, (77,), reason, "", cached, 5.0, None, None, columns, prompt)


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def values(tokenizer, text, *numbers, end=-9.0):
    """Log-probabilities of the letters of a text, and of the end."""
    return dict(zip(ids(tokenizer, text), numbers, strict=True)) | {EOS: end}


def test_each_step_has_a_request_for_each_beam_that_extends_its_parents(front_end, engine, tokenizer):
    options = {"tenant": "t", "priority": 3, "deadline": 2000.0, "cache_salt": "s"}
    front_end.submit("hi", TWO, **asked("r", **options))
    prompt = (1, *ids(tokenizer, "hi"))
    a, b, _, d = ids(tokenizer, "abcd")
    (first,) = engine.requests.values()
    assert (first.request_id, first.prompt_token_ids, first.max_tokens, first.logprobs) == ("r/0.0", prompt, 1, 4)
    assert (first.temperature, first.stop_token_ids, first.needed_tokens) == (0.0, (), 1)
    assert front_end.handle(answer("r/0.0", values(tokenizer, "abc", -0.5, -1.0, -5.0), cached=2)) == []
    assert engine.requests["r/1.0"].prompt_token_ids == (*prompt, a)
    assert engine.requests["r/1.1"].prompt_token_ids == (*prompt, b)
    # The answers of a step may come in any order.
    assert front_end.handle(answer("r/1.1", values(tokenizer, "dca", -0.25, -6.0, -7.0), cached=3)) == []
    assert len(engine.requests) == 3
    assert front_end.handle(answer("r/1.0", values(tokenizer, "dbc", -2.0, -3.0, -4.0), cached=3)) == []
    assert engine.requests["r/2.0"].prompt_token_ids == (*prompt, b, d)
    assert engine.requests["r/2.1"].prompt_token_ids == (*prompt, a, d)
    for request in engine.requests.values():
        assert request.options == RequestOptions(**options)
        assert request.arrival_time == 1000.0, "a step is as old as its search"
    assert front_end.handle(answer("r/2.0", values(tokenizer, "abc", -2.0, -3.0, -4.0, end=-0.25))) == []
    best, second = front_end.handle(answer("r/2.1", values(tokenizer, "abc", -1.0, -9.0, -9.5)))
    assert (best.index, best.text, best.token_ids) == (0, "bd", (b, d, EOS))
    assert (best.finish_reason, best.prompt_tokens, best.output_tokens) == (FinishReason.STOP, 3, 3)
    assert (best.cached_tokens, best.logprobs, best.samples_left) == (2, None, 1)
    assert (second.index, second.text, second.finish_reason) == (1, "bda", FinishReason.LENGTH)
    assert second.ends_request
    assert front_end.num_open == 0
    assert front_end.has_room_for(16)
    assert engine.aborted == []


def test_outputs_have_the_log_probabilities_that_are_asked_for(front_end, tokenizer):
    params = SamplingParams(n=1, use_beam_search=True, max_tokens=2, logprobs=1, prompt_logprobs=0)
    front_end.submit("hi", params, request_id="r")
    a, _, c = ids(tokenizer, "abc")
    prompt = LogprobColumns.of([(-0.5, 1, []), (-0.75, 2, [])])
    front_end.handle(answer("r/0.0", values(tokenizer, "ab", -0.5, -1.0), prompt_logprobs=prompt))
    (last,) = front_end.handle(answer("r/1.0", {c: -0.25, EOS: -1.5, a: -4.0}))
    assert (last.text, last.token_ids) == ("ac", (a, c))
    assert last.logprobs.values.tolist() == [-0.5, -0.25]
    assert last.logprobs.ranks.tolist() == [1, 1]
    assert last.logprobs.top_ids.tolist() == [[a], [c]]
    assert last.prompt_logprobs.columns.values.tolist() == [-0.5, -0.75]


def test_the_stop_ids_of_a_request_end_its_outputs_too(front_end, engine, tokenizer):
    a, b = ids(tokenizer, "ab")
    front_end.submit("hi", SamplingParams(n=1, use_beam_search=True, stop_token_ids=(a, b), ignore_eos=True))
    (name,) = engine.requests
    assert engine.requests[name].logprobs == 3
    (last,) = front_end.handle(answer(name, {b: -0.1, a: -3.0, EOS: -9.0}))
    assert (last.token_ids, last.text, last.finish_reason) == ((b,), "", FinishReason.STOP)


def test_a_policy_that_holds_requests_against_their_arrival_sees_each_step_arrive(tokenizer):
    engine = HandPlayedEngine(eos_token_ids=(EOS,), due_after_arrival=True)
    times = iter([1000.0, 1000.0, 1000.0, 1000.0])
    front_end = FrontEnd(engine, tokenizer, seed=0, clock=lambda: next(times, 1005.0))
    front_end.submit("hi", SamplingParams(n=1, use_beam_search=True, max_tokens=2), request_id="r")
    for _ in times:
        pass
    front_end.handle(answer("r/0.0", values(tokenizer, "a", -0.5)))
    assert [one.arrival_time for one in engine.requests.values()] == [1000.0, 1005.0]


@pytest.mark.parametrize("way", ["abort", "expire", "close", "engine"])
def test_what_ends_the_search_ends_every_beam_and_gives_what_there_is(front_end, engine, tokenizer, way):
    front_end.submit("hi", TWO, **asked(request_id="r", deadline=1001.0))
    front_end.handle(answer("r/0.0", values(tokenizer, "abc", -0.5, -1.0, -5.0)))
    front_end.handle(answer("r/1.1", values(tokenizer, "dca", -0.25, -6.0, -7.0)))
    ends = {
        "abort": lambda: front_end.abort("r"),
        "expire": lambda: front_end.expire(1002.0),
        "close": lambda: front_end.end_all("closing"),
        "engine": lambda: front_end.handle(EngineFailed("gone")),
    }
    deltas = ends[way]()
    assert [(delta.index, delta.text, delta.samples_left) for delta in deltas] == [(1, "b", 1), (0, "a", 0)]
    assert len({delta.finish_reason for delta in deltas} & {FinishReason.STOP, FinishReason.LENGTH}) == 0
    assert engine.aborted == ([] if way == "engine" else ["r/1.0"]), "the other one is answered"
    assert front_end.num_open == 0
    assert front_end.next_deadline is None
    if way != "engine":
        assert front_end.has_room_for(15)
        assert not front_end.has_room_for(16), "the engine has yet to release a beam"
        assert front_end.handle(EngineOutput("r/1.0", (), FinishReason.ABORT)) == []
        assert front_end.has_room_for(16)
    assert "r/2.0" not in engine.requests


@pytest.mark.parametrize(
    ("reason", "error", "cause"),
    [
        (FinishReason.ERROR, "its logits are not finite", Cause.REQUEST),
        (FinishReason.DEADLINE, "deadline passed in the queue", Cause.DEADLINE),
    ],
)
def test_a_beam_that_fails_ends_the_search(front_end, engine, tokenizer, reason, error, cause):
    front_end.submit("hi", TWO, request_id="r")
    front_end.handle(answer("r/0.0", values(tokenizer, "abc", -0.5, -1.0, -5.0)))
    deltas = front_end.handle(EngineOutput("r/1.0", (), reason, error))
    assert [(one.index, one.finish_reason, one.error, one.cause) for one in deltas] == [
        (1, reason, error, cause),
        (0, reason, error, cause),
    ]
    assert engine.aborted == ["r/1.1"]
    assert front_end.num_open == 0


def test_a_search_counts_as_one_request_with_a_place_for_each_beam(engine, tokenizer):
    metrics = RequestMeter(clock=lambda: 0.0)
    records = []
    metrics.on_finished = records.append
    admission = Admission(QueueConfig(), Engine(2, 5))
    front_end = FrontEnd(engine, tokenizer, seed=0, clock=lambda: 1000.0, admission=admission, metrics=metrics)
    params = SamplingParams(n=2, use_beam_search=True, max_tokens=3, length_penalty=0.0)
    front_end.submit("hi", params, request_id="r")
    assert (admission.num_open, admission.num_waiting) == (2, 2)
    with pytest.raises(DuplicateRequestError):
        front_end.submit("hi", TWO, request_id="r")
    with pytest.raises(QueueFullError, match="2 requests are unfinished; at most 5"):
        front_end.submit("hi", SamplingParams(n=4, use_beam_search=True, max_tokens=3))
    front_end.handle(answer("r/0.0", values(tokenizer, "abc", -0.5, -1.0, -5.0, end=-0.1)))
    assert (admission.num_open, admission.num_waiting) == (2, 0)
    front_end.handle(answer("r/1.0", values(tokenizer, "abc", -9.0, -9.0, -9.0)))
    deltas = front_end.handle(answer("r/1.1", values(tokenizer, "abc", -9.0, -9.0, -9.0)))
    assert [delta.token_ids for delta in deltas][:1] == [(EOS,)]
    assert (admission.num_open, front_end.num_open) == (0, 0)
    (record,) = records
    assert (record.request_id, record.prompt_tokens) == ("r", 3)
    assert record.output_tokens == metrics.generation_tokens == sum(len(delta.token_ids) for delta in deltas)
    assert metrics.histograms()["time_to_first_token_seconds"].num_values == 1


def test_names_of_beams_are_nobody_elses(front_end, engine, tokenizer):
    front_end.submit("hi", SamplingParams(), request_id="r/0.0", owner="other")
    front_end.submit("hi", TWO, request_id="r")
    assert list(engine.requests) == ["r/0.0", "r/0.0#2"]
    front_end.handle(answer("r/0.0#2", values(tokenizer, "abc", -0.5, -1.0, -5.0)))
    assert list(engine.requests)[2:] == ["r/1.0", "r/1.1"]


def test_a_beam_that_is_too_wide_is_refused_before_anything_is_done(front_end, engine):
    line = (
        "n is 11; a beam search of this width needs the 22 likeliest ids of each position, and this server returns at "
        "most max_logprobs 20: lower it, or raise LogprobsConfig.max_logprobs"
    )
    for prompt in ("hi" * 9, [5], [-1] * 10**4):
        with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
            front_end.submit(prompt, SamplingParams(n=11, use_beam_search=True))
    assert engine.sent == []


def test_logits_are_no_log_probabilities(tokenizer):
    front_end = FrontEnd(HandPlayedEngine(logprobs_mode="raw_logits"), tokenizer)
    with pytest.raises(ValueError, match=r"^use_beam_search is true; this server has logprobs_mode raw_logits, and"):
        front_end.submit("hi", TWO)


def test_processed_log_probabilities_depend_on_the_temperature(tokenizer):
    engine = HandPlayedEngine(logprobs_mode="processed_logprobs")
    params = SamplingParams(n=1, use_beam_search=True, temperature=0.5, max_tokens=1)
    FrontEnd(engine, tokenizer).submit("hi", params, request_id="r")
    assert engine.requests["r/0.0"].temperature == 0.5


def test_without_chunked_prefill_the_last_step_must_fit(tokenizer):
    front_end = FrontEnd(HandPlayedEngine(max_prompt_len=6), tokenizer)
    with pytest.raises(ValueError, match=r"^max_tokens is 9; the last step of a beam search computes 11 tokens anew"):
        front_end.submit("hi", SamplingParams(use_beam_search=True, max_tokens=9))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"top_p": 0.5}, "top_p is 0.5 and use_beam_search is true; a beam search goes by the model's own"),
        ({"top_k": 3}, "top_k is 3 and use_beam_search"),
        ({"min_p": 0.1}, "min_p is 0.1 and use_beam_search"),
        ({"typical_p": 0.5}, "typical_p is 0.5 and use_beam_search"),
        ({"presence_penalty": 1}, "presence_penalty is 1 and use_beam_search"),
        ({"frequency_penalty": 1}, "frequency_penalty is 1 and use_beam_search"),
        ({"repetition_penalty": 2}, "repetition_penalty is 2 and use_beam_search"),
        ({"logit_bias": {5: 1}}, r"logit_bias is \(\(5, 1.0\),\) and use_beam_search"),
        ({"allowed_token_ids": [5]}, r"allowed_token_ids is \(5,\) and use_beam_search"),
        ({"min_tokens": 2}, "min_tokens is 2 and use_beam_search"),
        ({"stop": "x"}, r"stop is \('x',\) and use_beam_search"),
        ({"bad_words": "x"}, r"bad_words is \('x',\) and use_beam_search"),
        ({"length_penalty": 11}, "length_penalty is 11; it must be at least -10 and at most 10"),
        ({"early_stopping": "always"}, "early_stopping is 'always'; it must be one of true, false, never"),
        ({"use_beam_search": False, "length_penalty": 2.0}, "length_penalty is 2.0; it needs a beam search"),
        ({"use_beam_search": False, "early_stopping": True}, "early_stopping is true; it needs a beam search"),
    ],
)
def test_what_does_not_go_with_a_search_is_refused_by_name(options, line):
    with pytest.raises(ValueError, match=f"^{line}"):
        SamplingParams(**{"use_beam_search": True, "max_tokens": 9} | options)


def test_what_changes_nothing_is_taken():
    SamplingParams(use_beam_search=True, n=4, temperature=0, top_k=-1, seed=5, detokenize=False, logprobs=2)


def test_a_stream_brings_the_outputs_at_the_end_and_leaving_it_ends_the_search(engine, tokenizer):
    async def scenario():
        front_end = AsyncFrontEnd(engine, tokenizer, seed=0)
        charged: list[int] = []
        front_end._on_tokens = lambda owner, count: charged.append(count)
        one = SamplingParams(n=2, use_beam_search=True, max_tokens=1)
        stream = await front_end.submit("hi", one, request_id="r")
        engine.play(answer("r/0.0", values(tokenizer, "abc", -0.5, -1.0, -5.0)))
        deltas = [delta async for delta in stream]
        assert [(delta.index, delta.text, delta.ends_request) for delta in deltas] == [(0, "a", False), (1, "b", True)]
        assert charged == [3, 1, 1], "the prompt once, and the outputs"
        stream = await front_end.submit("hi", TWO, request_id="s")
        async with contextlib.aclosing(stream):
            assert front_end.num_open == 1
        assert engine.aborted == ["s/0.0"]
        assert front_end.num_open == 0
        await front_end.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_send_that_fails_is_told_by_the_engines_end(front_end, engine, tokenizer):
    front_end.submit("hi", TWO, request_id="r")
    engine.send_error = BrokenPipeError("gone")
    assert front_end.handle(answer("r/0.0", values(tokenizer, "abc", -0.5, -1.0, -5.0))) == []
    deltas = front_end.handle(EngineFailed("gone"))
    assert [delta.cause for delta in deltas] == [Cause.ENGINE, Cause.ENGINE]
    assert [message for message in engine.sent if isinstance(message, AddRequest)][1:] == []
