"""instructor: JSON in Markdown, JSON, JSON by schema, and tools. `python instructor_client.py URL MODEL`."""

import importlib.metadata
import sys
from typing import Annotated

import instructor
import openai
import pydantic


class Person(pydantic.BaseModel):
    """What the model is asked for."""

    name: Annotated[str, pydantic.Field(max_length=8)]
    age: Annotated[int, pydantic.Field(ge=0, le=120)]


if __name__ == "__main__":
    url, model = sys.argv[1:]
    print("instructor", importlib.metadata.version("instructor"))
    failed = []
    for mode in (
        instructor.Mode.JSON_SCHEMA,
        instructor.Mode.TOOLS,
        instructor.Mode.TOOLS_STRICT,
        instructor.Mode.MD_JSON,
    ):
        client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="none", max_retries=0), mode=mode)
        messages = [{"role": "user", "content": "json: name: kim, age: 12"}]
        try:
            found = client.chat.completions.create(
                model=model, messages=messages, response_model=Person, max_retries=0, temperature=0, max_tokens=200
            )
            print(f"{mode.name}:", found)
        except Exception as error:  # what it says is what this script shows
            print(f"{mode.name}:", type(error).__name__, " ".join(str(error).split())[:300])
            failed.append(mode)
    # A model of this size does not write JSON in Markdown unless a grammar makes it.
    sys.exit(bool(set(failed) - {instructor.Mode.MD_JSON}))
