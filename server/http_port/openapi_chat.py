"""Describes the fields of chats for the OpenAPI document: messages, tools, and what replies may be."""

from __future__ import annotations

from typing import Any

from jaxserve.frontend.openai_chat import REASONING_EFFORTS
from jaxserve.frontend.openai_tools import MAX_NAME_LENGTH, MAX_TOOLS

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_FLAG: Schema = {"type": "boolean"}
_NAME: Schema = {"type": "string", "minLength": 1, "maxLength": MAX_NAME_LENGTH}


def chat_fields() -> dict[str, Schema]:
    """Returns the fields that a conversation is rendered from."""
    return {
        "messages": {"type": "array", "minItems": 1, "items": {"anyOf": [_message(), _calling_message()]}},
        "add_generation_prompt": _FLAG,
        "continue_final_message": _FLAG,
        "chat_template_kwargs": {"type": "object"},
        "tools": {"type": "array", "maxItems": MAX_TOOLS, "items": _tool()},
        "tool_choice": {"anyOf": [{"enum": ["none", "auto", "required"]}, _choice()]},
        "reasoning_effort": {"enum": list(REASONING_EFFORTS)},
    }


def reply_fields() -> dict[str, Schema]:
    """Returns the fields that say what a reply may be."""
    return {"parallel_tool_calls": _FLAG, "include_reasoning": _FLAG}


def _message() -> Schema:
    part = closed({"type": {"const": "text"}, "text": _TEXT}, "type", "text")
    return closed(
        {
            "role": {"enum": ["user", "system", "developer", "assistant", "tool"]},
            "content": {"anyOf": [_TEXT, {"type": "array", "minItems": 1, "items": part}]},
            "name": {"type": ["string", "null"]},
            "tool_call_id": {"type": ["string", "null"]},
        },
        "role",
        "content",
    )


def _calling_message() -> Schema:
    """Returns the schema of an assistant's message with calls or reasoning."""
    function = closed({"name": _TEXT, "arguments": _TEXT}, "name", "arguments")
    call = closed({"id": _TEXT, "type": {"const": "function"}, "function": function}, "function")
    return closed(
        {
            "role": {"const": "assistant"},
            "content": {"type": ["string", "null"]},
            "tool_calls": {"type": "array", "items": call},
            "reasoning_content": {"type": ["string", "null"]},
            "reasoning": {"type": ["string", "null"]},
        },
        "role",
        "content",
    )


def _tool() -> Schema:
    function = closed({"name": _NAME, "description": _TEXT, "parameters": {"type": "object"}, "strict": _FLAG}, "name")
    return closed({"type": {"const": "function"}, "function": function}, "type", "function")


def _choice() -> Schema:
    named = closed({"type": {"const": "function"}, "function": closed({"name": _NAME}, "name")}, "type", "function")
    allowed = closed(
        {"mode": {"enum": ["auto", "required"]}, "tools": {"type": "array", "minItems": 1, "items": named}},
        "mode",
        "tools",
    )
    whole = closed({"type": {"const": "allowed_tools"}, "allowed_tools": allowed}, "type", "allowed_tools")
    return {"anyOf": [named, whole]}


def closed(properties: dict[str, Schema], *required: str) -> Schema:
    """Returns the schema of an object without further fields."""
    return {"type": "object", "required": list(required), "properties": properties, "additionalProperties": False}
