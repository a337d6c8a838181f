"""instructor in the mode that asks for JSON in Markdown, which needs no response_format; and in JSON mode, which does.

`python instructor_client.py URL MODEL`.
"""

import importlib.metadata
import sys

import instructor
import openai
import pydantic


class Person(pydantic.BaseModel):
    """What the model is asked for."""

    name: str
    age: int


if __name__ == "__main__":
    url, model = sys.argv[1:]
    print("instructor", importlib.metadata.version("instructor"))
    for mode in (instructor.Mode.MD_JSON, instructor.Mode.JSON, instructor.Mode.TOOLS):
        client = instructor.from_openai(openai.OpenAI(base_url=url, api_key="none", max_retries=0), mode=mode)
        messages = [{"role": "user", "content": "json: name: kim, age: 12"}]
        try:
            found = client.chat.completions.create(
                model=model, messages=messages, response_model=Person, max_retries=0, temperature=0
            )
            print(f"{mode.name}:", found)
        except Exception as error:  # what it says is what this script shows
            print(f"{mode.name}:", type(error).__name__, " ".join(str(error).split())[:300])
