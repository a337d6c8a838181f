"""Decides how a model's replies in chats are parsed: by the settings, or else by its chat template."""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Mapping, Set
from typing import Any, TypeVar

from jaxserve.config.chat_config import ChatConfig
from jaxserve.config.shown import shown
from jaxserve.frontend.openai_chat import NEUTRAL_EFFORTS, Chat
from jaxserve.frontend.openai_constraints import forced_calls
from jaxserve.frontend.openai_tools import Tools
from jaxserve.frontend.parsers.forced import NamedCall, RequiredCalls
from jaxserve.frontend.parsers.pieces import Machine
from jaxserve.frontend.parsers.registry import (
    REASONING_FORMATS,
    TOOL_FORMATS,
    ReasoningFormat,
    ToolFormat,
    found_reasoning_format,
    found_tool_format,
)
from jaxserve.frontend.parsers.reply import ReplyParser
from jaxserve.sampling_params import MAX_STOP_TOKEN_IDS, SamplingParams
from jaxserve.structured_outputs import ReplyStructuredOutputs

T = TypeVar("T")

_AUTO = "auto"
_EFFORT = "reasoning_effort"
_WHOLE_REASONING = "openai_gptoss"


@dataclasses.dataclass(frozen=True)
class ReplyPlan:
    """Says how the replies to one conversation are parsed.

    Attributes:
        params: those of the request, with what constrains the output to a call.
        shown_token_ids: special tokens that the text must show.
        is_parsed: a reply may have more than content; else its text is the content, to the letter.
        shows_reasoning: reasoning is a part of the response.
        reasoning, calls: the formats that are looked for.
        id_length: characters of calls' ids; None leaves it open.
        begins_open: replies begin inside of the reasoning.
    """

    params: SamplingParams
    tools: Tools = Tools()
    shown_token_ids: Set[int] = frozenset()
    is_parsed: bool = False
    shows_reasoning: bool = True
    reasoning: ReasoningFormat | None = None
    calls: ToolFormat | None = None
    id_length: int | None = None
    begins_open: bool = False

    def parser(self) -> ReplyParser:
        """Makes the parser of one reply."""
        calls = self._calls()
        # A machine of whole replies is in front of the one that is made for calls that are forced.
        if self.calls is not None and self.calls.whole:
            declared = self.tools.schemas if self.tools.choice == "auto" else {}
            reasoning: Machine | None = self.calls.new_machine(declared)
        else:
            reasoning = None if self.reasoning is None else self.reasoning.machine(is_open=self.begins_open)
        return ReplyParser(reasoning, calls, one_call=not self.tools.parallel)

    def call_id(self) -> str:
        """Returns a new id for a call."""
        number = uuid.uuid4().hex
        return f"call_{number[:24]}" if self.id_length is None else number[: self.id_length]

    def finish_reason(self, reason: str, num_calls: int) -> str:
        """Returns the finish reason of a reply: as OpenAI has it, a call that was asked for by name is no reason."""
        return "tool_calls" if num_calls and reason == "stop" and self.tools.choice != "named" else reason

    def _calls(self) -> Machine | None:
        tools = self.tools
        if tools.choice == "named":
            assert tools.name is not None
            return NamedCall(tools.name)
        if tools.choice == "required":
            return RequiredCalls()
        if tools.choice == "none" or self.calls is None or self.calls.whole:
            return None
        return self.calls.new_machine(tools.schemas)


class ChatFormat:
    """Holds the formats of one model.

    Args:
        config: the settings.
        template: the source of its chat templates; "" without any.
        special_ids: its special tokens.

    Raises:
        ValueError: a setting names no format, or one that does not go with the other's.
    """

    def __init__(self, config: ChatConfig, template: str, special_ids: Mapping[str, int]):
        self._config = config
        self._special_ids = special_ids
        self._knows_effort = _EFFORT in template
        self.tool_call_parser = _resolved(
            "tool_call_parser", config.tool_call_parser, TOOL_FORMATS, found_tool_format(template)
        )
        self.reasoning_parser = _resolved(
            "reasoning_parser", config.reasoning_parser, REASONING_FORMATS, found_reasoning_format(template)
        )
        self._tools = TOOL_FORMATS.get(self.tool_call_parser or "")
        self._reasoning = REASONING_FORMATS.get(self.reasoning_parser or "")
        whole = self._tools is not None and self._tools.whole
        if whole != (self.reasoning_parser == _WHOLE_REASONING):
            raise ValueError(
                f"tool_call_parser is {self.tool_call_parser!r} and reasoning_parser is {self.reasoning_parser!r}; "
                f"'openai' and {_WHOLE_REASONING!r} are one format: set both, or neither"
            )

    def lines(self) -> list[str]:
        """Returns what the log says of the formats that the chat template has told."""
        config, found = self._config, []
        if config.tool_call_parser == _AUTO and self.tool_call_parser is not None:
            found.append(
                f"tool calls: parser {self.tool_call_parser!r}, as the chat template has them; "
                "ChatConfig.tool_call_parser sets another one"
            )
        if config.reasoning_parser == _AUTO and self.reasoning_parser is not None:
            found.append(
                f"reasoning: parser {self.reasoning_parser!r}, as the chat template has it; "
                "ChatConfig.reasoning_parser sets another one"
            )
        return found

    def arguments(self, chat: Chat) -> dict[str, Any]:
        """Returns the keywords with which a conversation is rendered. Raises ValueError as `check` does, and for an
        effort that the chat template does not know.
        """
        tools = chat.tools
        self.check(tools)
        excluded = tools.choice == "none" and self._config.exclude_tools_when_tool_choice_none
        kwargs, effort = dict(chat.template_kwargs), chat.reasoning_effort
        if effort is not None and self._knows_effort:
            kwargs.setdefault(_EFFORT, effort)
        elif effort not in (None, *NEUTRAL_EFFORTS):
            raise ValueError(f"{_EFFORT} is {effort!r}; the model's chat template does not have it: leave it out")
        return {
            "tools": None if excluded or not tools.declared else [dict(tool.definition) for tool in tools.declared],
            "add_generation_prompt": chat.add_generation_prompt,
            "continue_final_message": chat.continue_final_message,
            "template_kwargs": kwargs,
        }

    def check(self, tools: Tools) -> None:
        """Raises ValueError for tools that the model may call as it chooses, where nothing can tell its calls."""
        if tools.choice != "auto":
            return
        if not self._config.enable_auto_tool_choice:
            raise ValueError(
                "tool_choice is 'auto'; this server has enable_auto_tool_choice False: use required, none, or a tool's "
                "name"
            )
        if self._tools is None:
            raise ValueError(
                "tool_choice is 'auto'; this server has no parser for the calls of its model: use required or a tool's "
                "name, or set ChatConfig.tool_call_parser"
            )

    def plan(self, chat: Chat, prompt: str, params: SamplingParams) -> ReplyPlan:
        """Returns how the replies to a conversation are parsed. Raises ValueError.

        Args:
            chat: the conversation.
            prompt: its text.
            params: its sampling parameters; a constraint of their own excludes calls.
        """
        tools = chat.tools
        self.check(tools)
        if not params.detokenize:
            if tools.forced:
                raise ValueError("detokenize is false; calls of tools need text: leave it out")
            return ReplyPlan(params)
        given, forced = params.structured_outputs, forced_calls(tools)
        if given is not None and tools.choice != "none":
            raise ValueError(
                f"tool_choice is {shown(tools.name or tools.choice)}, and the output is constrained otherwise, which "
                "leaves no room for calls: use none, or leave out what constrains it"
            )
        if forced is not None and params.use_beam_search:
            raise ValueError(
                f"tool_choice is {shown(tools.name or tools.choice)} and use_beam_search is true; a beam search cannot "
                "be constrained to a call: use auto or none, or leave one of them out"
            )
        reasoning, whole = self._reasoning, self._tools is not None and self._tools.whole
        opened = self._begins_open(chat, prompt)
        lead = "" if chat.continue_final_message and not opened else self._lead(prompt, opened)
        if forced is not None:
            structured = ReplyStructuredOutputs(json=forced, lead=lead, source="tools")
            params = dataclasses.replace(params, structured_outputs=structured)
        elif given is not None and lead:
            structured = ReplyStructuredOutputs(**given.as_dict(), lead=lead)
            params = dataclasses.replace(params, structured_outputs=structured)
        calls = self._tools if whole or tools.choice == "auto" else None
        plan = ReplyPlan(
            params=params,
            tools=tools,
            is_parsed=reasoning is not None or calls is not None or forced is not None,
            shows_reasoning=chat.shows_reasoning,
            reasoning=reasoning,
            calls=calls,
            id_length=None if self._tools is None else self._tools.id_length,
            begins_open=opened,
        )
        return self._with_tokens(plan)

    def _begins_open(self, chat: Chat, prompt: str) -> bool:
        reasoning = self._reasoning
        if reasoning is None or not reasoning.end:
            return False
        if chat.continue_final_message:
            return reasoning.is_open_in(chat.messages[-1]["content"])
        return reasoning.is_open(prompt)

    def _with_tokens(self, plan: ReplyPlan) -> ReplyPlan:
        """Returns a plan with the special tokens of its formats: those that are shown, and those that end a reply."""
        formats = plan.calls, plan.reasoning
        markers = [
            *(() if formats[0] is None else formats[0].markers),
            *(() if formats[1] is None else (formats[1].begin, formats[1].end)),
        ]
        ids = frozenset(self._special_ids[text] for text in markers if text in self._special_ids)
        params = plan.params
        if plan.calls is not None and plan.calls.stops:
            stops = [self._special_ids[text] for text in plan.calls.stops if text in self._special_ids]
            merged = tuple(dict.fromkeys((*params.stop_token_ids, *stops)))
            if len(merged) <= MAX_STOP_TOKEN_IDS and not params.ignore_eos:
                params = dataclasses.replace(params, stop_token_ids=merged)
        return dataclasses.replace(plan, params=params, shown_token_ids=ids)

    def _lead(self, prompt: str, opened: bool) -> str:
        """Returns in Lark what a reply begins with before its answer; "" for one that begins with the answer."""
        reasoning = self._reasoning
        if reasoning is None:
            return ""
        if not reasoning.end:
            token = self._token
            return (
                f'lead: (analysis {token("<|start|>")} "assistant")? {token("<|channel|>")} "final" '
                f"{token('<|message|>')}\n"
                f'analysis: {token("<|channel|>")} "analysis" {token("<|message|>")} text\n'
                f"{self._text_to('<|end|>')}"
            )
        if prompt.rstrip().endswith(reasoning.end):
            return ""
        begin = "" if opened else f"{self._token(reasoning.begin)} "
        lead = f"({begin}text SPACE)?" if begin else "text SPACE"
        return f"lead: {lead}\n{self._text_to(reasoning.end)}\nSPACE: /[ \\n]{{0,2}}/"

    def _text_to(self, end: str) -> str:
        """Returns in Lark the rule `text`: any text, to the token that ends it, or to its letters."""
        if end in self._special_ids:
            return f"text: ANY {self._token(end)}\nANY: /(.|\\n)*/"
        return f"text[suffix={json.dumps(end)}]: /(.|\\n)*/"

    def _token(self, text: str) -> str:
        """Returns a token's text in Lark: special ones are written by their ids."""
        token_id = self._special_ids.get(text)
        return json.dumps(text) if token_id is None else f"<[{token_id}]>"


def _resolved(setting: str, name: str | None, known: Mapping[str, T], found: str | None) -> str | None:
    """Returns the name of the format that a setting has, or what was found for "auto". Raises ValueError."""
    if name == _AUTO:
        return found
    if name is not None and name not in known:
        raise ValueError(f"{setting} is {name!r}; it must be auto, None or one of {', '.join(known)}")
    return name
