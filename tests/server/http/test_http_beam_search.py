"""Beam search over HTTP and gRPC: choices from best to worst, refusals by name, and one answer whatever happens.

The engine's log-probability of id i at position p is -p - i / 256, and id 2 ends an output.
"""

from __future__ import annotations

import asyncio

import httpx
import pytest

from jaxserve.models.tiny.tiny_tokenizer import EOS_ID
from jaxserve.request import FinishReason
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.clients.client_results import join_samples
from jaxserve.serving.clients.grpc_client import Client
from tests.engine_ready import changed
from tests.server.fakes import READY, EchoEngine
from tests.server.http.http_harness import HttpServed, error_of, events_of, http_serving_in_thread, run_http

SEARCH = {"prompt": "abcd", "use_beam_search": True, "n": 2, "max_tokens": 2, "return_token_ids": True}
"""Five tokens of prompt. Best is [EOS] with -(5 + 2 / 256) / 5, then [0, 0] with -11 / 7."""

BEST = [[EOS_ID], [0, 0]]


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


def test_choices_go_from_the_best_to_the_worst(http):
    whole = http.post("/v1/completions", json=SEARCH).json()
    assert [choice["index"] for choice in whole["choices"]] == [0, 1]
    assert [choice["token_ids"] for choice in whole["choices"]] == BEST
    assert [choice["finish_reason"] for choice in whole["choices"]] == ["stop", "length"]
    assert whole["usage"]["prompt_tokens"] == 5
    assert whole["usage"]["completion_tokens"] == 3
    longer = http.post("/v1/completions", json=SEARCH | {"length_penalty": 5.0}).json()
    assert [choice["token_ids"] for choice in longer["choices"]] == [[0, 0], [0, 1]]
    for early in (True, False, "never"):  # lengths are those of outputs: -11 / 2 is next best
        found = http.post("/v1/completions", json=SEARCH | {"early_stopping": early, "length_penalty": 0.5}).json()
        assert [choice["token_ids"] for choice in found["choices"]] == ([[0, 0], [0, 1]])


def test_a_stream_has_each_choice_at_the_end(http):
    events = events_of(http.post("/v1/completions", json=SEARCH | {"stream": True}).text)
    choices = [choice for event in events[:-1] for choice in event["choices"]]
    ids = {
        index: [one for choice in choices if choice["index"] == index for one in choice["token_ids"]]
        for index in (0, 1)
    }
    assert [ids[0], ids[1]] == BEST
    assert sorted(choice["finish_reason"] for choice in choices if choice["finish_reason"]) == ["length", "stop"]


def test_chats_and_several_prompts_are_searched_too(http):
    chat = {"messages": [{"role": "user", "content": "hello"}], "use_beam_search": True, "n": 2, "max_tokens": 1}
    asked = chat | {"logprobs": True, "top_logprobs": 1, "return_token_ids": True}
    whole = http.post("/v1/chat/completions", json=asked).json()
    assert [choice["token_ids"] for choice in whole["choices"]] == [[0], [1]]
    first, second = ([one["logprob"] for one in choice["logprobs"]["content"]] for choice in whole["choices"])
    assert first[0] == second[0] + 1 / 256
    both = http.post("/v1/completions", json=SEARCH | {"prompt": ["abcd", "abc"], "echo": True}).json()
    assert [choice["text"] for choice in both["choices"]] == ["abcd", "abcd", "abc", "abc"]
    assert [choice["token_ids"] for choice in both["choices"][:2]] == BEST


def test_prompt_log_probabilities_come_with_the_first_choice(http):
    whole = http.post("/v1/completions", json=SEARCH | {"prompt_logprobs": 0}).json()
    assert [len(one) if one else 0 for one in whole["choices"][0]["prompt_logprobs"]] == [0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 11}, "n"),
        ({"top_p": 0.5}, "top_p"),
        ({"stop": "x"}, "stop"),
        ({"presence_penalty": 1}, "presence_penalty"),
        ({"guided_choice": ["a", "b"]}, "structured_outputs"),
        ({"length_penalty": "long"}, "length_penalty"),
        ({"length_penalty": 11}, "length_penalty"),
        ({"early_stopping": 1}, "early_stopping"),
        ({"early_stopping": "soon"}, "early_stopping"),
        ({"use_beam_search": 1}, "use_beam_search"),
        ({"use_beam_search": False, "length_penalty": 2}, "length_penalty"),
        ({"max_tokens": 600}, "prompt"),
    ],
)
def test_a_bad_value_is_a_400_that_names_the_field(http, fields, param):
    response = http.post("/v1/completions", json=SEARCH | fields)
    assert response.status_code == 400
    assert error_of(response)["param"] == param


def test_a_call_that_is_forced_does_not_go_with_a_search(http):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    chat = {"messages": [{"role": "user", "content": "hello"}], "use_beam_search": True, "max_tokens": 1}
    response = http.post("/v1/chat/completions", json=chat | {"tools": [tool], "tool_choice": "required"})
    assert (response.status_code, error_of(response)["param"]) == (400, "tool_choice")


def test_defaults_of_the_checkpoint_are_of_drawing(chat_tokenizer):
    ready = changed(READY, sampling_defaults={"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1})
    with http_serving_in_thread(chat_tokenizer, engine=EchoEngine(ready)) as served:
        whole = httpx.post(f"{served.url}/v1/completions", json=SEARCH, timeout=60).json()
        assert [choice["token_ids"] for choice in whole["choices"]] == BEST
        refused = httpx.post(f"{served.url}/v1/completions", json=SEARCH | {"top_p": 0.9}, timeout=60)
        assert error_of(refused)["param"] == "top_p"


def test_grpc_has_an_end_for_each_output(server):
    params = SamplingParams(n=2, use_beam_search=True, max_tokens=2, logprobs=0)
    with Client(server.grpc.address) as client:
        found = join_samples(list(client.generate("abcd", params)))
    assert [list(one.token_ids) for one in found] == BEST
    assert [one.finish_reason for one in found] == [FinishReason.STOP, FinishReason.LENGTH]
    assert found[0].usage.prompt_tokens == 5


def test_a_client_that_hangs_up_ends_every_beam(tokenizer):
    async def body(served: HttpServed) -> None:
        served.engine.pause()
        served.engine.allow(1)
        call = asyncio.ensure_future(
            served.client.post("/v1/completions", json=SEARCH, headers={"x-request-id": "r", "x-tenant": "t"})
        )
        await served.until(served.engine.wait_for_requests, 3)
        assert [request.request_id for request in served.engine.requests] == ["r/0.0", "r/1.0", "r/1.1"]
        assert {request.options.tenant for request in served.engine.requests} == {"t"}
        call.cancel()
        for name in ("r/1.0", "r/1.1"):
            await served.until(served.engine.wait_for_abort, name)
        served.engine.resume()
        again = await served.client.post("/v1/completions", json=SEARCH, headers={"x-request-id": "r"})
        assert [choice["token_ids"] for choice in again.json()["choices"]] == BEST
        assert served.frontend.num_open == 0

    run_http(body, tokenizer)


@pytest.mark.parametrize("ends", ["deadline", "failure", "abort"])
def test_a_search_that_is_cut_short_is_one_error_or_one_answer(tokenizer, ends):
    async def body(served: HttpServed) -> None:
        served.engine.pause()
        served.engine.allow(1)
        headers = {"x-request-id": "r"} | ({"x-request-timeout": "0.2"} if ends == "deadline" else {})
        call = asyncio.ensure_future(served.client.post("/v1/completions", json=SEARCH, headers=headers))
        await served.until(served.engine.wait_for_requests, 3)
        if ends == "failure":
            served.engine.fail_request("r/1.1", "its logits are not finite")
        if ends == "abort":
            assert served.frontend.abort("r")
        response = await call
        expected = {"deadline": (408, "deadline_exceeded"), "failure": (500, "internal")}
        if ends == "abort":
            assert [choice["finish_reason"] for choice in response.json()["choices"]] == ["abort", "abort"]
            assert [choice["token_ids"] for choice in response.json()["choices"]] == [[0], [1]]
        else:
            assert (response.status_code, error_of(response)["code"]) == expected[ends]
        await served.until(served.engine.wait_for_abort, "r/1.0")
        assert served.frontend.num_open == 0

    run_http(body, tokenizer)
