"""What a client sends over HTTP that is wrong, on a running server: the answer names it, and nothing stays behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import httpx
import pytest

from jaxserve.config.http_config import HttpConfig
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.models.tiny.tiny_tokenizer import BOS_ID, EOS_ID
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.access.callers import Caller
from jaxserve.serving.clients.grpc_client import generate_request
from jaxserve.serving.http_port.http_server import HttpServer
from jaxserve.serving.problem import UnauthenticatedError
from tests.faults.fault_server import run_fault
from tests.server.fakes import READY, save_tokenizer
from tests.server.harness import GREEDY, MAX_MESSAGE_BYTES, Served, run_served

TEMPLATE = "{% for message in messages %}<bos>{{ message.content }}<eos>{% endfor %}"


@pytest.fixture(scope="module")
def chat_tokenizer(tmp_path_factory) -> Tokenizer:
    directory = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return Tokenizer(directory)


@contextlib.asynccontextmanager
async def http_port(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    """The HTTP port of a running server, and a client of it."""
    port = HttpServer("127.0.0.1", 0, served.model, HttpConfig(max_prompts=4), None, MAX_MESSAGE_BYTES)
    await port.start()
    try:
        async with httpx.AsyncClient(base_url=f"http://{port.address}", timeout=60.0) as client:
            yield client
    finally:
        await port.stop()


def run_http(body: Callable[[Served, httpx.AsyncClient], Awaitable[None]], tokenizer: Any, **options: Any) -> None:
    """Runs a test against both ports of a server, which answer afterwards and hold nothing any more."""

    async def with_port(served: Served) -> None:
        async with http_port(served) as client:
            await body(served, client)
            served.engine.resume()
            answer = await client.post("/v1/completions", json={"model": "echo", "prompt": [5, 6], "temperature": 0})
            assert answer.status_code == 200, answer.text
            assert (await client.get("/health")).status_code == 200

    run_fault(with_port, tokenizer, **options)


FIELDS = [
    (1, {"prompt": ""}, 400, "prompt is empty"),
    (1, {"prompt": []}, 400, "prompt"),
    (2, {"prompt": "abcd", "max_tokens": 510}, 400, "prompt has 5 tokens and max_tokens is 510; together 515"),
    (3, {"prompt": "a" * 300, "max_tokens": 9}, 400, "exceed the page pool of 256 tokens"),
    *((4, {"max_tokens": value}, 400, f"max_tokens is {value}") for value in (0, -1, 2**31)),
    (5, {"n": 10**9}, 400, "n is 1000000000"),
    *((6, {name: -0.5}, 400, f"{name} is -0.5") for name in ("temperature", "top_p", "min_p", "repetition_penalty")),
    (6, {"presence_penalty": -2.5}, 400, "presence_penalty is -2.5"),
    *((6, {name: float("inf")}, 400, "no JSON") for name in ("temperature", "top_p", "frequency_penalty")),
    (7, {"prompt": [5, -1]}, 400, "[1] is -1"),
    (7, {"prompt": [READY.limits.vocab_size]}, 400, f"[0] is {READY.limits.vocab_size}"),
    (9, {"stop": ["x"] * 10_000}, 400, "stop has 10000"),
    (9, {"stop": [""]}, 400, "stop has ''"),
    (10, {"logit_bias": {"-1": 1.0}}, 400, "logit_bias"),
    (10, {"logit_bias": {"5": 1e300}}, 400, "logit_bias"),
    (11, {"guided_grammar": "(" * 30_000}, 400, "structured_outputs.grammar is refused"),
    (11, {"guided_regex": "(" * 20_000 + "b" + ")" * 20_000}, 400, "structured_outputs.regex is refused"),
    (
        11,
        {"guided_json": '{"not":' * 4_000 + "{}" + "}" * 4_000},
        400,
        "structured_outputs.json is nested more than 100",
    ),
    (11, {"structured_outputs": {"json": '{"a":' * 101 + "1" + "}" * 101}}, 400, "nested more than 100 deep"),
    (12, {"response_format": {"type": "json_schema", "json_schema": {"title": "x"}}}, 400, "response_format"),
    (32, {"logprobs": 10_000}, 400, "logprobs"),
    (32, {"top_logprobs": 21}, 400, "top_logprobs"),
]


@pytest.mark.parametrize("row", sorted({row for row, *_ in FIELDS}))
def test_fault_01_to_12_and_32_over_http(tokenizer, row):
    """In OpenAI's shape, with the field as `param`, before the engine hears of it."""

    async def body(served: Served, client: httpx.AsyncClient) -> None:
        for number, fields, status, words in FIELDS:
            if number != row:
                continue
            for stream in (False, True):
                content = json.dumps({"model": "echo", "prompt": "a", "stream": stream} | fields)
                content = content.replace("Infinity", "1e999")  # which is JSON
                headers = {"content-type": "application/json"}
                answer = await client.post("/v1/completions", content=content, headers=headers)
                assert answer.status_code == status, (fields, answer.text)
                error = answer.json()["error"]
                assert words in error["message"]
                assert error["type"] == "invalid_request_error"
        assert served.engine.requests == []

    run_http(body, tokenizer)


def test_fault_08_nul_bytes_and_invalid_text_over_http(tokenizer):
    async def body(served: Served, client: httpx.AsyncClient) -> None:
        for text in ("a\0b", "🍏"):
            answer = await client.post("/v1/completions", json={"model": "echo", "prompt": text, "temperature": 0})
            assert answer.json()["choices"][0]["text"] == text
        headers = {"content-type": "application/json"}
        for prompt in (b'"\xc3\x28"', b'"\\ud800"'):
            content = b'{"model": "echo", "prompt": ' + prompt + b"}"
            answer = await client.post("/v1/completions", content=content, headers=headers)
            assert answer.status_code == 400

    run_http(body, tokenizer)


def test_fault_13_14_a_body_and_headers_over_the_limit(tokenizer):
    async def body(served: Served, client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/completions", json={"model": "echo", "prompt": "a" * MAX_MESSAGE_BYTES})
        assert answer.status_code == 413
        assert "retry-after" not in answer.headers
        answer = await client.post("/v1/completions", json={}, headers={"x": "y" * 100_000})
        assert answer.status_code in (400, 431)
        assert served.engine.requests == []

    run_http(body, tokenizer)


def test_fault_15_a_full_queue_over_http(tokenizer):
    async def body(served: Served, client: httpx.AsyncClient) -> None:
        served.engine.pause()
        places = READY.max_num_seqs + READY.max_num_waiting
        waiting = [asyncio.ensure_future(served.client.generate_text("a", GREEDY)) for _ in range(places)]
        await served.until(served.engine.wait_for_requests, places)
        answer = await client.post("/v1/completions", json={"model": "echo", "prompt": "a"})
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        served.engine.resume()
        await asyncio.gather(*waiting)

    run_http(body, tokenizer)


def test_fault_17_clients_that_go_over_http(tokenizer):
    """Before the first token and after it."""

    async def body(served: Served, client: httpx.AsyncClient) -> None:
        fields = {"model": "echo", "prompt": "abc", "temperature": 0, "max_tokens": 200, "ignore_eos": True}
        served.engine.pause()
        call = asyncio.ensure_future(client.post("/v1/completions", json=fields, headers={"x-request-id": "queued"}))
        await served.until(served.engine.wait_for_requests, 1)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        await served.until(served.engine.wait_for_abort, "queued")
        fields["stream"] = True
        served.engine.allow(1)  # the response begins with the first token
        async with client.stream("POST", "/v1/completions", json=fields, headers={"x-request-id": "begun"}) as answer:
            lines = answer.aiter_lines()
            assert "choices" in await anext(lines)
        await served.until(served.engine.wait_for_abort, "begun")

    run_http(body, tokenizer)


def test_fault_19_a_duplicate_request_id_over_http(tokenizer):
    async def body(served: Served, client: httpx.AsyncClient) -> None:
        served.engine.pause()
        first = asyncio.ensure_future(served.client.generate_text("a", GREEDY, request_id="twin"))
        await served.until(served.engine.wait_for_requests, 1)
        headers = {"x-request-id": "twin"}
        answer = await client.post("/v1/completions", json={"model": "echo", "prompt": "b"}, headers=headers)
        assert answer.status_code == 409
        served.engine.resume()
        assert (await first).text == "a"

    run_http(body, tokenizer)


@pytest.mark.parametrize("stream", [False, True])
def test_fault_21_and_22_a_request_that_fails_and_an_engine_that_ends_over_http(tokenizer, stream):
    async def body(served: Served, client: httpx.AsyncClient) -> None:
        fields = {"model": "echo", "prompt": "abc", "temperature": 0, "stream": stream}
        served.engine.pause()
        calls = [
            asyncio.ensure_future(client.post("/v1/completions", json=fields, headers={"x-request-id": name}))
            for name in ("bad", "good")
        ]
        await served.until(served.engine.wait_for_requests, 2)
        served.engine.fail_request("bad", "the model's logits are not finite")
        served.engine.resume()
        bad, good = await asyncio.gather(*calls)
        assert "the model's logits are not finite" in bad.text
        assert bad.status_code == 500 or stream
        assert good.status_code == 200
        assert "not finite" not in good.text
        assert ("[DONE]" in good.text) == stream

    run_http(body, tokenizer)


@pytest.mark.parametrize("point", ["detokenize", "send"])
def test_fault_22_what_fails_for_one_request_in_the_front_end_over_http(tokenizer, point):
    async def body(served: Served, client: httpx.AsyncClient) -> None:
        for stream in (False, True):
            fields = {"model": "echo", "prompt": "abc", "temperature": 0, "stream": stream}
            answers = await asyncio.gather(
                *(
                    client.post("/v1/completions", json=fields, headers={"x-request-id": f"{name}{stream}"})
                    for name in ("bad", "good")
                )
            )
            bad, good = answers
            assert '"error"' in bad.text
            assert "InjectedFaultError" not in bad.text or "failpoint" not in bad.text
            assert bad.status_code == 500 or stream
            assert good.status_code == 200
            assert '"error"' not in good.text

    failpoints = tuple(f"{point}=raise,request=bad{stream}" for stream in (False, True))
    run_http(body, tokenizer, failpoints=failpoints)


def test_fault_23_an_engine_that_hangs_ends_http_streams_and_health_says_so(tokenizer):
    async def body(served: Served) -> None:
        async with http_port(served) as client:
            fields = {"model": "echo", "prompt": "abc", "temperature": 0, "stream": True}
            served.engine.pause()
            call = asyncio.ensure_future(client.post("/v1/completions", json=fields))
            await served.until(served.engine.wait_for_requests, 1)
            served.engine.state = "stuck"
            answer = await call
            assert "a step has not ended for" in answer.text
            assert "[DONE]" not in answer.text
            for path in ("/health", "/health/ready", "/health/live"):
                assert (await client.get(path)).status_code == 503
            answer = await client.post("/v1/completions", json={"model": "echo", "prompt": "a"})
            assert answer.status_code == 503

    run_served(body, tokenizer, step_timeout=0.2)


def test_fault_24_a_drain_ends_http_and_grpc_streams_alike(tokenizer):
    """New requests are refused on both ports; what runs may finish, and what outlasts the drain is told."""

    async def body(served: Served) -> None:
        async with http_port(served) as client:
            fields = {"model": "echo", "prompt": "abc", "temperature": 0, "stream": True}
            served.engine.pause()
            short = asyncio.ensure_future(client.post("/v1/completions", json=fields))
            await served.until(served.engine.wait_for_requests, 1)
            served.drain()
            assert (await client.get("/health/ready")).status_code == 503
            assert (await client.get("/health/live")).status_code == 200
            refused = await client.post("/v1/completions", json={"model": "echo", "prompt": "a"})
            assert refused.status_code == 503
            served.engine.resume()
            assert "[DONE]" in (await short).text
            served.model._draining = False
            served.engine.pause()
            long = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
            calls = [
                asyncio.ensure_future(client.post("/v1/completions", json=fields)),
                asyncio.ensure_future(client.post("/v1/completions", json=fields | {"stream": False})),
                asyncio.ensure_future(served.client.generate_text("abc", long)),
            ]
            await served.until(served.engine.wait_for_requests, 4)
            await served.frontend.close(0.0)
            streamed, whole, grpc_answer = await asyncio.gather(*calls, return_exceptions=True)
            assert "shutting down" in streamed.text
            assert "[DONE]" not in streamed.text
            assert (whole.status_code, "shutting down" in whole.text) == (503, True)
            assert "shutting down" in grpc_answer.details()

    run_served(body, tokenizer)


class _OneKey:
    """Knows one credential. That keys are compared in constant time is test_fault_26's in test_access_files.py."""

    is_needed = True

    def identify(self, credential: str | None) -> Caller:
        if self.is_needed and credential != "Bearer right":
            raise UnauthenticatedError("the key is missing or wrong")
        return Caller("someone")


@pytest.mark.parametrize("credential", [None, "", "Bearer wrong", "Bearer righ", "Basic cmlnaHQ="])
def test_fault_26_a_wrong_token_on_both_ports(tokenizer, credential):
    async def body(served: Served, client: httpx.AsyncClient) -> None:
        headers = {} if credential is None else {"authorization": credential}
        answer = await client.post("/v1/completions", json={"model": "echo", "prompt": "a"}, headers=headers)
        assert answer.status_code == 401
        assert (await client.get("/health")).status_code == 200
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            async for _ in served.client._stub.Generate(generate_request("a", GREEDY), metadata=tuple(headers.items())):
                pass
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        keys.is_needed = False  # for what is asked afterwards

    keys = _OneKey()
    run_http(body, tokenizer, callers=keys)


@pytest.mark.parametrize("name", ["user\x1b[31m", "caf\xe9\x7f", "tab\there"])
def test_fault_28_control_characters_in_headers_and_fields(tokenizer, caplog, name):
    async def body(served: Served, client: httpx.AsyncClient) -> None:
        fields = {"model": "echo", "prompt": "a", "temperature": 0, "user": name + "\n", "request_id": name + "\nx"}
        answer = await client.post("/v1/completions", json=fields)
        assert answer.status_code in (400, 500)
        assert "\n" not in answer.headers.get("x-request-id", "")

    run_http(body, tokenizer, failpoints=("detokenize=raise,times=1",))
    for record in caplog.records:
        assert not any(character in record.getMessage() for character in "\n\r\x1b\x00")


def test_a_model_that_is_not_served_leaves_no_traceback(tokenizer, caplog):
    async def body(served: Served, client: httpx.AsyncClient) -> None:
        assert (await client.get("/v1/models/other")).status_code == 404

    run_http(body, tokenizer)
    assert not any(record.exc_info for record in caplog.records)


def test_fault_29_bodies_just_under_the_limit_over_http(tokenizer):
    async def body(served: Served, client: httpx.AsyncClient) -> None:
        text = "a" * (MAX_MESSAGE_BYTES - 200)
        calls = [client.post("/v1/completions", json={"model": "echo", "prompt": text}) for _ in range(16)]
        for answer in await asyncio.gather(*calls, client.get("/health")):
            assert answer.status_code in (200, 400)
        assert served.engine.requests == []

    run_http(body, tokenizer)


def test_fault_33_34_templates_and_special_tokens_over_http(chat_tokenizer):
    """The template's <bos> and <eos> are tokens; those of a message are the text that they are."""

    async def body(served: Served, client: httpx.AsyncClient) -> None:
        messages = [{"role": "user", "content": "<eos><bos>x<eo"}, {"role": "user", "content": "s>"}]
        fields = {"model": "echo", "messages": messages, "temperature": 0, "max_tokens": 3}
        answer = await client.post("/v1/chat/completions", json=fields)
        assert answer.status_code == 200, answer.text
        (request,) = served.engine.requests
        ids = list(request.prompt_token_ids)
        assert [ids.count(BOS_ID), ids.count(EOS_ID)] == [2, 2]
        assert chat_tokenizer.decode(ids, skip_special_tokens=True) == "<eos><bos>x<eos>"
        answer = await client.post("/tokenize", json={"model": "echo", "messages": messages})
        assert answer.json()["tokens"] == ids

    run_http(body, chat_tokenizer)
