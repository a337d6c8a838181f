"""Parses OpenAI's completion and chat completion bodies and builds response objects."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence, Set
from typing import Any

from jaxserve.config.shown import shown
from jaxserve.frontend.offline import FinishedRequest
from jaxserve.frontend.tokenizer import Tokenizer
from jaxserve.request import SAMPLING_FIELDS, RequestOptions, SamplingParams

COMPLETIONS_URL = "/v1/completions"
CHAT_URL = "/v1/chat/completions"
URLS = (COMPLETIONS_URL, CHAT_URL)

_OPTIONS = ("tenant", "priority", "deadline")
_SAMPLING = tuple(SAMPLING_FIELDS)
_NEUTRAL: Mapping[str, Sequence[Any]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "stream": (False,),
    "stream_options": ({"include_usage": False, "include_obfuscation": True},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "reasoning_effort": ("medium", "none"),  # the default of OpenAI's models before and since GPT-5.1
    "verbosity": ("medium",),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "prompt_cache_retention": ("in_memory", "in-memory"),
}
"""Unsupported OpenAI fields with the values that have no effect; null never has."""

_LABELS = ("user", "safety_identifier", "prompt_cache_key")
"""OpenAI's fields that label a request and do not affect its response."""

_NEUTRAL_IN_MESSAGE: Mapping[str, Sequence[Any]] = {
    "tool_calls": ([],),
    "function_call": (),
    "audio": (),
    "annotations": ([],),
}
_NEUTRAL_IN_PART: Mapping[str, Sequence[Any]] = {"annotations": ([],), "logprobs": ([],)}
"""Fields of an assistant's content part, as in OpenAI's responses."""

_MESSAGE_TEXTS = ("name", "refusal", "tool_call_id")
_PART_TEXTS = ("text", "refusal")


@dataclasses.dataclass(frozen=True)
class BodyRequest:
    """Holds a parsed request body.

    Attributes:
        prompt: text or token ids.
        model: the requested model name, None when it has none.
        options: its tenant, priority and deadline.
    """

    prompt: str | Sequence[int]
    params: SamplingParams
    model: str | None
    options: RequestOptions = RequestOptions()


def parse_body(url: str, body: Mapping[str, Any], tokenizer: Tokenizer | None) -> BodyRequest:
    """Parses the body of a request to one of URLS. A field that is null counts as absent.

    tenant, priority (higher is more urgent) and deadline (Unix seconds) are additions to OpenAI's, as in the gRPC API.
    A chat's messages become token ids by the tokenizer's chat template.

    Raises:
        ValueError: names the field: unknown fields, wrong types, values out of range, and unsupported fields that would
            change the response.
    """
    fields = {name: value for name, value in body.items() if value is not None}
    own = "prompt" if url == COMPLETIONS_URL else "messages"
    allowed = {own, "model", "metadata", *_LABELS, *_SAMPLING, *_OPTIONS}
    allowed |= {"max_completion_tokens"} if url == CHAT_URL else set()
    for name, value in fields.items():
        if name in _NEUTRAL:
            _check_neutral(name, value, _NEUTRAL[name])
        elif name not in allowed:
            raise ValueError(f"body has the unknown field {name!r}; {_hint(name, allowed | set(_NEUTRAL))}")
    for name in _LABELS:
        _check_text(name, fields.get(name, ""))
    metadata = fields.get("metadata", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"metadata is {shown(metadata)}; it must be an object whose values are texts")
    if own not in fields:
        raise ValueError(f"body has no {own}")
    model = fields.get("model")
    _check_text("model", fields.get("model", ""))
    params = _parse_params(fields)
    prompt = _parse_prompt(fields[own]) if own == "prompt" else _parse_messages(fields[own], tokenizer)
    options = RequestOptions(**{name: fields[name] for name in _OPTIONS if name in fields})
    return BodyRequest(prompt, params, model, options)


def response_body(url: str, number: int, model: str, created: int, completion: FinishedRequest) -> dict[str, Any]:
    """Builds the response object of a finished request; choices[0].token_ids is an addition to OpenAI's.

    Args:
        url: of the request, one of URLS.
        number: determines the id.
        model: name in the response.
        created: seconds since the epoch.
        completion: the finished request.
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
    """Parses a prompt; a list of one prompt is that prompt."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
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
    messages = [_parse_message(f"messages[{index}]", message) for index, message in enumerate(messages)]
    return tokenizer.encode_chat(messages)


def _parse_message(where: str, message: Any) -> dict[str, str]:
    """Converts a message for chat templates: role and content, and name and tool_call_id where present.

    The developer role is the system role under another name, which few templates support.
    """
    if not isinstance(message, dict):
        raise ValueError(f"{where} is of type {type(message).__name__}; it must be an object")
    fields = {name: value for name, value in message.items() if value is not None}
    for name, value in fields.items():
        if name in _NEUTRAL_IN_MESSAGE:
            _check_neutral(f"{where}.{name}", value, _NEUTRAL_IN_MESSAGE[name])
        elif name in _MESSAGE_TEXTS:
            _check_text(f"{where}.{name}", value)
        elif name not in ("role", "content"):
            known = {"role", "content", *_MESSAGE_TEXTS, *_NEUTRAL_IN_MESSAGE}
            raise ValueError(f"{where} has the unknown field {name!r}; {_hint(name, known)}")
    role, content, refusal = fields.get("role"), fields.get("content"), fields.get("refusal", "")
    if not isinstance(role, str):
        raise ValueError(f"{where}.role must be text")
    if refusal and role != "assistant":
        raise ValueError(f"{where}.refusal is {shown(refusal)}; only an assistant's message has one")
    if refusal and content:
        raise ValueError(f"{where} has content and a refusal; an assistant answers with one of them")
    if refusal or (role == "assistant" and content is None and "content" in message):
        content = refusal
    return {
        "role": "system" if role == "developer" else role,
        "content": _parse_content(f"{where}.content", content, role),
        **{name: fields[name] for name in ("name", "tool_call_id") if name in fields},
    }


def _parse_content(where: str, content: Any, role: str) -> str:
    """Returns the text of a message; its parts are joined by newlines."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ValueError(f"{where} must be text" + (", or a list of at least one part" if content == [] else ""))
    types = _PART_TEXTS if role == "assistant" else _PART_TEXTS[:1]
    texts = []
    for index, part in enumerate(content):
        if not isinstance(part, dict):
            raise ValueError(f"{where}[{index}] is of type {type(part).__name__}; it must be an object")
        kind = part.get("type")
        if kind not in types:
            raise ValueError(f"{where}[{index}].type is {shown(kind)}; only {' and '.join(types)} is supported")
        for name in sorted(name for name, value in part.items() if name not in ("type", kind) and value is not None):
            if role != "assistant" or name not in _NEUTRAL_IN_PART:
                raise ValueError(f"{where}[{index}] has the unknown field {name!r}; known are type, {kind}")
            _check_neutral(f"{where}[{index}].{name}", part[name], _NEUTRAL_IN_PART[name])
        _check_text(f"{where}[{index}].{kind}", part.get(kind))
        texts.append(part[kind])
    return "\n".join(texts)


def _hint(name: str, known: Set[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {shown(value)}; it must be text")


def _check_neutral(name: str, value: Any, neutral: Sequence[Any]) -> None:
    """Raises ValueError unless the value is one of the neutral ones."""
    if not any(_is_same(value, one) for one in neutral):
        words = " or ".join(json.dumps(one) for one in neutral) or "null"
        raise ValueError(f"{name} is {shown(value)}; only {words} is supported")


def _is_same(value: Any, neutral: Any) -> bool:
    """Returns whether a value means the same as `neutral`; fields of an object may be absent or null."""
    if isinstance(value, dict) and isinstance(neutral, dict):
        return all(part is None or (name in neutral and _is_same(part, neutral[name])) for name, part in value.items())
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
