"""Every way in which one line of a batch may be wrong: an error line each, and the others go on."""

import io

import pytest

from jaxserve.frontend import batch_lines
from jaxserve.frontend.batch_lines import count_lines, read_lines
from tests.batch_helpers import chat, line, run
from tests.frontend.tokenizers_for_tests import load


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load(tmp_path_factory.mktemp("tokenizer"))


HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("bad", "key", "code", "message"),
    [
        (
            b"{",
            None,
            "invalid_json",
            "line is no valid JSON: Expecting property name enclosed in double quotes: line 1",
        ),
        (b"[" * 100_000, None, "invalid_json", "line is no valid JSON: "),
        (b'{"a": ' + b"1" * 5000 + b"}", None, "invalid_json", "line is no valid JSON: Exceeds the limit"),
        (b'{"custom_id": "\xff"}', None, "invalid_utf8", "line is no valid UTF-8 at byte 15"),
        (b"\0", None, "invalid_json", "line is no valid JSON: Expecting value"),
        ([], None, "invalid_line", "line is a list; it must be a JSON object"),
        (b"null", None, "invalid_line", "line is null; it must be a JSON object"),
        ({"method": "POST"}, None, "missing_custom_id", "line has no custom_id"),
        (line(7, prompt="x"), None, "invalid_custom_id", "custom_id must be text of 1 to 256 characters"),
        (line("", prompt="x"), None, "invalid_custom_id", "custom_id must be text of 1 to 256 characters"),
        (
            line("malformed-line-1", prompt="x"),
            None,
            "invalid_custom_id",
            "custom_id begins with 'malformed-line-', which is kept for error lines",
        ),
        (line("good", prompt="x"), None, "duplicate_custom_id", "custom_id 'good' was used by an earlier line"),
        (line("b", prompt="x") | {"method": "GET"}, "b", "invalid_method", "method is 'GET'; it must be 'POST'"),
        (
            line("b", "/v1/responses", input="x"),
            "b",
            "invalid_url",
            "url is '/v1/responses'; it must be one of /v1/completions, /v1/chat/completions, /v1/embeddings",
        ),
        (line("b") | {"body": "x"}, "b", "invalid_line", "body is text; it must be a JSON object"),
        (
            {"custom_id": "b", "method": "POST", "url": "/v1/completions"},
            "b",
            "invalid_line",
            "body is null; it must be",
        ),
        (
            line("b", prompt="x") | {"Body": {}},
            "b",
            "invalid_line",
            "line has the unknown field 'Body'; did you mean body?",
        ),
        (line("b"), "b", "invalid_request", "body has no prompt"),
        (line("b", prompt=None), "b", "invalid_request", "body has no prompt"),
        (line("b", prompt=""), "b", "invalid_request", "prompt is empty; at least one token is needed"),
        (line("b", prompt=[]), "b", "invalid_request", "prompt is empty; at least one token is needed"),
        (
            line("b", prompt=["x", "y"]),
            "b",
            "invalid_request",
            "prompt is a list of 2 prompts; send one prompt a request",
        ),
        (
            line("b", prompt={}),
            "b",
            "invalid_request",
            "prompt is of type dict; it must be text or a list of token ids",
        ),
        (line("b", prompt=[5, 300]), "b", "invalid_request", "prompt_token_ids[1] is 300; token ids must be whole"),
        (
            b'{"custom_id": "b", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a\\ud800"}}',
            "b",
            "invalid_request",
            "prompt has a lone surrogate at character 1; text must be valid Unicode",
        ),
        (
            line("b", prompt="x", max_tokens=600),
            "b",
            "invalid_request",
            "prompt has 2 tokens and max_tokens is 600; together 602 exceed max_model_len 512: lower max_tokens or",
        ),
        (
            line("b", prompt="x", max_tokens=0),
            "b",
            "invalid_request",
            "max_tokens is 0; it must be from 1 to 2147483647",
        ),
        (line("b", prompt="x", max_tokens="5"), "b", "invalid_request", "max_tokens is '5'; it must be a whole number"),
        (
            line("b", prompt="x", temperature=float("nan")),
            "b",
            "invalid_request",
            "temperature is nan; it must be a finite number",
        ),
        (
            line("b", prompt="x", temperature=10**400),
            "b",
            "invalid_request",
            "temperature is a whole number of 1329 bits",
        ),
        (line("b", prompt="x", stop=7), "b", "invalid_request", "stop is 7; it must be text or a list of texts"),
        (line("b", prompt="x", stop=""), "b", "invalid_request", "stop has ''; each stop must be a string of at least"),
        (line("b", prompt="x", stop=[7]), "b", "invalid_request", "stop has 7; each stop must be a string of at least"),
        (
            line("b", prompt="x", stop_token_ids=7),
            "b",
            "invalid_request",
            "stop_token_ids is 7; it must be a list of token ids",
        ),
        (line("b", prompt="x", ignore_eos=1), "b", "invalid_request", "ignore_eos is 1; it must be true or false"),
        (line("b", prompt="x", model=7), "b", "invalid_request", "model is 7; it must be text"),
        (line("b", prompt="x", n=129), "b", "invalid_request", "n is 129; at most 128 samples of one request are"),
        (line("b", prompt="x", n=True), "b", "invalid_request", "n is True; it must be a whole number"),
        (
            line("b", prompt="x", temprature=0),
            "b",
            "invalid_request",
            "body has the unknown field 'temprature'; did you mean temperature?",
        ),
        (line("b", prompt=[5, 0]), "b", "request_failed", "logits are not finite"),
        (chat("b", []), "b", "invalid_request", "messages must be a list of at least one message"),
        (chat("b", ["hi"]), "b", "invalid_request", "messages[0] is of type str; it must be an object"),
        (chat("b", [{"role": "user"}]), "b", "invalid_request", "messages[0].content must be text"),
        (
            chat("b", [HI[0] | {"tool": 1}]),
            "b",
            "invalid_request",
            "messages[0] has the unknown field 'tool'; known are",
        ),
        (
            chat("b", HI, max_tokens=1, max_completion_tokens=1),
            "b",
            "invalid_request",
            "max_tokens and max_completion_tokens are the same; give one of them",
        ),
    ],
)
def test_a_bad_line_becomes_an_error_line_and_stops_nothing(tmp_path, tokenizer, bad, key, code, message):
    lines = [line("good", prompt="x"), bad, line("after", prompt="y")]
    for _ in range(2):  # again: nothing is computed twice, and the error stays
        summary, out = run(tmp_path, lines, tokenizer)
        assert len(out) == 3
        error = out.pop(key or "malformed-line-2")
        assert (error["id"], error["response"]) == ("batch_req_2", None)
        assert error["error"]["code"] == code
        assert error["error"]["message"].startswith(f"line 2: {message}")
        assert "\n" not in error["error"]["message"]
        assert all(result["error"] is None for result in out.values())
    assert str(summary) == "3 lines: 0 completed, 0 errors, 3 done before"


def test_a_bad_line_with_a_used_custom_id_does_not_take_its_place(tmp_path, tokenizer):
    bad = line("a", prompt="x") | {"method": "GET"}
    _, out = run(tmp_path, [line("a", prompt="x"), bad], tokenizer)
    assert out["a"]["error"] is None
    assert out["malformed-line-2"]["error"]["code"] == "invalid_method"


def test_without_a_tokenizer(tmp_path):
    lines = [line("text", prompt="x"), line("ids", prompt=[5]), chat("chat", HI)]
    _, out = run(tmp_path, lines)
    assert out["text"]["error"]["message"] == (
        "line 1: prompt is text, and this server has no tokenizer; send prompt_token_ids"
    )
    assert out["ids"]["response"]["body"]["choices"][0]["token_ids"] == [5, 2]
    assert out["chat"]["error"]["message"] == (
        "line 3: messages need a tokenizer, and this server has none; send a prompt of token ids"
    )


def test_a_line_that_is_too_long(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(batch_lines, "MAX_LINE_BYTES", 200)
    lines = [line("a", prompt="x"), line("b", prompt="x" * 1000), line("c", prompt="y")]
    _, out = run(tmp_path, lines, tokenizer)
    assert out["malformed-line-2"]["error"] == {
        "code": "line_too_long",
        "message": "line 2: line has more than 200 bytes",
    }
    assert out["a"]["error"] is out["c"]["error"] is None


@pytest.mark.parametrize("length", range(195, 206))
def test_long_lines_are_still_lines(monkeypatch, length):
    monkeypatch.setattr(batch_lines, "MAX_LINE_BYTES", 200)
    file = io.BytesIO(b"x" * length + b"\nnext\n")
    (first, second) = read_lines(file)
    assert (first[0], second) == (1, (2, b"next"))
    assert (len(first[1]) > 200) == (length > 200)
    file.seek(0)
    assert count_lines(file) == 2
