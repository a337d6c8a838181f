"""OpenAI's own client: sync, async, streaming, completions, chats, models and errors."""

from __future__ import annotations

import asyncio

import openai
import pytest

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_models(client):
    assert [model.id for model in client.models.list()] == ["echo"]
    assert client.models.retrieve("echo").id == "echo"


def test_completions_and_chats(client):
    completion = client.completions.create(model="echo", prompt=["one", "two"], max_tokens=10, extra_body={"top_k": 5})
    assert [choice.text for choice in completion.choices] == ["one", "two"]
    chat = client.chat.completions.create(model="echo", messages=MESSAGES, stop="o")
    assert chat.choices[0].message.content == "hell"
    assert chat.choices[0].finish_reason == "stop"
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens


def test_streams(client):
    with client.completions.create(model="echo", prompt="some text", stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == "some text"
    options = {"include_usage": True}
    *chunks, last = client.chat.completions.create(model="echo", messages=MESSAGES, stream=True, stream_options=options)
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "hello\n"
    assert last.usage.completion_tokens == 7


def test_several_samples(client):
    chat = client.chat.completions.create(model="echo", messages=MESSAGES, n=3, max_tokens=3)
    found = [(choice.index, choice.message.content, choice.finish_reason) for choice in chat.choices]
    assert found == [(0, "hel", "length"), (1, "ell", "length"), (2, "llo", "length")]
    assert chat.usage.completion_tokens == 9
    completion = client.completions.create(model="echo", prompt=["abcd", "wxyz"], n=2)
    assert [choice.text for choice in completion.choices] == ["abcd", "bcd", "wxyz", "xyz"]
    assert [choice.index for choice in completion.choices] == [0, 1, 2, 3]
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (2 * 5, 2 * (5 + 4))
    options = {"include_usage": True}
    with client.completions.create(
        model="echo", prompt=["abcd", "wxyz"], n=2, stream=True, stream_options=options
    ) as stream:
        texts, last = dict.fromkeys(range(4), ""), None
        for chunk in stream:
            for choice in chunk.choices:
                texts[choice.index] += choice.text
            last = chunk
    assert texts == {0: "abcd", 1: "bcd", 2: "wxyz", 3: "xyz"}
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (10, 18)


def test_the_helper_that_collects_a_stream(client):
    with client.chat.completions.stream(model="echo", messages=MESSAGES) as stream:
        events = [event.type for event in stream]
        assert stream.get_final_completion().choices[0].message.content == "hello\n"
    assert "content.delta" in events


def test_async(server):
    async def body():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            chats = [client.chat.completions.create(model="echo", messages=MESSAGES) for _ in range(8)]
            assert {chat.choices[0].message.content for chat in await asyncio.gather(*chats)} == {"hello\n"}
            stream = await client.completions.create(model="echo", prompt="abc", stream=True)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == "abc"

    asyncio.run(body())


def test_errors(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="echo", prompt="x", temperature=-1)
    assert (caught.value.param, caught.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.NotFoundError, match="model 'gpt' is not served"):
        client.completions.create(model="gpt", prompt="x")
    with pytest.raises(openai.BadRequestError, match="n is 2 and temperature is 0"):
        client.chat.completions.create(model="echo", messages=MESSAGES, n=2, temperature=0)
