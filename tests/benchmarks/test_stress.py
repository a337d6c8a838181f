"""Fuzzing and soaking: what they send, and how they count what comes back."""

from __future__ import annotations

import json

import pytest

from benchmarks import fuzz, soak
from benchmarks.stress.mixed_requests import Outcome, _take_answer
from benchmarks.stress.random_messages import Method, RandomMessages
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb

GENERATE = Method("/jaxserve.v1.JaxServe/Generate", pb.GenerateRequest)


def test_random_messages_are_reproducible_and_of_every_kind():
    made = [RandomMessages(seed).request(GENERATE) for seed in range(200)]
    assert made == [RandomMessages(seed).request(GENERATE) for seed in range(200)]
    assert {kind for kind, _ in made} == {"message", "mutated", "bytes"}
    parsed = [pb.GenerateRequest.FromString(data) for kind, data in made if kind == "message"]
    for name in ("text", "token_ids"):
        assert any(message.WhichOneof("prompt") == name for message in parsed)
    values = {message.sampling_params.max_tokens for message in parsed if message.HasField("sampling_params")}
    assert values & set(range(1, 9))
    assert any(not 1 <= value < 2**31 for value in values)


def event(**fields) -> str:
    return "data: " + json.dumps(fields) + "\n\n"


TOKEN, END = {"choices": [{"finish_reason": None}]}, {"choices": [{"finish_reason": "stop"}]}
USAGE = {"choices": [], "usage": {"completion_tokens": 7}}


@pytest.mark.parametrize(
    ("status", "text", "stream", "answers", "found"),
    [
        (200, event(**TOKEN) + event(**END) + event(**USAGE) + "data: [DONE]\n\n", True, 1, "stop"),
        (200, event(**TOKEN) + event(**END), True, 0, "stop"),
        (200, event(**TOKEN), True, 0, "none"),
        (200, event(**END) + event(**END) + "data: [DONE]\n\n", True, 2, "stop"),
        (200, event(**TOKEN) + event(error={"code": "internal", "message": "m"}), True, 1, "error internal"),
        (400, "{}", True, 1, "HTTP 400"),
        (200, json.dumps({"choices": [{"finish_reason": "length"}], "usage": USAGE["usage"]}), False, 1, "length"),
        (200, '{"choices": [{"finish_', False, 0, "none"),
    ],
)
def test_answers_over_http_are_counted(status, text, stream, answers, found):
    outcome = Outcome("http", "plain")
    _take_answer(outcome, status, text, stream)
    assert (outcome.answers, outcome.status) == (answers, found)
    assert outcome.is_answered == (answers == 1)


def test_what_went_wrong_is_told():
    results = {
        "alive": True,
        "exit_code": 0,
        "leaked": {"pages": 0},
        "tracebacks": [],
        "memory_mb": {"before": {"front_end": 100.0}, "after": {"front_end": 150.0}},
        "grpc": {"answers": {"message: OK": 5}, "bad": {}},
        "http": {"answers": {"200": 5}, "bad": []},
    }
    assert fuzz.wrong(results) == []
    for change in (
        {"alive": False},
        {"exit_code": 1},
        {"leaked": {"pages": 1}},
        {"tracebacks": ["Traceback"]},
        {"memory_mb": {"before": {"front_end": 100.0}, "after": {"front_end": 900.0}}},
        {"grpc": {"answers": {}, "bad": {"INTERNAL of /a": "b"}}},
        {"http": {"answers": {"500": 1}, "bad": []}},
    ):
        assert len(fuzz.wrong(results | change)) == 1, change
    good = {"alive": True, "exit_code": 0, "last_line": "", "leaked": {"pages": 0}, "unanswered": 0}
    assert soak.wrong(good) == []
    for change in ({"exit_code": 1}, {"leaked": {"pages": 2}}, {"unanswered": 3}):
        assert len(soak.wrong(good | change)) == 1


def test_a_soak_is_counted_by_the_minute():
    seen = soak.Minutes()
    seen.take(Outcome("grpc", "plain", "stop", 1, 10))
    seen.take(Outcome("http", "cancel", "canceled", 0))
    seen.take(Outcome("http", "plain", "none", 0))
    found = soak.figures(seen, 1.0)
    assert (found["requests"], found["unanswered"]) == (3, 1)
    assert found["minutes"][0]["tokens"] == 10
    assert found["last_to_first_minute"] == 1.0
