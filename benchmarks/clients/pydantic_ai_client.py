"""pydantic-ai: an agent, whole and streamed, and one whose output has a type, by a tool and by its schema.

`python pydantic_ai_client.py URL MODEL`.
"""

import asyncio
import importlib.metadata
import sys
from typing import Annotated

import pydantic
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Person(pydantic.BaseModel):
    """What the model is asked for."""

    name: Annotated[str, pydantic.Field(max_length=8)]
    age: Annotated[int, pydantic.Field(ge=0, le=120)]


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
    for output in (ToolOutput(Person), NativeOutput(Person)):
        typed = Agent(served, output_type=output, model_settings={"temperature": 0, "max_tokens": 200}, retries=0)
        print(f"{type(output).__name__}:", repr(typed.run_sync("json: name: kim, age: 12").output))
