"""The sans-IO front end against an engine played by hand."""

import math
import re

import pytest

from jaxserve.engine.messages import AbortRequest, AddRequest, EngineFailed, EngineOutput, EngineStats
from jaxserve.frontend.delta import Cause, DeadlineError, DuplicateRequestError, EngineDeadError, QueueFullError
from jaxserve.frontend.frontend import FrontEnd
from jaxserve.request import NO_TOKEN_LEFT, FinishReason, RequestOptions
from jaxserve.request_checks import InfeasibleError
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.problem import check_delta
from jaxserve.structured_outputs import GRAMMAR_FAILED
from tests.frontend.fakes import HandPlayedEngine, asked
from tests.frontend.tokenizers_for_tests import EOS, load

GREEDY = SamplingParams(temperature=0.0, max_tokens=8)


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def engine():
    return HandPlayedEngine()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def front_end(engine, tokenizer, clock):
    return FrontEnd(engine, tokenizer, seed=0, clock=clock)


def ids(tokenizer, text):
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def output(front_end, request_id, token_ids=(), reason=None, error="", cached=0):
    """The one delta that an engine output gives, or None."""
    deltas = front_end.handle(EngineOutput(request_id, tuple(token_ids), reason, error, cached))
    assert len(deltas) <= 1
    return deltas[0] if deltas else None


# ---- what the engine is sent -----------------------------------------------------------------------------------------


def test_a_text_prompt_is_tokenized_and_resolved(front_end, engine, tokenizer):
    params = SamplingParams(temperature=1, top_k=-1, top_p=0.5, min_p=0.25, seed=7, min_tokens=3, stop_token_ids=(9, 2))
    request_id = front_end.submit("hi", params, **asked(tenant="t", priority=3, deadline=1001.5, cache_salt="s"))
    (request,) = engine.requests.values()
    assert request.request_id == request_id
    assert request.prompt_token_ids == tuple(tokenizer.encode("hi"))
    assert request.max_tokens == 48 - 3 + 1  # the rest of the pool, which is smaller than the context
    assert (request.temperature, request.top_k, request.top_p, request.min_p) == (1.0, 0, 0.5, 0.25)
    assert (request.seed, request.min_tokens, request.stop_token_ids) == (7, 3, (EOS, 9))
    assert request.options == RequestOptions("t", 3, 1001.5, "s")
    assert request.arrival_time == 1000.0


def test_ignore_eos_leaves_the_clients_stop_ids(front_end, engine):
    front_end.submit([5], SamplingParams(max_tokens=1, ignore_eos=True, stop_token_ids=(9,)))
    assert next(iter(engine.requests.values())).stop_token_ids == (9,)


def test_drawn_seeds_differ_and_follow_from_the_base_seed(tokenizer):
    drawn = []
    for seed in (0, 0, 1, None, None):
        engine = HandPlayedEngine()
        front_end = FrontEnd(engine, tokenizer, seed=seed)
        for _ in range(2):
            front_end.submit([5], GREEDY)
        drawn.append([request.seed for request in engine.requests.values()])
    assert drawn[0] == drawn[1]
    assert len({tuple(seeds) for seeds in drawn}) == 4
    assert all(first != second and 0 <= first < 2**63 for first, second in drawn)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "prompt is empty; at least one token is needed"),
        ([], {}, "prompt is empty; at least one token is needed"),
        ("a\ud800", {}, "prompt has a lone surrogate at character 1; text must be valid Unicode"),
        ([5, 300], {}, "prompt_token_ids[1] is 300; token ids must be whole numbers from 0 to 299"),
        ([-1], {}, "prompt_token_ids[0] is -1; token ids must be whole numbers from 0 to 299"),
        ([5.0], {}, "prompt_token_ids[0] is 5.0; token ids must be whole numbers from 0 to 299"),
        (b"ab", {}, "prompt is of type bytes; it must be text or a sequence of token ids"),
        (7, {}, "prompt is of type int; it must be text or a sequence of token ids"),
        (
            [5] * 60,
            {},
            "prompt has 60 tokens and max_tokens is 8; together 68 exceed max_model_len 64: lower max_tokens or "
            "shorten the prompt",
        ),
        ([5], {"request_id": ""}, "request_id is empty; leave it out to be given one"),
        ([5], {"request_id": "x" * 257}, "request_id has 257 characters; at most 256 are allowed"),
        ([5], {"tenant": "\udc00"}, "tenant is '\\udc00'; it must be valid Unicode"),
        ([5], {"cache_salt": "x" * 257}, "cache_salt has 257 characters; at most 256 are allowed"),
        ([5], {"priority": 2**31}, "priority is 2147483648; it must be a whole number from -2147483647 to 2147483647"),
        ([5], {"priority": 0.5}, "priority is 0.5; it must be a whole number from -2147483647 to 2147483647"),
        ([5], {"deadline": math.nan}, "deadline is nan; it must be a finite number of seconds"),
        ([5], {"deadline": "soon"}, "deadline is 'soon'; it must be a finite number of seconds"),
    ],
)
def test_invalid_requests(front_end, engine, prompt, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        front_end.submit(prompt, GREEDY, **asked(**options))
    assert not engine.sent
    assert not front_end.num_open


def test_a_request_that_could_never_fit_the_pool(front_end, engine):
    with pytest.raises(
        InfeasibleError, match=r"^prompt has 45 tokens and max_tokens is 8; together 53 exceed the page"
    ):
        front_end.submit([5] * 45, GREEDY)
    assert not engine.sent


def test_without_a_tokenizer_only_token_ids_are_served(engine):
    front_end = FrontEnd(engine, None)
    with pytest.raises(ValueError, match=r"^prompt is text, and this server has no tokenizer; send prompt_token_ids$"):
        front_end.submit("hi", GREEDY)
    with pytest.raises(ValueError, match=r"^stop needs text, and this server has no tokenizer; use stop_token_ids$"):
        front_end.submit([5], SamplingParams(stop=("a",)))
    request_id = front_end.submit([5], GREEDY)
    delta = output(front_end, request_id, [6, 7], FinishReason.LENGTH)
    assert (delta.token_ids, delta.text) == ((6, 7), "")


def test_a_duplicate_id(front_end, engine):
    front_end.submit([5], GREEDY, request_id="a")
    with pytest.raises(DuplicateRequestError, match=r"^request_id 'a' belongs to an unfinished request; choose"):
        front_end.submit([5], GREEDY, request_id="a")
    assert len(engine.sent) == 1
    output(front_end, "a", [2], FinishReason.STOP)
    assert front_end.submit([5], GREEDY, request_id="a") == "a"


def test_a_full_queue(front_end, engine):
    for name in "abcd":
        assert front_end.has_room
        front_end.submit([5], GREEDY, request_id=name)
    assert not front_end.has_room
    message = "4 requests are unfinished; at most 4 (max_num_seqs + max_num_waiting) are allowed: try again later"
    with pytest.raises(QueueFullError, match=f"^{re.escape(message)}$"):
        front_end.submit([5], GREEDY)
    front_end.abort("a")
    with pytest.raises(QueueFullError):  # the engine still has it
        front_end.submit([5], GREEDY)
    assert output(front_end, "a", (), FinishReason.ABORT) is None
    front_end.submit([5], GREEDY)
    assert len(engine.requests) == 5


def test_a_deadline_already_past(front_end, engine):
    with pytest.raises(DeadlineError, match=r"^deadline passed 1\.500 s before the request arrived$"):
        front_end.submit([5], GREEDY, **asked(deadline=998.5))
    assert not engine.sent


def test_an_engine_that_cannot_be_reached(front_end, engine):
    engine.send_error = BrokenPipeError("broken pipe")
    with pytest.raises(EngineDeadError, match=r"^the engine cannot be reached: broken pipe$"):
        front_end.submit([5], GREEDY)
    assert not front_end.num_open


# ---- deltas ----------------------------------------------------------------------------------------------------------


def test_tokens_become_text_and_are_counted(front_end, tokenizer):
    request_id = front_end.submit("hi", GREEDY)
    a, b = ids(tokenizer, "ab")
    first = output(front_end, request_id, [a], cached=2)
    assert (first.token_ids, first.text, first.finish_reason) == ((a,), "a", None)
    assert (first.prompt_tokens, first.output_tokens, first.cached_tokens) == (3, 1, 2)
    last = output(front_end, request_id, [b], FinishReason.LENGTH)
    assert (last.token_ids, last.text, last.finish_reason) == ((b,), "b", FinishReason.LENGTH)
    assert (last.output_tokens, last.cached_tokens, last.error, last.cause) == (2, 2, "", None)
    assert not front_end.num_open


def test_an_emoji_appears_when_it_is_whole(front_end, tokenizer):
    request_id = front_end.submit("hi", GREEDY)
    texts = [output(front_end, request_id, [token_id]).text for token_id in ids(tokenizer, "🍏")]
    assert texts == ["", "", "", "🍏"]


def test_an_emoji_cut_off_by_max_tokens_is_flushed(front_end, tokenizer):
    request_id = front_end.submit("hi", GREEDY)
    assert output(front_end, request_id, ids(tokenizer, "🍏")[:3], FinishReason.LENGTH).text == "\ufffd"


def test_the_token_that_stops_is_counted_but_has_no_text(front_end, tokenizer):
    (dot,) = ids(tokenizer, ".")
    request_id = front_end.submit("hi", SamplingParams(max_tokens=8, stop_token_ids=(dot,)))
    delta = output(front_end, request_id, [*ids(tokenizer, "a"), dot], FinishReason.STOP)
    assert (delta.text, delta.token_ids[-1], delta.output_tokens) == ("a", dot, 2)


def test_an_output_of_nothing_new_gives_no_delta(front_end):
    request_id = front_end.submit("hi", GREEDY)
    assert output(front_end, request_id) is None


def test_stats(front_end):
    assert front_end.handle(EngineStats(num_running=3)) == []
    assert front_end.stats.num_running == 3


# ---- stop strings ----------------------------------------------------------------------------------------------------


def test_a_stop_string_ends_the_request_at_once(front_end, engine, tokenizer):
    request_id = front_end.submit("hi", SamplingParams(max_tokens=20, stop=("ST", "P")), request_id="r")
    tokens = ids(tokenizer, "okSTrest")
    delta = output(front_end, request_id, tokens[:3])
    assert (delta.text, delta.token_ids) == ("ok", tokens[:3])
    last = output(front_end, request_id, tokens[3:])
    assert (last.text, last.token_ids, last.finish_reason) == ("", tokens[3:4], FinishReason.STOP)
    assert (last.output_tokens, last.error) == (4, "")
    assert engine.aborted == ["r"]
    # What the engine had computed meanwhile is never seen.
    assert output(front_end, "r", tokens[5:]) is None
    assert output(front_end, "r", (), FinishReason.ABORT) is None


def test_a_stop_string_in_the_engines_last_output_needs_no_abort(front_end, engine, tokenizer):
    request_id = front_end.submit("hi", SamplingParams(max_tokens=20, stop=("S",)))
    tokens = ids(tokenizer, "aSbc")
    last = output(front_end, request_id, tokens, FinishReason.LENGTH)
    assert (last.text, last.token_ids, last.finish_reason) == ("a", tokens[:2], FinishReason.STOP)
    assert not engine.aborted
    assert front_end.has_room


def test_tokens_behind_an_undecided_stop_string_are_held_back(front_end, tokenizer):
    request_id = front_end.submit("hi", SamplingParams(max_tokens=20, stop=("X", "abXcd")))
    tokens = ids(tokenizer, "abXce")
    assert output(front_end, request_id, tokens[:3]).token_ids == tokens[:3]
    assert output(front_end, request_id, tokens[3:4]) is None
    last = output(front_end, request_id, tokens[4:])
    assert (last.text, last.token_ids, last.output_tokens) == ("ab", (), 3)
    assert last.finish_reason is FinishReason.STOP


def test_an_undecided_stop_string_counts_when_the_output_ends(front_end, tokenizer):
    request_id = front_end.submit("hi", SamplingParams(max_tokens=4, stop=("X", "abXcd")))
    last = output(front_end, request_id, ids(tokenizer, "abXc"), FinishReason.LENGTH)
    assert (last.text, last.output_tokens, last.finish_reason) == ("ab", 3, FinishReason.STOP)


def test_held_text_is_released_when_the_output_ends(front_end, tokenizer):
    request_id = front_end.submit("hi", SamplingParams(max_tokens=8, stop=("abc",)))
    assert output(front_end, request_id, ids(tokenizer, "xab")).text == "x"
    assert output(front_end, request_id, [EOS], FinishReason.STOP).text == "ab"


# ---- endings ---------------------------------------------------------------------------------------------------------


def test_abort_gives_the_last_delta_at_once_and_only_once(front_end, engine, tokenizer):
    front_end.submit("hi", SamplingParams(max_tokens=8, stop=("abc",)), request_id="r")
    output(front_end, "r", ids(tokenizer, "xab"))
    (delta,) = front_end.abort("r")
    assert (delta.text, delta.finish_reason, delta.cause) == ("ab", FinishReason.ABORT, Cause.CLIENT)
    assert delta.error == "aborted by the client"
    assert front_end.abort("r") == []
    assert engine.aborted == ["r"]
    assert output(front_end, "r", [5]) is None
    assert output(front_end, "r", (), FinishReason.ABORT) is None


def test_abort_of_an_unknown_id(front_end, engine):
    assert front_end.abort("unknown") == []
    assert not engine.sent


def test_an_id_used_again_is_not_confused_with_the_aborted_request(front_end, engine, tokenizer):
    front_end.submit("hi", GREEDY, request_id="r")
    front_end.abort("r")
    front_end.submit("hi", GREEDY, request_id="r")
    assert list(engine.requests) == ["r", "r#2"]
    assert output(front_end, "r", ids(tokenizer, "old"), FinishReason.LENGTH) is None
    assert output(front_end, "r#2", ids(tokenizer, "new"), FinishReason.LENGTH).text == "new"
    front_end.submit("hi", GREEDY, request_id="r")
    assert list(engine.requests) == ["r", "r#2"]  # "r" again: the engine has let go of both


def test_deadlines(front_end, engine, clock, tokenizer):
    front_end.submit("hi", GREEDY, **asked(request_id="late", deadline=1002.0))
    front_end.submit("hi", GREEDY, **asked(request_id="early", deadline=1001.0))
    front_end.submit("hi", GREEDY, **asked(request_id="done", deadline=1000.5))
    output(front_end, "done", [EOS], FinishReason.STOP)
    output(front_end, "early", ids(tokenizer, "ab"))
    assert front_end.next_deadline == 1001.0
    clock.now = 1000.9
    assert front_end.expire() == []
    (delta,) = front_end.expire(1001.0)
    assert (delta.request_id, delta.finish_reason, delta.cause) == ("early", FinishReason.DEADLINE, Cause.DEADLINE)
    assert delta.error == "deadline passed after 2 output tokens"
    assert engine.aborted == ["early"]
    (delta,) = front_end.expire(2000.0)
    assert delta.request_id == "late"
    assert front_end.next_deadline is None


def test_a_deadline_that_the_engine_notices_first(front_end, clock):
    front_end.submit("hi", GREEDY, **asked(request_id="r", deadline=1001.0))
    clock.now = 1001.5
    delta = output(front_end, "r", (), FinishReason.DEADLINE, "deadline passed")
    assert (delta.cause, delta.error) == (Cause.DEADLINE, "deadline passed")


def test_a_deadline_that_the_engine_cannot_meet(front_end, clock):
    front_end.submit("hi", GREEDY, **asked(request_id="r", deadline=clock.now + 1000))
    delta = output(front_end, "r", (), FinishReason.DEADLINE, "deadline cannot be met")
    assert (delta.cause, delta.error) == (Cause.DEADLINE, "deadline cannot be met")


def test_a_request_that_fails_in_the_engine(front_end):
    front_end.submit("hi", GREEDY, request_id="r")
    delta = output(front_end, "r", (), FinishReason.ERROR, "logits are not finite")
    assert (delta.finish_reason, delta.error, delta.cause) == (
        FinishReason.ERROR,
        "logits are not finite",
        Cause.REQUEST,
    )
    front_end.submit("hi", GREEDY, request_id="r")
    assert output(front_end, "r", (), FinishReason.ABORT).error == "the engine ended the request with abort"


@pytest.mark.parametrize("line", [NO_TOKEN_LEFT, GRAMMAR_FAILED + "too many states"])
def test_options_that_turn_out_to_be_impossible_are_an_error_of_the_request(front_end, line):
    front_end.submit("hello", SamplingParams(), request_id="r")
    delta = output(front_end, "r", (), FinishReason.ERROR, line)
    assert (delta.finish_reason, delta.cause, delta.error) == (FinishReason.ERROR, Cause.OPTIONS, line)
    with pytest.raises(ValueError, match=f"^{re.escape(line)}$"):
        check_delta(delta)


def test_output_that_cannot_be_turned_into_text_fails_alone(front_end, engine, tokenizer, caplog):
    front_end.submit("hi", GREEDY, request_id="bad")
    front_end.submit("hi", GREEDY, request_id="good")
    delta = output(front_end, "bad", [2**40])
    assert (delta.finish_reason, delta.cause) == (FinishReason.ERROR, Cause.REQUEST)
    assert delta.error == "the output cannot be turned into text; see the server's log"
    assert "output of request 'bad' cannot be turned into text" in caplog.text
    assert engine.aborted == ["bad"]
    assert output(front_end, "good", ids(tokenizer, "a")).text == "a"


def test_an_engine_that_fails_ends_every_request(front_end, engine, tokenizer):
    front_end.submit("hi", GREEDY, request_id="a")
    front_end.submit("hi", GREEDY, request_id="b")
    front_end.submit("hi", GREEDY, request_id="c")
    front_end.abort("c")
    output(front_end, "a", ids(tokenizer, "x"))
    sent = len(engine.sent)
    deltas = front_end.handle(EngineFailed("out of memory"))
    assert [(d.request_id, d.finish_reason, d.cause, d.error, d.output_tokens) for d in deltas] == [
        ("a", FinishReason.ERROR, Cause.ENGINE, "out of memory", 1),
        ("b", FinishReason.ERROR, Cause.ENGINE, "out of memory", 0),
    ]
    assert len(engine.sent) == sent
    assert front_end.failure == "out of memory"
    assert front_end.handle(EngineFailed("again")) == []
    with pytest.raises(EngineDeadError, match=r"^the engine has ended: out of memory$"):
        front_end.submit("hi", GREEDY)


def test_end_all(front_end, engine):
    front_end.submit("hi", GREEDY, request_id="a")
    (delta,) = front_end.end_all("the server is shutting down")
    assert (delta.finish_reason, delta.cause) == (FinishReason.ERROR, Cause.CLOSING)
    assert engine.aborted == ["a"]


def test_aborting_while_the_engine_dies_is_quiet(front_end, engine):
    front_end.submit("hi", GREEDY, request_id="a")
    engine.send_error = BrokenPipeError()
    assert [delta.finish_reason for delta in front_end.abort("a")] == [FinishReason.ABORT]


def test_output_for_an_unknown_request_is_logged(front_end, caplog):
    assert output(front_end, "x\n", [5]) is None
    assert r"the engine sent output of a request that is not open: 'x\n'" in caplog.text


def test_messages_are_what_the_engine_expects(front_end, engine):
    front_end.submit("hi", GREEDY, request_id="a")
    front_end.abort("a")
    assert isinstance(engine.sent[0], AddRequest)
    assert engine.sent[1] == AbortRequest("a")
