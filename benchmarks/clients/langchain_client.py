"""langchain-openai: chats and completions, whole, streamed and in batches. `python langchain_client.py URL MODEL`."""

import asyncio
import importlib.metadata
import sys

from langchain_openai import ChatOpenAI, OpenAI


async def asynchronous(chat: ChatOpenAI) -> None:
    print("astream:", "".join([str(part.content) async for part in chat.astream("reverse: stressed")]))


if __name__ == "__main__":
    url, model = sys.argv[1:]
    print("langchain-openai", importlib.metadata.version("langchain-openai"))
    chat = ChatOpenAI(base_url=url, api_key="none", model=model, temperature=0, stream_usage=True)
    answer = chat.invoke([("system", "Be brief."), ("human", "add: 20+22")])
    print("chat:", answer.content, answer.usage_metadata["total_tokens"])
    print("stream:", "".join(str(part.content) for part in chat.stream("count: 7 to 11")))
    print("batch:", [found.content for found in chat.batch(["sort: cab", "reverse: abc", "add: 1+2"])])
    print("completion:", OpenAI(base_url=url, api_key="none", model=model, temperature=0).invoke("copy: hello\n"))
    asyncio.run(asynchronous(chat))
