"""Several samples of one request over HTTP: choices, streams, usage, and one that fails."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.server.http.http_harness import HttpServed, error_of, events_of, run_http, texts_of


def test_the_chunks_of_a_chat_begin_each_choice_with_its_role(server):
    asked = {"messages": [{"role": "user", "content": "hello"}], "n": 2, "stream": True, "max_tokens": 3}
    events = events_of(httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=60).text)
    assert texts_of(events) == {0: "hel", 1: "ell"}
    choices = [choice for event in events[:-1] for choice in event["choices"]]
    for index in (0, 1):
        mine = [choice for choice in choices if choice["index"] == index]
        assert [one["delta"].get("role") for one in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert [one["finish_reason"] for one in mine] == [None] * (len(mine) - 1) + ["length"]


def test_every_choice_echoes_its_prompt(tokenizer):
    async def body(served: HttpServed) -> None:
        asked = {"prompt": ["ab", [102, 103]], "n": 2, "echo": True, "return_token_ids": True}
        whole = (await served.client.post("/v1/completions", json=asked)).json()
        assert [choice["text"] for choice in whole["choices"]] == ["abab", "abb", "cdcd", "cdd"]
        assert [len(choice["token_ids"]) for choice in whole["choices"]] == [3, 2, 3, 2]
        streamed = await served.client.post("/v1/completions", json=asked | {"stream": True})
        assert texts_of(events_of(streamed.text)) == {0: "abab", 1: "abb", 2: "cdcd", 3: "cdd"}

    run_http(body, tokenizer)


@pytest.mark.parametrize("stream", [False, True])
def test_a_choice_that_fails_does_not_end_the_others(tokenizer, stream):
    async def body(served: HttpServed) -> None:
        served.engine.pause()
        asked = {"prompt": "abcd", "n": 3, "stream": stream}
        call = asyncio.ensure_future(served.client.post("/v1/completions", json=asked, headers={"x-request-id": "r"}))
        await served.until(served.engine.wait_for_requests, 1)
        served.engine.fail_request("r/1", "its logits are not finite")
        served.engine.resume()
        response = await call
        assert served.engine.aborted == [], "the others went on to their end"
        if not stream:
            assert response.status_code == 500
            assert error_of(response)["message"] == "its logits are not finite"
            return
        *events, last = [event for event in response.text.split("\n\n") if event]
        assert "its logits are not finite" in last
        assert texts_of(events_of("\n\n".join([*events, "data: [DONE]"]) + "\n\n")) == {0: "abcd", 2: "cd"}

    run_http(body, tokenizer)


def test_a_client_that_hangs_up_aborts_every_sample(tokenizer):
    async def body(served: HttpServed) -> None:
        served.engine.pause()
        served.engine.allow(1)
        asked = {"prompt": "abcd", "n": 3, "stream": True}
        async with served.client.stream(
            "POST", "/v1/completions", json=asked, headers={"x-request-id": "r"}
        ) as response:
            await anext(response.aiter_bytes())
        for name in ("r", "r/1", "r/2"):
            await served.until(served.engine.wait_for_abort, name)

    run_http(body, tokenizer)
