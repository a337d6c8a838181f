"""pydantic-ai: an agent without tools, whole and streamed. `python pydantic_ai_client.py URL MODEL`."""

import asyncio
import importlib.metadata
import sys

from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


async def streamed(agent: Agent) -> None:
    async with agent.run_stream("count: 7 to 11") as result:
        print("stream:", [text async for text in result.stream_text(debounce_by=None)][-1])


if __name__ == "__main__":
    url, model = sys.argv[1:]
    print("pydantic-ai", importlib.metadata.version("pydantic-ai-slim"))
    served = OpenAIChatModel(model, provider=OpenAIProvider(base_url=url, api_key="none"))
    agent = Agent(served, instructions="Be brief.", model_settings={"temperature": 0})
    result = agent.run_sync("reverse: stressed")
    print("run:", result.output, result.usage)
    asyncio.run(streamed(agent))
