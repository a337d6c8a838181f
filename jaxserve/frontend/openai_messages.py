"""Parses the messages of a chat into what chat templates take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from jaxserve.config.shown import shown
from jaxserve.frontend.openai_checks import check_depth, check_neutral, check_text, checked_object, hint

_NEUTRAL_IN_MESSAGE: Mapping[str, Sequence[Any]] = {
    "function_call": (),
    "audio": (),
    "annotations": ([],),
}
_NEUTRAL_IN_PART: Mapping[str, Sequence[Any]] = {"annotations": ([],), "logprobs": ([],)}
"""Fields of an assistant's content part, as in OpenAI's responses."""

_MESSAGE_TEXTS = ("name", "refusal", "tool_call_id", "reasoning_content", "reasoning")
_REASONING = ("reasoning_content", "reasoning")
"""Names of an assistant's reasoning: DeepSeek's, and the one that vLLM has had since."""
_PART_TEXTS = ("text", "refusal")


def parse_messages(messages: Any) -> list[dict[str, Any]]:
    """Returns the messages with the content as text. Raises ValueError naming the field."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of at least one message")
    return [_parse_message(f"messages[{index}]", message) for index, message in enumerate(messages)]


def _parse_message(where: str, message: Any) -> dict[str, Any]:
    """Converts a message for chat templates: role and content, and where present name, tool_call_id, tool_calls and
    reasoning_content.

    The developer role is the system role under another name, which few templates support.
    """
    if not isinstance(message, dict):
        raise ValueError(f"{where} is of type {type(message).__name__}; it must be an object")
    fields = {name: value for name, value in message.items() if value is not None}
    for name, value in fields.items():
        if name in _NEUTRAL_IN_MESSAGE:
            check_neutral(f"{where}.{name}", value, _NEUTRAL_IN_MESSAGE[name])
        elif name in _MESSAGE_TEXTS:
            check_text(f"{where}.{name}", value)
        elif name not in ("role", "content", "tool_calls"):
            known = {"role", "content", "tool_calls", *_MESSAGE_TEXTS, *_NEUTRAL_IN_MESSAGE}
            raise ValueError(f"{where} has the unknown field {name!r}; {hint(name, known)}")
    role, content, refusal = fields.get("role"), fields.get("content"), fields.get("refusal", "")
    if not isinstance(role, str):
        raise ValueError(f"{where}.role must be text")
    if refusal and role != "assistant":
        raise ValueError(f"{where}.refusal is {shown(refusal)}; only an assistant's message has one")
    if refusal and content:
        raise ValueError(f"{where} has content and a refusal; an assistant answers with one of them")
    calls = _parse_calls(f"{where}.tool_calls", fields.get("tool_calls", []))
    reasoning = next((fields[name] for name in _REASONING if name in fields), "")
    if role != "assistant" and (calls or reasoning):
        raise ValueError(
            f"{where} has {'tool_calls' if calls else 'reasoning'}, and its role is {shown(role)}; only an assistant's "
            "message has them"
        )
    if refusal or (role == "assistant" and content is None and ("content" in message or calls)):
        content = refusal
    if calls and content == []:
        content = ""
    return {
        "role": "system" if role == "developer" else role,
        "content": _parse_content(f"{where}.content", content, role),
        **{name: fields[name] for name in ("name", "tool_call_id") if name in fields},
        **({"tool_calls": calls} if calls else {}),
        **({"reasoning_content": reasoning} if reasoning else {}),
    }


def _parse_calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Converts an assistant's calls for chat templates, which take the arguments as an object."""
    if not isinstance(calls, list):
        raise ValueError(f"{where} is {shown(calls)}; it must be a list of calls")
    return [_parse_call(f"{where}[{index}]", call) for index, call in enumerate(calls)]


def _parse_call(where: str, call: Any) -> dict[str, Any]:
    checked_object(where, call)
    for name, value in call.items():
        if name not in ("id", "type", "function", "index") and value is not None:
            raise ValueError(f"{where} has the unknown field {shown(name)}; known are id, type, function")
    if call.get("type", "function") != "function":
        raise ValueError(f"{where}.type is {shown(call['type'])}; only function is supported")
    check_text(f"{where}.id", call.get("id", ""))
    function = checked_object(f"{where}.function", call.get("function"))
    for name in function:
        if name not in ("name", "arguments"):
            raise ValueError(f"{where}.function has the unknown field {shown(name)}; known are name, arguments")
    check_text(f"{where}.function.name", function.get("name"))
    arguments = _parse_arguments(f"{where}.function.arguments", function.get("arguments"))
    return {
        **({"id": call["id"]} if "id" in call else {}),
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments},
    }


def _parse_arguments(where: str, arguments: Any) -> dict[str, Any]:
    """Returns the object that a call's arguments spell in JSON; an empty text is an empty one."""
    if arguments is None or arguments == "":
        return {}
    value = arguments
    if isinstance(arguments, str):
        try:
            value = msgspec.json.decode(arguments)
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            raise ValueError(f"{where} is {shown(arguments)}; it must be a JSON object as text") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {shown(arguments)}; it must be a JSON object as text")
    check_depth(where, value)
    return value


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
            check_neutral(f"{where}[{index}].{name}", part[name], _NEUTRAL_IN_PART[name])
        check_text(f"{where}[{index}].{kind}", part.get(kind))
        texts.append(part[kind])
    return "\n".join(texts)
