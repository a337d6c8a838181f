"""OpenAI's completion and chat completion bodies: requests in, response objects out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.frontend.offline import Completion
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.request import SamplingParams

COMPLETIONS_URL = "/v1/completions"
CHAT_URL = "/v1/chat/completions"
URLS = (COMPLETIONS_URL, CHAT_URL)

_OWNERSHIP = ("tenant", "priority", "deadline")
_SAMPLING = tuple(field.name for field in dataclasses.fields(SamplingParams))
_NEUTRAL: Mapping[str, Any] = {
    "n": 1,
    "best_of": 1,
    "stream": False,
    "echo": False,
    "logprobs": None,
    "suffix": None,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}
"""OpenAI's fields that are not supported, with the one value that asks for nothing."""


@dataclasses.dataclass(frozen=True)
class BodyRequest:
    """A parsed request body. prompt: text or token ids. model: the name that it asks for, None when it has none.
    ownership: of tenant, priority and deadline those that it has, which `FrontEnd.prepare` checks."""

    prompt: str | Sequence[int]
    params: SamplingParams
    model: str | None
    ownership: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def parse_body(url: str, body: Mapping[str, Any], tokenizer: Tokenizer | None) -> BodyRequest:
    """Reads the body of a request to one of URLS. A field that is null counts as absent.

    tenant, priority (higher is more urgent) and deadline (Unix seconds) are additions to OpenAI's, as in the gRPC API.
    A chat's messages become token ids by the tokenizer's chat template. Raises ValueError naming the field: unknown or
    unsupported fields, wrong types, values out of range.
    """
    fields = {name: value for name, value in body.items() if value is not None}
    own = "prompt" if url == COMPLETIONS_URL else "messages"
    allowed = {own, "model", *_SAMPLING, *_OWNERSHIP, *(("max_completion_tokens",) if url == CHAT_URL else ())}
    for name, value in fields.items():
        if name in _NEUTRAL:
            if value != _NEUTRAL[name] or isinstance(value, bool) != isinstance(_NEUTRAL[name], bool):
                raise ValueError(f"{name} is {value!r}; only {_NEUTRAL[name]} is supported")
        elif name not in allowed:
            raise ValueError(
                f"body has the unknown field {name!r}; known are {', '.join(sorted(allowed | set(_NEUTRAL)))}"
            )
    if own not in fields:
        raise ValueError(f"body has no {own}")
    model = fields.get("model")
    if model is not None and not isinstance(model, str):
        raise ValueError(f"model is {model!r}; it must be text")
    params = _parse_params(fields)
    prompt = _parse_prompt(fields[own]) if own == "prompt" else _parse_messages(fields[own], tokenizer)
    return BodyRequest(prompt, params, model, {name: fields[name] for name in _OWNERSHIP if name in fields})


def response_body(url: str, number: int, model: str, created: int, completion: Completion) -> dict[str, Any]:
    """The response object of a finished request; choices[0].token_ids are an addition to OpenAI's.

    number: makes the id. created: seconds since the epoch.
    """
    chat = url == CHAT_URL
    choice: dict[str, Any] = {"index": 0}
    if chat:
        choice["message"] = {"role": "assistant", "content": completion.text}
    else:
        choice["text"] = completion.text
    choice |= {
        "logprobs": None,
        "finish_reason": completion.finish_reason.value,
        "token_ids": list(completion.token_ids),
    }
    prompt_tokens, output_tokens = len(completion.prompt_token_ids), len(completion.token_ids)
    return {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{number}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [choice],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": prompt_tokens + output_tokens,
            "prompt_tokens_details": {"cached_tokens": completion.num_cached_tokens},
        },
    }


def _parse_params(fields: Mapping[str, Any]) -> SamplingParams:
    values = {name: fields[name] for name in _SAMPLING if name in fields}
    if "max_completion_tokens" in fields:
        if "max_tokens" in values:
            raise ValueError("max_tokens and max_completion_tokens are the same; give one of them")
        values["max_tokens"] = fields["max_completion_tokens"]
    stop = values.get("stop", "")
    if not isinstance(stop, str | list):
        raise ValueError(f"stop is {stop!r}; it must be text or a list of texts")
    if stop == "" and "stop" in values:
        raise ValueError("stop has ''; each stop must be a string of at least one character")
    if not isinstance(values.get("stop_token_ids", []), list):
        raise ValueError(f"stop_token_ids is {values['stop_token_ids']!r}; it must be a list of token ids")
    return SamplingParams(**values)


def _parse_prompt(prompt: Any) -> str | list[int]:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list):
        if any(isinstance(item, str | list) for item in prompt):
            raise ValueError(f"prompt is a list of {len(prompt)} prompts; send one prompt a request")
        return prompt
    raise ValueError(f"prompt is of type {type(prompt).__name__}; it must be text or a list of token ids")


def _parse_messages(messages: Any, tokenizer: Tokenizer | None) -> list[int]:
    if tokenizer is None:
        raise ValueError("messages need a tokenizer, and this server has none; send a prompt of token ids")
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of at least one message")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"messages[{index}] is of type {type(message).__name__}; it must be an object")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                raise ValueError(f"messages[{index}].{name} must be text")
        unknown = sorted(set(message) - {"role", "content", "name"})
        if unknown:
            raise ValueError(f"messages[{index}] has the unknown field {unknown[0]!r}; known are content, name, role")
    return tokenizer.encode_chat(messages)
