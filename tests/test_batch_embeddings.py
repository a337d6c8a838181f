"""Lines of a batch that ask for embeddings, beside those that generate."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from tests.batch_helpers import chat, line, run
from tests.frontend.fakes import RuleEngine
from tests.frontend.tokenizers_for_tests import load


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load(tmp_path_factory.mktemp("tokenizer"))


def embed(custom_id, given, **body):
    return line(custom_id, "/v1/embeddings", input=given, **body)


def unit(*values):
    return np.array(values) / np.linalg.norm(values)


def test_embeddings_beside_completions(tmp_path, tokenizer):
    lines = [
        embed("one", [5, 6, 7, 8, 9], model="other"),
        line("text", prompt="hi", temperature=0),
        embed("many", [[5, 6, 7, 8], [9, 9, 9, 9, 1]], encoding_format="base64", dimensions=2),
        embed("mean", "abcdef", pooling_type="MEAN", normalize=False),
        line("ids", prompt=[5, 6]),
    ]
    engine = RuleEngine()
    summary, out = run(tmp_path, lines, tokenizer, engine)
    assert (summary.completed, summary.errors) == (5, 0)
    body = out["one"]["response"]["body"]
    assert (body["object"], body["model"], body["id"]) == ("list", "fake", "embd-1")
    assert body["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    np.testing.assert_allclose(body["data"][0]["embedding"], unit(5, 6, 7, 8), rtol=1e-6)
    many = out["many"]["response"]["body"]
    assert [one["index"] for one in many["data"]] == [0, 1]
    for one, expected in zip(many["data"], (unit(5, 6), unit(9, 9)), strict=True):
        np.testing.assert_allclose(np.frombuffer(base64.b64decode(one["embedding"]), "<f4"), expected, rtol=1e-6)
    assert many["usage"]["total_tokens"] == 9
    ids = tokenizer.encode("abcdef")
    assert out["mean"]["response"]["body"]["data"][0]["embedding"] == ids[:4]
    assert out["text"]["response"]["body"]["choices"][0]["text"] == "hi"
    assert {request.pooling.value for request in engine.requests if request.pooling} == {"last", "mean"}


def test_faulty_lines(tmp_path, tokenizer):
    lines = [
        embed("empty", []),
        embed("late", [5], deadline=1.0),
        embed("format", [5], encoding_format="hex"),
        embed("wide", [5], dimensions=5),
        embed("failing", [[5], [0], [6]]),  # the engine fails at token 0
        embed("many", ["a"] * 2049),
        line("url", "/v1/score", text_1="a", text_2="b"),
        embed("good", [[5, 1, 1, 1], [6, 1, 1, 1]]),
        chat("chat", [{"role": "user", "content": "x"}]),
    ]
    summary, out = run(tmp_path, lines, tokenizer)
    errors = {key: one["error"]["message"] for key, one in out.items() if one["error"]}
    assert summary.completed == 1
    assert "input is an empty list" in errors["empty"]
    assert "before the request arrived" in errors["late"]
    assert "encoding_format is 'hex'; it must be one of float, base64" in errors["format"]
    assert "dimensions is 5; the model's embeddings have 4" in errors["wide"]
    assert "logits are not finite" in errors["failing"]
    assert "input has 2049 inputs; at most 2048" in errors["many"]
    assert "it must be one of /v1/completions, /v1/chat/completions, /v1/embeddings" in errors["url"]
    assert "chat" in errors  # the tokenizer has no template
    assert len(out["good"]["response"]["body"]["data"]) == 2


def test_resumed(tmp_path, tokenizer):
    engine = RuleEngine()
    run(tmp_path, [embed("a", [[5], [6]])], tokenizer, engine)
    summary, _ = run(tmp_path, [embed("a", [[5], [6]]), embed("b", [7])], tokenizer, engine)
    assert (summary.resumed, summary.completed) == (1, 1)
