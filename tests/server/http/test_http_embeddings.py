"""Embeddings and scores over HTTP: OpenAI's own client, vLLM's shapes, many inputs, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import dataclasses

import numpy as np
import openai
import pytest

from jaxserve.config.http_config import HttpConfig
from jaxserve.request import EngineRequest, Pooling
from tests.engine_ready import changed
from tests.server.fakes import EMBEDDING_SIZE, READY, EchoEngine, pooled
from tests.server.http.http_harness import error_of, run_http, until


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def expected(tokenizer, text, kind=Pooling.LAST, dimensions=None, normalize=True) -> np.ndarray:
    ids = tuple(tokenizer.encode(text)) if isinstance(text, str) else tuple(text)
    request = dataclasses.replace(EngineRequest("", ids, max_tokens=1), pooling=kind)
    vector = np.frombuffer(pooled(request), np.float64)[:dimensions]
    return vector / np.linalg.norm(vector) if normalize else vector


def test_the_client_of_openai(client, chat_tokenizer):
    found = client.embeddings.create(model="echo", input="hello")  # asks for base64, and decodes it
    np.testing.assert_allclose(found.data[0].embedding, expected(chat_tokenizer, "hello"), rtol=1e-6)
    assert (found.object, found.model, found.data[0].index) == ("list", "echo", 0)
    assert found.usage.prompt_tokens == found.usage.total_tokens == len(chat_tokenizer.encode("hello"))
    floats = client.embeddings.create(model="echo", input="hello", encoding_format="float")
    assert floats.data[0].embedding == found.data[0].embedding
    few = client.embeddings.create(model="echo", input=["hello", "abc"], dimensions=110, user="me")
    for text, one in zip(("hello", "abc"), few.data, strict=True):
        np.testing.assert_allclose(one.embedding, expected(chat_tokenizer, text, dimensions=110), rtol=1e-6)
    for inputs in ([5, 6, 7], [[5, 6, 7], [8]]):
        ids = client.embeddings.create(model="echo", input=inputs)
        lists = inputs if isinstance(inputs[0], list) else [inputs]
        for given, one in zip(lists, ids.data, strict=True):
            np.testing.assert_allclose(one.embedding, expected(chat_tokenizer, given), rtol=1e-6)
    extra = {"pooling_type": "mean", "normalize": False, "truncate_prompt_tokens": 2}
    mean = client.embeddings.create(model="echo", input="hello", extra_body=extra)
    wanted = expected(chat_tokenizer, chat_tokenizer.encode("hello")[-2:], Pooling.MEAN, normalize=False)
    np.testing.assert_allclose(mean.data[0].embedding, wanted, rtol=1e-6)
    truncated = len(chat_tokenizer.encode("hello")) - 2
    assert mean.usage.model_dump()["prompt_tokens_details"] == {"truncated_tokens": truncated}
    with pytest.raises(openai.BadRequestError, match="dimensions is 161; the model's embeddings have 160"):
        client.embeddings.create(model="echo", input="hello", dimensions=EMBEDDING_SIZE + 1)


@pytest.mark.parametrize("names", [("text_1", "text_2"), ("queries", "documents")])
@pytest.mark.parametrize("url", ["/v1/score", "/score"])
def test_scores(names, url, chat_tokenizer):
    async def test(served):
        for first, second in (("hello", "hello"), ("hello", ["help", "zzz"]), (["ab", "cd"], ["abc", "x"])):
            answer = await served.client.post(url, json={names[0]: first, names[1]: second, "model": "echo"})
            assert answer.status_code == 200, answer.text
            body = answer.json()
            firsts, seconds = ([one] if isinstance(one, str) else one for one in (first, second))
            firsts = firsts * len(seconds) if len(firsts) == 1 else firsts
            cosines = [
                expected(chat_tokenizer, one) @ expected(chat_tokenizer, other)
                for one, other in zip(firsts, seconds, strict=True)
            ]
            np.testing.assert_allclose([one["score"] for one in body["data"]], cosines, atol=1e-6)
            assert [one["index"] for one in body["data"]] == list(range(len(seconds)))
            assert body["usage"]["prompt_tokens"] > 0

    run_http(test, chat_tokenizer)


BAD = [
    ({}, "body has no input"),
    ({"input": ""}, "input is empty; at least one token is needed"),
    ({"input": []}, "input is an empty list"),
    ({"input": ["a", ""]}, "input[1] is empty"),
    ({"input": ["a", 5]}, "input[1] is 5; an input is a text or a list of token ids"),
    ({"input": {"a": 1}}, "input is of type dict"),
    ({"input": [512]}, "prompt_token_ids[0] is 512; token ids must be whole numbers from 0 to 511"),
    ({"input": [-1]}, "prompt_token_ids[0] is -1"),
    ({"input": [True]}, "prompt_token_ids[0] is True"),
    ({"input": [5] * 513}, "prompt has 513 tokens; at most max_model_len 512 are allowed"),
    ({"input": [5] * 300}, "exceed the page pool of 256 tokens"),
    ({"input": "a", "dimensions": 0}, "dimensions is 0; it must be a whole number from 1"),
    ({"input": "a", "dimensions": 1.5}, "dimensions is 1.5"),
    ({"input": "a", "encoding_format": "hex"}, "encoding_format is 'hex'; it must be one of float, base64"),
    ({"input": "a", "encoding_format": ["float"]}, "encoding_format is ['float']"),
    ({"input": "a", "pooling_type": "MAX"}, "pooling_type is 'MAX'; it must be one of LAST, MEAN, CLS"),
    ({"input": "a", "pooling_type": 1}, "pooling_type is 1"),
    ({"input": "a", "normalize": 1}, "normalize is 1; it must be true or false"),
    ({"input": "a", "normalize": True, "use_activation": True}, "normalize and use_activation are the same"),
    ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens is 0"),
    ({"input": "a", "truncate_prompt_tokens": 257}, "truncate_prompt_tokens is 257; the model takes at most 256"),
    ({"input": "a", "dimension": 5}, "unknown field 'dimension'; did you mean dimensions?"),
    ({"input": "a", "add_special_tokens": False}, "add_special_tokens is False; only true is supported"),
    ({"input": "a", "model": "gpt"}, "model 'gpt' is not served"),
    ({"input": ["a"] * 5}, "input has 5 inputs; at most 4 are allowed"),
    ({"input": "a", "priority": "high"}, "priority is 'high'"),
]
BAD_SCORES = [
    ({}, "text_1 and text_2, or queries and documents"),
    ({"text_1": "a"}, "text_1 and text_2, or queries and documents"),
    ({"text_1": "a", "documents": "b"}, "text_1 and text_2, or queries and documents"),
    ({"text_1": ["a", "b"], "text_2": ["a"]}, "text_1 has 2 inputs and text_2 1; it must have one, or as many"),
    ({"text_1": "a", "text_2": ["b"] * 4}, "text_1 and text_2 has 5 inputs; at most 4"),
    ({"text_1": "a", "text_2": []}, "text_2 is an empty list"),
]


def test_what_is_refused(chat_tokenizer):
    async def test(served):
        for url, cases in (("/v1/embeddings", BAD), ("/v1/score", BAD_SCORES)):
            for body, words in cases:
                answer = await served.client.post(url, json=body)
                assert answer.status_code in (400, 404), (body, answer.text)
                assert words in error_of(answer)["message"], body
        assert served.engine.requests == []
        assert (await served.client.post("/v1/embeddings", json={"input": "a"})).status_code == 200

    run_http(test, chat_tokenizer, config=HttpConfig(max_embedding_inputs=4))


def test_many_inputs_leave_others_their_places(chat_tokenizer):
    """300 inputs, though 8 run at once and 40 may be unfinished: no more than 8 are under way."""

    async def test(served):
        served.engine.pause()
        texts = [chr(97 + number % 26) * (1 + number % 9) for number in range(300)]
        body = {"input": texts, "encoding_format": "base64"}
        call = asyncio.ensure_future(served.client.post("/v1/embeddings", json=body))
        await served.until(served.engine.wait_for_requests, 8)
        other = asyncio.ensure_future(served.client.post("/v1/completions", json={"prompt": "hi", "temperature": 0}))
        await served.until(served.engine.wait_for_requests, 9)
        assert len(served.engine.requests) == 9
        served.engine.resume()
        assert (await other).json()["choices"][0]["text"] == "hi"
        data = (await call).json()["data"]
        assert [one["index"] for one in data] == list(range(300))
        for text, one in zip(texts, data, strict=True):
            found = np.frombuffer(base64.b64decode(one["embedding"]), "<f4")
            np.testing.assert_allclose(found, expected(chat_tokenizer, text), rtol=1e-6)

    run_http(test, chat_tokenizer)


def test_a_full_queue(chat_tokenizer):
    """Two may be unfinished: a call makes do with one place where another has the other, and none is an error."""

    async def test(served):
        served.engine.pause()
        first = asyncio.ensure_future(served.client.post("/v1/completions", json={"prompt": "hi"}))
        await served.until(served.engine.wait_for_requests, 1)
        call = asyncio.ensure_future(served.client.post("/v1/embeddings", json={"input": ["a", "b", "c"]}))
        await served.until(served.engine.wait_for_requests, 2)
        refused = await served.client.post("/v1/embeddings", json={"input": ["a", "b"]})
        assert refused.status_code == 429
        assert "retry-after" in refused.headers
        served.engine.resume()
        assert len((await call).json()["data"]) == 3
        await first

    run_http(test, chat_tokenizer, engine=EchoEngine(changed(READY, max_num_seqs=1, max_num_waiting=1)))


def test_a_client_that_leaves_aborts_all(chat_tokenizer):
    async def test(served):
        served.engine.pause()
        call = asyncio.ensure_future(served.client.post("/v1/embeddings", json={"input": ["a"] * 20}))
        await served.until(served.engine.wait_for_requests, 8)
        call.cancel()
        await until(lambda: served.frontend.num_open == 0)
        assert len(served.engine.requests) == 8

    run_http(test, chat_tokenizer)
