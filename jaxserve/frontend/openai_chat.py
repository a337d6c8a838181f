"""Parses the conversation of a chat body: what its prompt is rendered from, and what the reply may be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxserve.config.shown import shown
from jaxserve.frontend.openai_checks import check_depth, checked_flag, checked_object
from jaxserve.frontend.openai_messages import parse_messages
from jaxserve.frontend.openai_tools import Tools, parse_tools

CHAT_FIELDS = frozenset(
    {
        "messages",
        "tools",
        "tool_choice",
        "parallel_tool_calls",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template_kwargs",
        "reasoning_effort",
        "include_reasoning",
    }
)
"""The fields that `parse_chat` reads."""

REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
NEUTRAL_EFFORTS = ("none", "medium")
"""The defaults of OpenAI's models since GPT-5.1 and before, which clients send to models that know of no effort."""


@dataclasses.dataclass(frozen=True)
class Chat:
    """Holds a conversation.

    Attributes:
        messages: as chat templates take them.
        add_generation_prompt: the prompt ends with what a reply begins with.
        continue_final_message: the reply continues the last message instead.
        template_kwargs: what the chat template is given besides.
        tools: that the model may or must call.
        reasoning_effort: one of REASONING_EFFORTS, for chat templates that know it; None leaves it to them.
        shows_reasoning: reasoning is a part of the response.
    """

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool = True
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    continue_final_message: bool = False
    tools: Tools = Tools()
    reasoning_effort: str | None = None
    shows_reasoning: bool = True


def parse_chat(fields: Mapping[str, Any]) -> Chat:
    """Parses the conversation of a body, of whose fields none is None. Raises ValueError naming the field."""
    kwargs = checked_object("chat_template_kwargs", fields.get("chat_template_kwargs", {}))
    check_depth("chat_template_kwargs", kwargs)
    continues = checked_flag("continue_final_message", fields.get("continue_final_message", False))
    begins = checked_flag("add_generation_prompt", fields.get("add_generation_prompt", not continues))
    if continues and begins:
        raise ValueError("continue_final_message is true and add_generation_prompt is true; give one of them")
    effort = fields.get("reasoning_effort")
    if effort is not None and effort not in REASONING_EFFORTS:
        raise ValueError(f"reasoning_effort is {shown(effort)}; it must be one of {', '.join(REASONING_EFFORTS)}")
    return Chat(
        messages=parse_messages(fields["messages"]),
        add_generation_prompt=begins,
        template_kwargs=kwargs,
        continue_final_message=continues,
        tools=parse_tools(fields),
        reasoning_effort=effort,
        shows_reasoning=checked_flag("include_reasoning", fields.get("include_reasoning", True)),
    )
