"""Sampling parameters of the host over HTTP and gRPC: kinds of output, truncation, and defaults of a checkpoint."""

from __future__ import annotations

import itertools

import httpx
import pytest

from jaxserve.models.tiny.tiny_tokenizer import BOS_ID
from jaxserve.serving.clients.client_results import join
from jaxserve.serving.clients.grpc_client import Client
from jaxserve.serving.clients.http_client import HttpClient
from tests.engine_ready import changed
from tests.server.fakes import READY, EchoEngine
from tests.server.http.http_harness import JSON, events_of, http_serving_in_thread, texts_of

DEFAULTS = {"temperature": 0.5, "top_k": 20, "max_tokens": 30}
GREEDY = {"temperature": 0}
LONG = "vwxyz " * 100_000
"""A text that is refused before it is read, unless it is to be truncated."""


@pytest.fixture(scope="module")
def server(chat_tokenizer):
    ready = changed(READY, sampling_defaults=DEFAULTS, default_max_tokens=30)
    with http_serving_in_thread(chat_tokenizer, engine=EchoEngine(ready), max_body_bytes=4 << 20) as served:
        yield served


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, headers=JSON, timeout=60) as client:
        yield client


@pytest.fixture(params=["grpc", "http"])
def client(server, request):
    made = Client(server.grpc.address) if request.param == "grpc" else HttpClient(server.url)
    with made as client:
        yield client


def test_the_kinds_of_a_stream_say_the_same(client):
    delta = list(client.generate("abcdé", GREEDY | {"output_kind": "delta"}))
    assert "".join(chunk.text for chunk in delta) == "abcdé"
    cumulative = list(client.generate("abcdé", GREEDY | {"output_kind": "cumulative"}))
    texts = [chunk.text for chunk in cumulative]
    assert texts == sorted(texts)
    assert all(later.startswith(text) for text, later in itertools.pairwise(texts))
    assert all(len(chunk.token_ids) >= len(chunk.text) for chunk in cumulative)
    (final,) = client.generate("abcdé", GREEDY | {"output_kind": "final_only"})
    for whole in (final, cumulative[-1], join(delta)):
        assert (whole.text, whole.token_ids) == ("abcdé", final.token_ids)
        assert whole.usage == final.usage
    for kind in ("delta", "cumulative", "final_only"):
        assert client.generate_text("abcdé", GREEDY | {"output_kind": kind}).text == "abcdé"


def test_the_kinds_of_events(http):
    for url, body in (
        ("/v1/completions", {"prompt": ["abc", "de"]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "abc"}]}),
    ):
        plain = http.post(url, json=body).json()["choices"]
        whole = {choice["index"]: choice.get("text") or choice["message"]["content"] for choice in plain}
        final = events_of(http.post(url, json=body | {"stream": True, "output_kind": "final_only"}).text)
        assert texts_of(final) == whole
        assert len(final) == len(whole) + 1
        for choice in http.post(url, json=body | {"output_kind": "cumulative"}).json()["choices"]:
            assert (choice.get("text") or choice["message"]["content"]) == whole[choice["index"]]


def test_token_ids_alone(http, client):
    found = client.generate_text("abc", GREEDY | {"detokenize": False})
    assert (found.text, len(found.token_ids)) == ("", 4)
    body = {"prompt": "abc", "detokenize": False, "return_token_ids": True}
    (choice,) = http.post("/v1/completions", json=body).json()["choices"]
    assert (choice["text"], tuple(choice["token_ids"])) == ("", found.token_ids)


def test_a_prompt_is_truncated_only_where_that_is_asked_for(server, client):
    before = len(server.engine.requests)
    found = client.generate_text("abcdef", GREEDY | {"truncate_prompt_tokens": 3})
    assert found.text == "def"
    assert (found.usage.prompt_tokens, found.usage.truncated_tokens) == (3, 4)  # <bos> too
    whole = client.generate_text("abcdef", GREEDY)
    assert (whole.usage.prompt_tokens, whole.usage.truncated_tokens) == (7, 0)
    first, second = server.engine.requests[before:]
    assert first.prompt_token_ids == second.prompt_token_ids[-3:]


def test_a_text_far_too_long_is_truncated_and_others_are_refused_unread(client):
    found = client.generate_text(LONG, GREEDY | {"truncate_prompt_tokens": 6, "max_tokens": 7})
    assert found.text == "vwxyz "
    assert found.usage.truncated_tokens == len(LONG) + 1 - 6
    with pytest.raises(Exception, match=r"bytes, at least \d+ tokens"):
        client.generate_text(LONG, GREEDY)


def test_usage_tells_of_truncation_where_there_is_some(http):
    def usage(**body):
        return http.post("/v1/completions", json={"prompt": "abcdef", **body}).json()["usage"]

    assert usage(truncate_prompt_tokens=3)["prompt_tokens_details"] == {"cached_tokens": 1, "truncated_tokens": 4}
    assert usage()["prompt_tokens_details"] == {"cached_tokens": 1}
    # As many as there is room for in the context of 512 tokens and the pool of 256.
    long = usage(prompt=[BOS_ID] + [70] * 400, truncate_prompt_tokens=-1, max_tokens=6)
    assert (long["prompt_tokens"], long["completion_tokens"]) == (251, 6)


def test_defaults_of_the_checkpoint_reach_the_engine(server, client, http):
    before = len(server.engine.requests)
    client.generate_text("x" * 100)
    client.generate_text("x" * 100, {"temperature": 1.0})
    client.generate_text("x" * 100, {"top_k": 0, "max_tokens": 40})
    http.post("/v1/completions", json={"prompt": "x" * 100})
    http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "x"}], "top_k": -1})
    requests = server.engine.requests[before:]
    assert [(one.temperature, one.top_k, one.max_tokens) for one in requests] == [
        (0.5, 20, 30), (1.0, 20, 30), (0.5, 0, 40), (0.5, 20, 30), (0.5, 0, 30),
    ]  # fmt: skip
    # A prompt that leaves less room: no error, unless a number is asked for.
    assert client.generate_text([70] * 250).usage.output_tokens == 7
    with pytest.raises(Exception, match="together 280 exceed the page pool of 256 tokens"):
        client.generate_text([70] * 250, {"max_tokens": 30})
