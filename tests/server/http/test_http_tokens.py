"""Token ids of texts and back, models, version, and the document that describes them."""

from __future__ import annotations

import random

import httpx
import msgspec
import pytest

import jaxserve
from jaxserve.config.id_checks import IDS_PER_PART
from jaxserve.frontend import tokenizer as tokenizer_module
from jaxserve.frontend.openai import CHAT_URL, COMPLETIONS_URL, field_names
from jaxserve.frontend.preparation_steps import finish
from jaxserve.sampling_params import SAMPLING_FIELDS
from jaxserve.serving.http_port.routes import tokens
from tests.server.http.http_harness import JSON

HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, headers=JSON, timeout=60) as client:
        yield client


def test_tokenize_and_detokenize(http, chat_tokenizer):
    ids = chat_tokenizer.encode("héllo")
    found = http.post("/tokenize", json={"model": "echo", "prompt": "héllo"}).json()
    assert found == {"count": len(ids), "max_model_len": 512, "tokens": ids, "token_strs": None}
    found = http.post("/tokenize", json={"prompt": "ab", "add_special_tokens": False, "return_token_strs": True}).json()
    assert found["token_strs"] == ["a", "b"]
    assert found["tokens"] == chat_tokenizer.encode("ab", add_special_tokens=False)
    assert http.post("/detokenize", json={"tokens": ids}).json() == {"prompt": "héllo"}
    assert http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == chat_tokenizer.encode("")


def test_tokenize_a_chat(http, chat_tokenizer):
    found = http.post("/tokenize", json={"messages": HI}).json()
    assert found["tokens"] == chat_tokenizer.encode("hi\n")
    found = http.post("/tokenize", json={"messages": HI, "add_generation_prompt": False}).json()
    assert found["tokens"] == chat_tokenizer.encode("hi")


def test_long_texts(http, chat_tokenizer):
    text = "0123456789" * 1000
    found = http.post("/tokenize", json={"prompt": text}).json()
    assert found["tokens"] == chat_tokenizer.encode(text)
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json()["prompt"] == text


@pytest.mark.parametrize("count", [0, 3, 2 * IDS_PER_PART])
def test_replies_in_parts_are_those_of_one_call(server, chat_tokenizer, monkeypatch, count):
    """With what JSON escapes, at every border of parts; the longest from a process of their own."""
    monkeypatch.setattr(tokenizer_module, "LONG_TEXT", 5000)
    monkeypatch.setattr(tokenizer_module, "LONG_IDS", 5000)
    ids = random.Random(count).choices(range(chat_tokenizer.vocab_size), k=count)
    text = chat_tokenizer._backend.decode(ids)
    answer = finish(tokens._detokenize_steps(chat_tokenizer, ids, chat_tokenizer.vocab_size))
    assert answer == msgspec.json.encode({"prompt": text})
    ids = chat_tokenizer._backend.encode(text).ids
    answer = finish(tokens._tokenize_steps(chat_tokenizer, text, tokens.parse_tokenize({"prompt": text}), 512))
    found = {"count": len(ids), "max_model_len": 512, "tokens": ids, "token_strs": None}
    assert answer == msgspec.json.encode(found)


def test_models_and_version(http):
    listed = http.get("/v1/models").json()
    (model,) = listed["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("echo", "model", 512)
    assert http.get("/v1/models/echo").json() == model
    assert http.get("/version").json() == {"version": jaxserve.__version__}


def test_the_document_has_every_field_of_every_body(http):
    document = http.get("/openapi.json").json()
    for url in (COMPLETIONS_URL, CHAT_URL):
        body = document["paths"][url]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert sorted(body["properties"]) == field_names(url)
        assert set(SAMPLING_FIELDS) < set(body["properties"])
        assert {"400", "401", "404", "413", "429", "503", "408"} < set(document["paths"][url]["post"]["responses"])
    known = set(document["components"]["schemas"])
    for path in document["paths"].values():
        for operation in path.values():
            for response in operation["responses"].values():
                content = response["content"]
                if "application/json" not in content:  # metrics, files
                    continue
                schema = content["application/json"]["schema"]
                assert schema["$ref"].removeprefix("#/components/schemas/") in known
