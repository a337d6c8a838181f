"""What cannot be answered: each error has its status, and OpenAI's shape with the field, its value and the limit."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import pytest

from jaxserve.config.http_config import HttpConfig
from jaxserve.serving.access.callers import Caller
from jaxserve.serving.http_port.errors import error_answer, problem_answer
from jaxserve.serving.problem import Code, ForbiddenError, Problem, UnauthenticatedError
from tests.server.http.http_harness import JSON, error_of, events_of, run_http

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, headers=JSON, timeout=60) as client:
        yield client


@pytest.mark.parametrize("url", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"n": 2, "temperature": 0}, "n", "n is 2 and temperature is 0; all samples would be the same"),
        ({"n": 129}, "n", "n is 129; at most 128 samples of one request are allowed"),
        ({"top_logprobs": 3}, "top_logprobs", "top_logprobs is 3; "),
        ({"best_of": 3}, "best_of", "best_of is 3; only 1"),
        (
            {"presence_penalty": 2.5},
            "presence_penalty",
            "presence_penalty is 2.5; it must be at least -2 and at most 2",
        ),
        ({"frequency_penalty": -3}, "frequency_penalty", "frequency_penalty is -3; it must be at least -2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "repetition_penalty is 0; it must be above 0"),
        ({"logit_bias": {"5": 101}}, "logit_bias[5]", "logit_bias[5] is 101; it must be at least -100 and at most 100"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "logit_bias id is -1; it must be from 0 to"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias has the key 'x'; its keys must be token ids"),
        ({"tools": "x"}, "tools", "tools is 'x'; "),
        ({"response_format": {"type": "xml"}}, "response_format.type", "response_format.type is 'xml'; it must be one"),
        ({"suffix": "x"}, "suffix", "suffix is 'x'; only"),
        ({"guided_regex": 5}, "structured_outputs.regex", "structured_outputs.regex is 5; it must be a text"),
        ({"structured_outputs": {}}, "structured_outputs", "structured_outputs must have exactly one of json"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "prompt_logprobs is 21; this server returns at most max_logprobs"),
        ({"chat_template": "x"}, "chat_template", "chat_template is 'x'; only null"),
        ({"skip_special_tokens": 1}, "skip_special_tokens", "skip_special_tokens is 1; it must be true or false"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "truncate_prompt_tokens is 0; it must be from -1 to"),
        (
            {"output_kind": "all"},
            "output_kind",
            "output_kind is 'all'; it must be one of cumulative, delta, final_only",
        ),
        ({"stop": "a", "detokenize": False}, "stop", "stop is ('a',) and detokenize is False; stop strings are looked"),
        ({"stream": 1}, "stream", "stream is 1; it must be true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options is given without stream"),
        ({"stream_options": {"usage": True}, "stream": True}, "stream_options", "stream_options has the unknown field"),
        ({"temperature": -1}, "temperature", "temperature is -1; it must be at least 0 and at most 100"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens is 0; it must be from 1"),
        ({"top_p": "x"}, "top_p", "top_p is 'x'; it must be a number"),
        ({"seed": 2**63}, "seed", "seed is 9223372036854775808; it must be from -9223372036854775808"),
        ({"stop": ["a"] * 17}, "stop", "stop has 17 strings; at most 16"),
        ({"stop_token_ids": [600]}, "stop_token_ids", "stop_token_ids has 600; token ids must be from 0 to 511"),
        ({"priority": 0.5}, "priority", "priority is 0.5; it must be a whole number"),
        ({"temprature": 0}, "temprature", "body has the unknown field 'temprature'; did you mean temperature?"),
        ({"max_tokens": 600}, "prompt", "prompt has "),
        ({"user": 5}, "user", "user is 5; it must be text"),
        ({"request_id": ""}, "request_id", "request_id is empty"),
    ],
)
def test_a_field_that_is_refused_is_named(http, url, fields, param, words):
    own = {"prompt": "hi"} if url == "/v1/completions" else {"messages": HI}
    response = http.post(url, json=own | fields)
    assert response.status_code == 400
    error = error_of(response)
    assert error["message"].startswith(words)
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


def test_neutral_values_are_taken(http):
    neutral = {
        "n": 1, "logprobs": None, "best_of": 1, "presence_penalty": 0, "repetition_penalty": 1.0, "logit_bias": {},
        "tools": [], "response_format": {"type": "text"}, "suffix": "", "user": "u", "metadata": {"a": "b"},
        "store": False, "service_tier": "auto", "skip_special_tokens": True, "use_beam_search": False,
        "stream": False, "stream_options": None, "echo": False, "add_special_tokens": True,
    }  # fmt: skip
    assert http.post("/v1/completions", json={"prompt": "hi", **neutral}).json()["choices"][0]["text"] == "hi"
    neutral["add_special_tokens"] = False
    assert http.post("/v1/chat/completions", json={"messages": HI, **neutral}).is_success


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ([[]], "prompt is empty"),
        (["a", ""], "prompt is empty"),
        ([5, "a"], "prompt[0] is 5; a list of prompts has texts"),
        ([1, 2, 600], "prompt_token_ids[2] is 600"),
        ([1, 2, -1], "prompt_token_ids[2] is -1"),
        ([1, True], "prompt_token_ids[1] is True"),
        ({"a": 1}, "prompt is of type dict"),
        ("x" * 600, "prompt has 601 tokens"),
        (["x"] * 1025, "prompt has 1025 prompts; at most 1024"),
    ],
)
def test_prompts_that_are_refused(server, http, prompt, words):
    before = len(server.engine.requests)
    response = http.post("/v1/completions", json={"prompt": prompt})
    assert response.status_code == 400
    assert error_of(response)["message"].startswith(words)
    running = [request.request_id for request in server.engine.requests[before:]]
    assert all(name in server.engine.aborted for name in running)  # of several prompts all are answered, or none


@pytest.mark.parametrize(
    ("method", "url", "options", "status", "words"),
    [
        ("GET", "/v1/nothing", {}, 404, "path '/v1/nothing' is unknown"),
        ("GET", "/v1/models/other", {}, 404, "model 'other' is not served here; this server has 'echo'"),
        ("GET", "/v1/completions", {}, 405, "GET is not allowed for '/v1/completions'; allowed is POST"),
        ("POST", "/v1/models", {}, 405, "POST is not allowed"),
        ("POST", "/v1/completions", {"json": {"prompt": "x", "model": "gpt"}}, 404, "model 'gpt' is not served here"),
        ("POST", "/v1/completions", {"content": b"{"}, 400, "the body is no JSON: "),
        ("POST", "/v1/completions", {"content": b'{"prompt": "\xff"}'}, 400, "the body is no JSON: "),
        ("POST", "/v1/completions", {"content": b'{"prompt": "\\ud800"}'}, 400, "the body is no JSON: "),
        ("POST", "/v1/completions", {"content": b"[]"}, 400, "the body is a list; it must be a JSON object"),
        ("POST", "/v1/completions", {"content": b""}, 400, "the body is no JSON: "),
        (
            "POST",
            "/v1/completions",
            {"content": b"[" * 60_000},
            400,
            "the body is no JSON that can be read: it is nested",
        ),
        ("POST", "/v1/completions", {"json": {}}, 400, "body has no prompt"),
        ("POST", "/v1/chat/completions", {"json": {}}, 400, "body has no messages"),
        ("POST", "/v1/completions", {"headers": {"content-type": "text/plain"}}, 415, "content-type is 'text/plain'"),
        ("POST", "/v1/completions", {"headers": {"content-encoding": "gzip"}}, 415, "content-encoding is 'gzip'"),
        ("POST", "/tokenize", {"json": {"prompt": "a", "promt": "b"}}, 400, "body has the unknown field 'promt'; did"),
        ("POST", "/tokenize", {"json": {}}, 400, "body has no prompt or messages"),
        ("POST", "/detokenize", {"json": {"tokens": "a"}}, 400, "tokens is 'a'; it must be a list of token ids"),
        (
            "POST",
            "/detokenize",
            {"json": {"tokens": [512]}},
            400,
            "token_ids[0] is 512; token ids must be from 0 to 511",
        ),
    ],
)
def test_errors_of_paths_methods_and_bodies(http, caplog, method, url, options, status, words):
    response = http.request(method, url, **options)
    assert response.status_code == status
    assert error_of(response)["message"].startswith(words)
    assert caplog.records == []


def test_unknown_fields_may_pass_with_a_warning(tokenizer, caplog):
    async def test(served):
        response = await served.client.post("/v1/completions", json={"prompt": "ab", "temprature": 0, "x": 1})
        assert response.json()["choices"][0]["text"] == "ab"
        assert response.headers["x-jaxserve-warning"] == "unknown fields were passed over: 'temprature', 'x'"

    run_http(test, tokenizer, config=HttpConfig(allow_unknown_fields=True))
    assert "'temprature', 'x'" in caplog.text


class Keys:
    """Knows one key, and one that may do nothing."""

    def identify(self, credential):
        if credential == "Bearer bad":
            raise ForbiddenError("this key is locked")
        if credential != "Bearer good":
            raise UnauthenticatedError("the key is wrong")
        return Caller("good", tenant="of-key", priority=4)


def test_every_route_but_health_needs_a_key(tokenizer):
    async def test(served):
        client = served.client
        for method, url in (
            ("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/version"), ("GET", "/openapi.json"),
            ("GET", "/nothing"), ("POST", "/tokenize"),
        ):  # fmt: skip
            response = await client.request(method, url)
            assert response.status_code == 401, url
            assert error_of(response)["message"] == "the key is wrong"
            assert response.headers["www-authenticate"].startswith("Bearer")
        for url in ("/health", "/health/live", "/health/ready"):
            assert (await client.get(url)).status_code == 200
        headers = {"authorization": "Bearer good", "x-tenant": "of-key", "x-priority": "4"}
        response = await client.post("/v1/completions", json={"prompt": "a"}, headers=headers)
        assert response.is_success
        options = served.engine.requests[-1].options
        assert (options.tenant, options.priority) == ("of-key", 4)
        assert (await client.get("/version", headers={"authorization": "Bearer bad"})).status_code == 403
        document = (await client.get("/openapi.json", headers=headers)).json()
        assert document["security"] == [{"key": []}]

    run_http(test, tokenizer, callers=Keys())


def test_before_during_and_after(tokenizer):
    """Health and requests follow the engine's life."""

    async def test(served):
        client, engine = served.client, served.engine

        async def health():
            found = [await client.get(f"/health{path}") for path in ("", "/ready", "/live")]
            return [response.status_code for response in found], found[0].json()["status"]

        assert await health() == ([200, 200, 200], "ready")
        served.model.drain()
        assert await health() == ([503, 503, 200], "draining")
        response = await client.post("/v1/completions", json={"prompt": "a"})
        assert (response.status_code, error_of(response)["code"]) == (503, "unavailable")
        engine.die("it broke")
        while not served.frontend.failure:  # the reader's thread passes it on
            await client.get("/version")
        assert await health() == ([503, 503, 503], "failed")

    run_http(test, tokenizer)


def test_an_engine_that_hangs_is_not_healthy(tokenizer):
    async def test(served):
        served.engine.state = "stuck"
        while (await served.client.get("/health")).status_code == 200:
            await served.until(time.sleep, 0.02)
        assert (await served.client.get("/health/live")).status_code == 503

    run_http(test, tokenizer, step_timeout=0.2)


def test_problems_before_and_after_the_first_token(tokenizer):
    async def test(served):
        engine, client = served.engine, served.client
        engine.pause()

        async def fail(name, steps):
            await served.until(engine.wait_for_requests, len(engine.requests) + 1)
            if steps:
                engine.allow(steps)
            else:
                engine.fail_request(name, "its logits are NaN")

        for stream in (False, True):
            name = f"early-{stream}"
            failing = asyncio.ensure_future(fail(name, 0))
            await asyncio.sleep(0)
            body = {"prompt": "abcd", "stream": stream}
            response = await client.post("/v1/completions", json=body, headers={"x-request-id": name})
            await failing
            assert (response.status_code, error_of(response)["message"]) == (500, "its logits are NaN")
        going = asyncio.ensure_future(fail("late", 1))
        await asyncio.sleep(0)
        body = {"prompt": "abcd", "stream": True}
        async with client.stream("POST", "/v1/completions", json=body, headers={"x-request-id": "late"}) as response:
            assert response.status_code == 200
            text = ""
            async for part in response.aiter_text():
                if not text:
                    engine.fail_request("late", "its logits are NaN")
                text += part
        await going
        first, error = events_of(text)
        assert first["choices"][0]["text"] == "a"
        assert error["error"]["message"] == "its logits are NaN"
        assert error["error"]["type"] == "server_error"

    run_http(test, tokenizer)


def test_deadlines_duplicates_and_a_full_queue(tokenizer):
    async def test(served):
        engine, client = served.engine, served.client
        engine.pause()
        response = await client.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-timeout": "0.05"})
        assert (response.status_code, error_of(response)["type"]) == (408, "timeout_error")
        open_ones = [
            asyncio.ensure_future(client.post("/v1/completions", json={"prompt": "a", "request_id": f"r{number}"}))
            for number in range(39)
        ]
        await served.until(engine.wait_for_requests, 40)
        twice = await client.post("/v1/completions", json={"prompt": "a", "request_id": "r7"})
        assert (twice.status_code, error_of(twice)["code"]) == (409, "already_exists")
        open_ones.append(asyncio.ensure_future(client.post("/v1/completions", json={"prompt": "a"})))
        await served.until(engine.wait_for_requests, 41)
        full = await client.post("/v1/completions", json={"prompt": "a"})
        assert (full.status_code, error_of(full)["type"]) == (429, "rate_limit_error")
        assert int(full.headers["retry-after"]) >= 1
        engine.resume()
        assert {(await one).status_code for one in open_ones} == {200}

    run_http(test, tokenizer)


def test_ids_that_are_echoed_are_checked_first(tokenizer):
    async def test(served):
        response = await served.client.post("/v1/completions", json={"prompt": [5, 378.0], "echo": True})
        assert response.status_code == 400
        assert error_of(response)["message"] == "token_ids[1] is 378.0; it must be a whole number"

    run_http(test, tokenizer)


def test_what_nobody_foresaw_says_nothing():
    answer = error_answer(KeyError("a secret of another user"))
    error = json.loads(answer.body)["error"]
    assert (answer.status, error["message"]) == (500, "internal error: KeyError")


def test_every_code_has_a_status():
    for code in Code:
        answer = problem_answer(Problem(code, "x is 1; it must be 2", 2.5))
        assert 400 <= answer.status < 600
        assert answer.headers["retry-after"] == "3"
