"""OpenAI's client for Python, any major version: sync, async, streaming, completions and chats; prints what it gets.

Standard library and openai only. `python openai_python.py URL MODEL`.
"""

import asyncio
import json
import sys

import openai

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "reverse: stressed"}]
USAGE = {"include_usage": True}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "maximum": 120, "minimum": 0},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
TOOLS = [{"type": "function", "function": {"name": "save", "description": "Saves a person.", "parameters": PERSON}}]
ASK = [{"role": "user", "content": "json: name: kim, age: 12"}]


def sync(url: str, model: str) -> None:
    client = openai.OpenAI(base_url=url, api_key="none")
    print("models:", [found.id for found in client.models.list()])
    completion = client.completions.create(model=model, prompt=["add: 20+22\n", "sort: cab\n"], temperature=0, seed=1)
    print("completions:", [choice.text for choice in completion.choices], completion.usage.total_tokens)
    echoed = client.completions.create(model=model, prompt="add: 20+22\n", temperature=0, echo=True)
    print("echo:", repr(echoed.choices[0].text))
    ids = client.completions.create(model=model, prompt=[1, *completion_ids(url)], temperature=0)
    print("token ids:", ids.choices[0].text)
    chat = client.chat.completions.create(model=model, messages=CHAT, temperature=0, max_completion_tokens=20)
    print("chat:", chat.choices[0].message.content, chat.choices[0].finish_reason)
    stopped = client.chat.completions.create(model=model, messages=CHAT, temperature=0, stop="ss")
    print("stop:", stopped.choices[0].message.content)
    extra = client.chat.completions.create(model=model, messages=CHAT, extra_body={"top_k": 1, "min_tokens": 2})
    print("extra_body:", extra.choices[0].message.content)
    stream = client.completions.create(model=model, prompt="count: 7 to 11\n", temperature=0, stream=True)
    print("stream:", "".join(chunk.choices[0].text for chunk in stream))
    stream = client.chat.completions.create(
        model=model, messages=CHAT, temperature=0, stream=True, stream_options=USAGE
    )
    text, last = "", None
    for last in stream:
        text += "".join(choice.delta.content or "" for choice in last.choices)
    print("chat stream:", text, last.usage.completion_tokens)
    options(client, model)
    raw = client.chat.completions.with_raw_response.create(model=model, messages=CHAT, temperature=0)
    print("raw response:", raw.status_code, bool(raw.headers["x-request-id"]), raw.parse().choices[0].message.content)
    for fields in ({"temperature": -1}, {"n": 129}, {"model": "gpt-4"}):
        try:
            client.chat.completions.create(**({"model": model, "messages": CHAT} | fields))
        except openai.APIStatusError as error:
            print("error:", type(error).__name__, error.status_code, error.body["param"], "|", error.body["message"])


def options(client: openai.OpenAI, model: str) -> None:
    """Log-probabilities, several samples, formats, tools and embeddings."""
    found = client.completions.create(model=model, prompt="add: 20+22\n", temperature=0, logprobs=2, echo=True)
    logprobs = found.choices[0].logprobs
    print("logprobs:", logprobs.tokens[-3:], [round(value, 4) for value in logprobs.token_logprobs[-3:]])
    chat = client.chat.completions.create(model=model, messages=CHAT, temperature=0, logprobs=True, top_logprobs=2)
    first = chat.choices[0].logprobs.content[0]
    print("chat logprobs:", first.token, round(first.logprob, 4), [one.token for one in first.top_logprobs])
    several = client.completions.create(model=model, prompt="count: 7 to 11\n", n=3, temperature=1.0, seed=5)
    print("n:", [(choice.index, choice.text) for choice in several.choices], several.usage.prompt_tokens)
    stream = client.completions.create(
        model=model, prompt="count: 7 to 11\n", n=3, temperature=1.0, seed=5, stream=True
    )
    texts = ["", "", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    print("n, streamed:", texts == [choice.text for choice in several.choices])
    biased = client.completions.create(
        model=model,
        prompt="add: 20+22\n",
        temperature=0,
        logit_bias={"5": -100},
        presence_penalty=0.1,
        frequency_penalty=0.1,
    )
    print("bias and penalties:", biased.choices[0].text)
    shaped = client.chat.completions.create(model=model, messages=ASK, temperature=0, response_format=FORMAT)
    print("response_format:", json.loads(shaped.choices[0].message.content))
    stream = client.chat.completions.create(
        model=model, messages=ASK, temperature=0, response_format=FORMAT, stream=True
    )
    streamed = "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)
    print("response_format, streamed:", streamed == shaped.choices[0].message.content)
    for choice in ("required", {"type": "function", "function": {"name": "save"}}):
        called = client.chat.completions.create(
            model=model, messages=ASK, temperature=0, tools=TOOLS, tool_choice=choice, max_completion_tokens=200
        )
        call = called.choices[0].message.tool_calls[0].function
        print("tool call:", call.name, json.loads(call.arguments), called.choices[0].finish_reason)
        stream = client.chat.completions.create(
            model=model,
            messages=ASK,
            temperature=0,
            tools=TOOLS,
            tool_choice=choice,
            max_completion_tokens=200,
            stream=True,
        )
        parts = [part for chunk in stream for one in chunk.choices for part in one.delta.tool_calls or ()]
        name, arguments = parts[0].function.name, "".join(part.function.arguments or "" for part in parts)
        print("tool call, streamed:", (name, arguments) == (call.name, call.arguments))
    auto = client.chat.completions.create(model=model, messages=CHAT, temperature=0, tools=TOOLS, tool_choice="none")
    print("no call:", auto.choices[0].message.content)
    vectors = client.embeddings.create(model=model, input=["one", "two"]).data
    print("embeddings:", [len(one.embedding) for one in vectors])


def completion_ids(url: str) -> list[int]:
    """The ids of a prompt, by the server's own route."""
    client = openai.OpenAI(base_url=url.removesuffix("/v1"), api_key="none")
    found = client.post("/tokenize", body={"prompt": "copy: abc\n", "add_special_tokens": False}, cast_to=object)
    return found["tokens"]


async def concurrent(url: str, model: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:

        async def one(number: int) -> str:
            message = {"role": "user", "content": f"add: {number}+1"}
            stream = await client.chat.completions.create(model=model, messages=[message], temperature=0, stream=True)
            return "".join([choice.delta.content or "" async for chunk in stream for choice in chunk.choices])

        sums = await asyncio.gather(*(one(number) for number in range(10, 26)))
        print("16 async streams:", sums == [str(number + 1) for number in range(10, 26)])
        whole = await client.completions.create(model=model, prompt="reverse: stream\n", temperature=0)
        print("async:", whole.choices[0].text)


if __name__ == "__main__":
    print("openai", openai.__version__)
    sync(*sys.argv[1:])
    asyncio.run(concurrent(*sys.argv[1:]))
