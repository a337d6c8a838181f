"""Log-probabilities over HTTP, in OpenAI's and vLLM's shapes. The engine's are -position - id / 256."""

from __future__ import annotations

import json

import httpx
import pytest

from jaxserve.models.tiny.tiny_tokenizer import BOS_ID, EOS_ID
from tests.server.http.http_harness import JSON, events_of

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def http(server):
    with httpx.Client(base_url=server.url, headers=JSON, timeout=60) as client:
        yield client


def answer(http, url="/v1/completions", **body):
    response = http.post(url, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def ids(text: str) -> list[int]:
    return [byte + 3 for byte in text.encode()]


def value(position: int, token: int) -> float:
    return -position - token / 256


def text_of(tokenizer, token: int) -> str:
    return tokenizer.decode([token], skip_special_tokens=False)


def test_a_completion_has_openais_lists(http, chat_tokenizer):
    (choice,) = answer(http, prompt="abc", temperature=0, logprobs=2)["choices"]
    tokens = [*ids("abc"), EOS_ID]
    found = choice["logprobs"]
    assert found["tokens"] == ["a", "b", "c", text_of(chat_tokenizer, EOS_ID)]
    assert found["token_logprobs"] == [value(4 + place, token) for place, token in enumerate(tokens)]
    assert found["text_offset"] == [0, 1, 2, 3]
    first, second = text_of(chat_tokenizer, 0), text_of(chat_tokenizer, 1)
    for place, (token, top) in enumerate(zip(tokens, found["top_logprobs"], strict=True), start=4):
        own = text_of(chat_tokenizer, token)
        assert top == {own: value(place, token), first: value(place, 0), second: value(place, 1)}
    assert "prompt_logprobs" not in choice


def test_a_chat_has_openais_entries(http, chat_tokenizer):
    body = answer(http, "/v1/chat/completions", messages=CHAT, max_tokens=2, logprobs=True, top_logprobs=1)
    (choice,) = body["choices"]
    prompt = 1 + len("hi\n")
    assert choice["logprobs"] == {
        "content": [
            {
                "token": letter,
                "logprob": value(prompt + place, ids(letter)[0]),
                "bytes": list(letter.encode()),
                "top_logprobs": [
                    {
                        "token": text_of(chat_tokenizer, 0),
                        "logprob": value(prompt + place, 0),
                        "bytes": list(chat_tokenizer.token_bytes(0)),
                    }
                ],
            }
            for place, letter in enumerate("hi")
        ]
    }
    (choice,) = answer(http, "/v1/chat/completions", messages=CHAT, max_tokens=1, logprobs=True)["choices"]
    assert choice["logprobs"]["content"][0]["top_logprobs"] == []
    (choice,) = answer(http, "/v1/chat/completions", messages=CHAT, max_tokens=1, logprobs=False)["choices"]
    assert choice["logprobs"] is None


def test_tokens_of_parts_of_a_character_have_their_bytes(http):
    (choice,) = answer(
        http, "/v1/chat/completions", messages=[{"role": "user", "content": "🍏"}], max_tokens=4, logprobs=True
    )["choices"]
    assert bytes(byte for entry in choice["logprobs"]["content"] for byte in entry["bytes"]).decode() == "🍏"


def test_streams_have_the_same_as_whole_answers(http):
    asked = {"prompt": "abcabc", "temperature": 0, "logprobs": 1, "echo": True, "stop": ["ca"]}
    (whole,) = answer(http, **asked)["choices"]
    assert whole["text"] == "abcabcab"
    # The stop string cuts the text; the tokens up to the one that completes it are the output's.
    assert whole["logprobs"]["tokens"][7:] == ["a", "b", "c", "a"]
    joined: dict[str, list] = {}
    events = http.post("/v1/completions", json=asked | {"stream": True}).text
    for event in events_of(events)[:-1]:
        for name, part in (event["choices"][0]["logprobs"] or {}).items():
            joined.setdefault(name, []).extend(part)
    assert joined == whole["logprobs"]
    asked = {"messages": CHAT, "logprobs": True, "top_logprobs": 3}
    (whole,) = answer(http, "/v1/chat/completions", **asked)["choices"]
    events = events_of(http.post("/v1/chat/completions", json=asked | {"stream": True}).text)[:-1]
    entries = [one for event in events for one in (event["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert entries == whole["logprobs"]["content"]


def test_prompt_logprobs_are_vllms(http, chat_tokenizer):
    (choice,) = answer(http, prompt="ab", max_tokens=1, prompt_logprobs=1)["choices"]
    assert choice["logprobs"] is None
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    for place, (letter, found) in enumerate(zip("ab", rest, strict=True), start=1):
        token = ids(letter)[0]
        assert found == {
            str(token): {"logprob": value(place, token), "rank": token + 1, "decoded_token": letter},
            "0": {"logprob": value(place, 0), "rank": 1, "decoded_token": text_of(chat_tokenizer, 0)},
        }
    body = answer(http, "/v1/chat/completions", messages=CHAT, max_tokens=1, prompt_logprobs=0)
    assert [list(one or ()) for one in body["prompt_logprobs"]] == [[], *([str(token)] for token in ids("hi\n"))]
    (alone,) = answer(http, prompt=[5], max_tokens=1, prompt_logprobs=1)["choices"]
    assert alone["prompt_logprobs"] == [None]


def test_tokens_may_be_spelled_by_their_ids(http):
    (choice,) = answer(http, prompt="a", max_tokens=1, logprobs=1, return_tokens_as_token_ids=True)["choices"]
    token = ids("a")[0]
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}"]
    assert choice["logprobs"]["top_logprobs"] == [{f"token_id:{token}": value(2, token), "token_id:0": value(2, 0)}]


# ---- lm-eval's local-completions -------------------------------------------------------------------------------------


def loglikelihoods(body: dict, context_lengths: list[int]) -> list[tuple[float, bool]]:
    """What lm-eval 0.4's `LocalCompletionsAPI.parse_logprobs` reads of a response: of each choice, less the token that
    was generated, the sum of the continuation's values and whether each was the greatest of its position."""
    found = []
    for choice, length in zip(sorted(body["choices"], key=lambda one: one["index"]), context_lengths, strict=True):
        own = choice["logprobs"]["token_logprobs"][length:-1]
        top = choice["logprobs"]["top_logprobs"][length:-1]
        found.append((sum(own), all(one == max(others.values()) for one, others in zip(own, top, strict=True))))
    return found


def test_what_lm_eval_sends_is_answered_as_it_reads_it(http):
    prompts = [[BOS_ID, *ids("what is"), 7, 9], [BOS_ID, 0, 0, 0], [BOS_ID, *ids("x"), 0, 1]]
    body = answer(http, model="echo", prompt=prompts, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True)
    lengths = [8, 1, 2]
    exact = [
        (sum(value(place, token) for place, token in enumerate(prompt))
         - sum(value(place, token) for place, token in enumerate(prompt[:length])),
         all(token == 0 for token in prompt[length:]))
        for prompt, length in zip(prompts, lengths, strict=True)
    ]  # fmt: skip
    for (found, greedy), (wanted, is_greedy) in zip(loglikelihoods(body, lengths), exact, strict=True):
        assert found == pytest.approx(wanted)
        assert greedy is is_greedy
    for choice, prompt in zip(body["choices"], prompts, strict=True):
        assert len(choice["logprobs"]["tokens"]) == len(prompt) + 1
        assert choice["logprobs"]["token_logprobs"][0] is choice["logprobs"]["top_logprobs"][0] is None
        assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_no_token_at_all_may_be_asked_for_beside_the_prompt(http, stream):
    asked = {"prompt": "abc", "max_tokens": 0, "logprobs": 0, "echo": True, "stream": stream}
    response = http.post(
        "/v1/completions", json=asked | ({"stream_options": {"include_usage": True}} if stream else {})
    )
    if stream:
        *chunks, last, done = events_of(response.text)
        assert done == "[DONE]"
        texts = [chunk["choices"][0] for chunk in chunks]
        choice = texts[0] | {"text": "".join(one["text"] for one in texts)}
        choice["finish_reason"], usage = texts[-1]["finish_reason"], last["usage"]
        assert all(one["logprobs"] is None for one in texts[1:])
    else:
        (choice,), usage = response.json()["choices"], response.json()["usage"]
    assert (choice["text"], choice["finish_reason"]) == ("abc", "length")
    assert choice["logprobs"]["token_logprobs"] == [None, *(value(place, t) for place, t in enumerate(ids("abc"), 1))]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (4, 0)


@pytest.mark.parametrize(
    ("url", "body", "param", "message"),
    [
        ("", {"logprobs": 21}, "logprobs", "logprobs is 21; this server returns at most max_logprobs 20 ids"),
        ("", {"logprobs": -2}, "logprobs", "logprobs is -2; it must be from -1 to 2147483647"),
        ("", {"logprobs": 1.5}, "logprobs", "logprobs is 1.5; it must be a whole number"),
        ("", {"logprobs": True}, "logprobs", "logprobs is True; it must be a whole number"),
        ("", {"prompt_logprobs": 21}, "prompt_logprobs", "prompt_logprobs is 21; this server returns at most"),
        ("", {"prompt_logprobs": "all"}, "prompt_logprobs", "prompt_logprobs is 'all'; it must be a whole"),
        ("", {"top_logprobs": 2}, "top_logprobs", "top_logprobs is 2; only 0 is supported"),
        ("", {"max_tokens": 0}, "max_tokens", "max_tokens is 0; it must be from 1"),
        ("", {"max_tokens": False, "echo": True}, "max_tokens", "max_tokens is False; it must be a whole"),
        ("", {"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "prompt_logprobs is 1; a stream does"),
        ("chat/", {"top_logprobs": 3}, "top_logprobs", "top_logprobs is 3; it needs logprobs"),
        ("chat/", {"logprobs": 3}, "logprobs", "logprobs is 3; it must be true or false"),
        ("chat/", {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "top_logprobs is 21; this server"),
        ("chat/", {"logprobs": True, "top_logprobs": 2.5}, "top_logprobs", "top_logprobs is 2.5; it must be"),
        ("chat/", {"logprobs": True, "top_logprobs": -2}, "top_logprobs", "top_logprobs is -2; it must be from -1"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(http, url, body, param, message):
    asked = {"messages": CHAT} if url.startswith("chat") else {"prompt": "abc"}
    response = http.post(f"/v1/{url}completions", json=asked | body)
    error = json.loads(response.text)["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert error["message"].startswith(message)
