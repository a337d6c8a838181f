"""Completions and chats over HTTP: what is asked for is what the engine is given, and what it says is answered."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.models.tiny.tiny_tokenizer import BOS_ID
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.clients.grpc_client import Client
from tests.server.http.http_harness import JSON, error_of, events_of, run_http, texts_of

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, headers=JSON, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def grpc_client(server):
    with Client(server.grpc.address) as client:
        yield client


def post(http, url, **body):
    return http.post(url, json=body)


def completion(http, **body):
    response = post(http, "/v1/completions", **body)
    assert response.status_code == 200, response.text
    return response.json()


def test_a_completion(http):
    before = int(time.time())
    body = completion(http, model="echo", prompt="abc", temperature=0)
    assert body.pop("id").startswith("cmpl-")
    assert before <= body.pop("created") <= time.time()
    assert body == {
        "object": "text_completion",
        "model": "echo",
        "choices": [{"index": 0, "text": "abc", "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 4,
            "completion_tokens": 4,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }


def test_a_chat(http):
    response = post(http, "/v1/chat/completions", messages=HI, max_completion_tokens=2)
    body = response.json()
    assert body["id"] == f"chatcmpl-{response.headers['x-request-id']}"
    assert body["object"] == "chat.completion"
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "hi"}
    assert choice["finish_reason"] == "length"
    # The template ends a task with a newline.
    assert body["usage"]["prompt_tokens"] == len("hi\n") + 1


@pytest.mark.parametrize("usage", [None, False, True])
def test_a_streamed_completion(http, usage):
    options = {} if usage is None else {"stream_options": {"include_usage": usage, "include_obfuscation": False}}
    response = post(http, "/v1/completions", prompt="abc", stream=True, temperature=0, **options)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *chunks, done = events_of(response.text)
    assert done == "[DONE]"
    if usage:
        last = chunks.pop()
        assert last["choices"] == []
        assert last["usage"]["completion_tokens"] == 4
        assert all(chunk.pop("usage") is None for chunk in chunks)
    assert texts_of(chunks) == {0: "abc"}
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-1] == "stop"
    assert all("usage" not in chunk for chunk in chunks)


def test_a_streamed_chat(http):
    response = post(http, "/v1/chat/completions", messages=HI, stream=True)
    *chunks, done = events_of(response.text)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    roles = [chunk["choices"][0]["delta"].get("role") for chunk in chunks]
    assert roles == ["assistant", *[None] * (len(chunks) - 1)]
    assert texts_of(chunks) == {0: "hi\n"}


def test_several_prompts_are_choices_in_their_order(http):
    prompts = ["first", "second one", "3"]
    body = completion(http, prompt=prompts, temperature=0)
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == list(enumerate(prompts))
    assert body["usage"]["prompt_tokens"] == sum(len(prompt) + 1 for prompt in prompts)
    response = post(http, "/v1/completions", prompt=prompts, stream=True, stream_options={"include_usage": True})
    *chunks, usage, done = events_of(response.text)
    assert texts_of(chunks) == dict(enumerate(prompts))
    assert usage["usage"] == body["usage"]
    assert done == "[DONE]"


def test_streams_of_several_prompts_are_interleaved(tokenizer):
    async def test(served):
        served.engine.pause()

        async def first_step():
            await served.until(served.engine.wait_for_requests, 2)
            served.engine.allow(1)

        first = asyncio.ensure_future(first_step())
        body = {"prompt": ["aaa", "bbb"], "stream": True}
        indices = []
        async with served.client.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line and line != "data: [DONE]":
                    indices += [choice["index"] for choice in json.loads(line.removeprefix("data: "))["choices"]]
                    if len(indices) % 2 == 0:
                        served.engine.allow(1)
        await first
        assert [set(indices[place : place + 2]) for place in range(0, len(indices), 2)] == [{0, 1}] * 4

    run_http(test, tokenizer)


@pytest.mark.parametrize("stream", [False, True])
def test_echo(http, tokenizer, stream):
    def text(**body):
        response = post(http, "/v1/completions", echo=True, stream=stream, **body)
        if stream:
            return texts_of(events_of(response.text))[0]
        return response.json()["choices"][0]["text"]

    assert text(prompt="ab") == "abab"
    assert text(prompt=tokenizer.encode("ab", add_special_tokens=False)) == "abab"
    rocket = tokenizer.encode("x🚀", add_special_tokens=False)
    whole = text(prompt=rocket[:-2], max_tokens=3)
    assert whole == tokenizer.decode([*rocket[:-2], *rocket[:3]])


def test_token_ids(http, tokenizer):
    ids = tokenizer.encode("xyz")
    assert ids[0] == BOS_ID
    body = completion(http, prompt=ids, return_token_ids=True)
    (choice,) = body["choices"]
    assert choice["text"] == "xyz"
    assert choice["token_ids"][:3] == ids[1:]
    both = completion(http, prompt=[ids, tokenizer.encode("b")])
    assert [choice["text"] for choice in both["choices"]] == ["xyz", "b"]
    events = events_of(post(http, "/v1/completions", prompt=ids, stream=True, return_token_ids=True).text)[:-1]
    streamed = [token_id for event in events for token_id in event["choices"][0]["token_ids"]]
    assert streamed == choice["token_ids"]


def test_every_parameter_reaches_the_engine(server, http):
    asked = {"temperature": 0.5, "top_k": 7, "top_p": 0.25, "min_p": 0.125, "seed": 11, "max_tokens": 9}
    asked |= {"min_tokens": 2, "stop_token_ids": [77], "ignore_eos": True}
    completion(http, prompt="parameters", **asked, stop=["never"], cache_salt="s", tenant="t", priority=-3)
    request = server.engine.requests[-1]
    found = {name: getattr(request, name) for name in asked if name != "ignore_eos"}
    assert found == {name: value for name, value in asked.items() if name != "ignore_eos"} | {"stop_token_ids": (77,)}
    assert (request.options.cache_salt, request.options.tenant) == ("s", "t")
    assert request.options.priority == 3  # lower is more urgent there, higher here


def test_headers_say_who_asks_and_how_urgently(server, http):
    headers = {"x-tenant": "t", "x-priority": "5", "x-request-timeout": "100", "x-request-id": "mine"}
    before = time.time()
    response = http.post("/v1/completions", json={"prompt": "headers"}, headers=headers)
    assert response.headers["x-request-id"] == "mine"
    assert response.json()["id"] == "cmpl-mine"
    request = server.engine.requests[-1]
    assert request.request_id == "mine"
    assert (request.options.tenant, request.options.priority) == ("t", 5)
    assert before + 100 <= request.options.deadline <= time.time() + 100


def test_the_body_counts_before_the_headers(server, http):
    headers = {"x-tenant": "header", "x-priority": "5", "x-request-timeout": "100"}
    body = {"prompt": "both", "tenant": "body", "priority": 2, "deadline": time.time() + 50}
    assert http.post("/v1/completions", json=body, headers=headers).is_success
    options = server.engine.requests[-1].options
    assert (options.tenant, options.priority, options.deadline) == ("body", -2, body["deadline"])


@pytest.mark.parametrize(
    ("headers", "body", "words"),
    [
        ({"x-priority": "high"}, {}, "x-priority is 'high'; it must be a whole number"),
        ({"x-priority": "99999999999"}, {}, "x-priority is '99999999999'; it must be"),
        ({"x-request-timeout": "0"}, {}, "x-request-timeout is '0'; it must be a finite number of seconds above 0"),
        ({"x-request-timeout": "nan"}, {}, "x-request-timeout is 'nan'; it must"),
        ({"x-request-id": "i" * 300}, {}, "x-request-id has 300 characters; at most 256"),
    ],
)
def test_headers_that_say_nothing_clear_are_refused(http, headers, body, words):
    response = http.post("/v1/completions", json={"prompt": "x", **body}, headers=headers)
    assert response.status_code == 400
    assert error_of(response)["message"].startswith(words)


def test_a_request_id_of_the_body(http):
    body = {"messages": HI, "request_id": "of-body"}
    response = http.post("/v1/chat/completions", json=body, headers={"x-request-id": "of-header"})
    assert (response.headers["x-request-id"], response.json()["id"]) == ("of-body", "chatcmpl-of-body")


def test_template_options_of_a_chat(server, http):
    post(http, "/v1/chat/completions", messages=HI, add_generation_prompt=False)
    assert len(server.engine.requests[-1].prompt_token_ids) == 1 + len("hi")
    response = post(http, "/v1/chat/completions", messages=HI, chat_template_kwargs={"tokenize": True})
    assert error_of(response)["message"].startswith("chat_template_kwargs has 'tokenize'")
    assert post(http, "/v1/chat/completions", messages=HI, chat_template_kwargs={"thinking": True}).is_success
    response = post(http, "/v1/chat/completions", messages=[{"role": "system", "content": "x"}])
    assert (response.status_code, error_of(response)["param"]) == (400, "messages")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=24)


@settings(max_examples=25, deadline=None)
@given(text=TEXT, stop=st.lists(TEXT, max_size=2), limit=st.integers(1, 40))
def test_streamed_whole_and_grpc_texts_are_the_same(grpc_client, http, text, stop, limit):
    body = {"prompt": text, "stop": stop, "max_tokens": limit, "temperature": 0}
    whole = completion(http, **body)
    streamed = events_of(post(http, "/v1/completions", **body, stream=True).text)
    expected = whole["choices"][0]["text"]
    assert texts_of(streamed) == {0: expected}
    assert streamed[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    params = SamplingParams(temperature=0, stop=tuple(stop), max_tokens=limit)
    assert "".join(chunk.text for chunk in grpc_client.generate(text, params)) == expected
