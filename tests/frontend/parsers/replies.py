"""Replies as models write them, in each format, with what they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import NamedTuple

from jaxserve.frontend.parsers.forced import NamedCall, RequiredCalls
from jaxserve.frontend.parsers.pieces import CallArguments, CallStart, Content, Piece, Reasoning
from jaxserve.frontend.parsers.registry import REASONING_FORMATS, TOOL_FORMATS
from jaxserve.frontend.parsers.reply import ReplyParser

TOOLS = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "limit": {"type": ["number", "null"]},
            "metric": {"type": "boolean"},
            "options": {"type": "object"},
            "tags": {"anyOf": [{"type": "array"}, {"type": "null"}]},
        },
    },
    "write_file": {"type": "object", "properties": {"path": {"type": "string"}, "content": {"type": "string"}}},
    "now": {"type": "object", "properties": {}},
}

NEW: dict[str, Callable[[], ReplyParser]] = {
    "hermes": lambda: ReplyParser(
        REASONING_FORMATS["qwen3"].machine(is_open=False), TOOL_FORMATS["hermes"].new_machine(TOOLS)
    ),
    "hermes, open": lambda: ReplyParser(
        REASONING_FORMATS["qwen3"].machine(is_open=True),
        TOOL_FORMATS["hermes"].new_machine(TOOLS),
    ),
    "deepseek_r1": lambda: ReplyParser(REASONING_FORMATS["deepseek_r1"].machine(is_open=True), None),
    "qwen3_coder": lambda: ReplyParser(None, TOOL_FORMATS["qwen3_coder"].new_machine(TOOLS)),
    "llama3_json": lambda: ReplyParser(None, TOOL_FORMATS["llama3_json"].new_machine(TOOLS)),
    "pythonic": lambda: ReplyParser(None, TOOL_FORMATS["pythonic"].new_machine(TOOLS)),
    "mistral": lambda: ReplyParser(
        REASONING_FORMATS["mistral"].machine(is_open=False), TOOL_FORMATS["mistral"].new_machine(TOOLS)
    ),
    "openai": lambda: ReplyParser(TOOL_FORMATS["openai"].new_machine(TOOLS), None),
    "required": lambda: ReplyParser(None, RequiredCalls()),
    "named": lambda: ReplyParser(None, NamedCall("get_weather")),
    "required, thinking": lambda: ReplyParser(REASONING_FORMATS["qwen3"].machine(is_open=True), RequiredCalls()),
}
"""Parsers, by their names and those of what is in front of them."""


class Reply(NamedTuple):
    """content: None for none. calls: names, and arguments as values."""

    parser: str
    text: str
    content: str | None = None
    reasoning: str | None = None
    calls: tuple[tuple[str, object], ...] = ()


class Parsed(NamedTuple):
    content: str | None
    reasoning: str | None
    calls: tuple[tuple[str, str], ...]


def parse(parser: ReplyParser, parts: Iterable[str]) -> Parsed:
    """What a reply in these parts is: texts joined, with the arguments of calls as they are written."""
    pieces: list[Piece] = []
    for part in parts:
        pieces += parser.feed(part)
    pieces += parser.finish()
    content, reasoning, calls = "", "", []
    for piece in pieces:
        match piece:
            case Content(text):
                content += text
            case Reasoning(text):
                reasoning += text
            case CallStart(name):
                calls.append((name, ""))
            case CallArguments(text):
                calls[-1] = (calls[-1][0], calls[-1][1] + text)
    return Parsed(content or None, reasoning or None, tuple(calls))


_PARIS = {"city": "Paris", "days": 3}
_DEEP = {"city": "São Paulo 🌧", "options": {"a": [1, {"b": None}], "q": 'say "}" \\ \n'}, "tags": []}
_CODE = {"path": "a.py", "content": 'x = "</tool_call>"\nif {1: [2]}:\n    pass  # é 漢字 🎉\n'}


def _hermes(name: str, arguments: object) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments, ensure_ascii=False)}}}\n</tool_call>'


def _coder(name: str, **values: str) -> str:
    parameters = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def _llama(name: str, arguments: object) -> str:
    return json.dumps({"name": name, "parameters": arguments}, ensure_ascii=False)


_CALL = (("get_weather", _PARIS),)
_TWO = (("get_weather", _PARIS), ("write_file", _CODE))

REPLIES = {
    # ---- Hermes and Qwen, with <think> ----
    "a plain answer": Reply("hermes", "  It is 3 < 5, <b>so</b> there. \n", "  It is 3 < 5, <b>so</b> there. \n"),
    "one call": Reply("hermes", _hermes("get_weather", _PARIS), calls=_CALL),
    "text around calls": Reply(
        "hermes",
        f"Let me look.\n\n{_hermes('get_weather', _PARIS)}\n{_hermes('write_file', _CODE)}\n\nDone: é 🎉.\n",
        "Let me look.\n\n\n\n\nDone: é 🎉.\n",
        calls=_TWO,
    ),
    "nested arguments": Reply("hermes", _hermes("get_weather", _DEEP), calls=(("get_weather", _DEEP),)),
    "thinking, then a call": Reply(
        "hermes",
        f"<think>\nThe user asks <tool_call> things.\n</think>\n\n{_hermes('get_weather', _PARIS)}",
        reasoning="The user asks <tool_call> things.",
        calls=_CALL,
    ),
    "thinking that the prompt begins": Reply(
        "hermes, open", "Okay, so: 1 < 2.\n</think>\n\nYes.", "Yes.", "Okay, so: 1 < 2."
    ),
    "thinking without an end": Reply("hermes, open", "Okay, </thin", None, "Okay, </thin"),
    "empty thinking": Reply("hermes", "<think>\n\n</think>\n\nHello", "Hello"),
    "no thinking": Reply("hermes", "<thin air", "<thin air"),
    "DeepSeek without a beginning": Reply("deepseek_r1", "Hmm.\n</think>\n\n42", "42", "Hmm."),
    "DeepSeek with one": Reply("deepseek_r1", "<think>\nHmm.\n</think>\n\n42", "42", "Hmm."),
    "arguments as text": Reply(
        "hermes", '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>', calls=(("now", {"a": 1}),)
    ),
    "no arguments": Reply("hermes", '<tool_call>{"name": "now"}</tool_call>', calls=(("now", {}),)),
    "a list of calls": Reply(
        "hermes",
        f'<tool_call>[{{"name": "now", "arguments": {{}}}}, {_llama("get_weather", _PARIS)}]</tool_call>',
        calls=(("now", {}), *_CALL),
    ),
    "line breaks in a text": Reply(
        "hermes", '<tool_call>{"name": "now", "arguments": {"a": "x\ny"}}</tool_call>', calls=(("now", {"a": "x\ny"}),)
    ),
    "without its closing tag": Reply("hermes", _hermes("get_weather", _PARIS)[:-12], calls=_CALL),
    "cut off": Reply(
        "hermes",
        'So: <tool_call>\n{"name": "get_weather", "arguments": {"ci',
        'So: <tool_call>\n{"name": "get_weather", "arguments": {"ci',
    ),
    "a malformed call, then another": Reply(
        "hermes",
        f'<tool_call>{{"name": get}}</tool_call>{_hermes("get_weather", _PARIS)}',
        '<tool_call>{"name": get}</tool_call>',
        calls=_CALL,
    ),
    "an open string, then another call": Reply(
        "hermes",
        f'<tool_call>{{"name": "x}}</tool_call>\n{_hermes("get_weather", _PARIS)}',
        '<tool_call>{"name": "x}</tool_call>',
        calls=_CALL,
    ),
    "a tag in a call": Reply(
        "hermes", f"<tool_call> or {_hermes('get_weather', _PARIS)}", "<tool_call> or", calls=_CALL
    ),
    # ---- Qwen3-Coder ----
    "typed values": Reply(
        "qwen3_coder",
        "Sure.\n"
        + _coder(
            "get_weather",
            city="12",
            days="3",
            limit="null",
            metric="True",
            options='{"a": [1, "}"]}',
            tags='["é"]',
        ),
        "Sure.",
        calls=(
            (
                "get_weather",
                {"city": "12", "days": 3, "limit": None, "metric": True, "options": {"a": [1, "}"]}, "tags": ["é"]},
            ),
        ),
    ),
    "code with tags": Reply(
        "qwen3_coder",
        _coder("write_file", path="a.html", content="<p></parameter>\n</tool_call>\n</function>é</p>\n"),
        calls=(("write_file", {"path": "a.html", "content": "<p></parameter>\n</tool_call>\n</function>é</p>\n"}),),
    ),
    "two functions": Reply(
        "qwen3_coder", _coder("now") + "\n" + _coder("now") + "\nGood.", "Good.", calls=(("now", {}), ("now", {}))
    ),
    "without the outer tag": Reply("qwen3_coder", _coder("now").removeprefix("<tool_call>\n"), calls=(("now", {}),)),
    "an integer that is none": Reply(
        "qwen3_coder", _coder("get_weather", days="three"), calls=(("get_weather", {"days": "three"}),)
    ),
    "a function cut off": Reply(
        "qwen3_coder", _coder("write_file", path="a.py")[:-25], _coder("write_file", path="a.py")[:-25]
    ),
    # ---- Llama 3 ----
    "bare JSON": Reply("llama3_json", _llama("get_weather", _DEEP), calls=(("get_weather", _DEEP),)),
    "several with a tag": Reply(
        "llama3_json",
        f"<|python_tag|>{_llama('get_weather', _PARIS)}; {_llama('write_file', _CODE)}",
        calls=_TWO,
    ),
    "JSON that is no call": Reply(
        "llama3_json", '{"name": "Bob", "parameters": {}}', '{"name": "Bob", "parameters": {}}'
    ),
    "other JSON": Reply("llama3_json", 'Here: {"a": {"name": 1}} {}', 'Here: {"a": {"name": 1}} {}'),
    "text before": Reply("llama3_json", f"I look. {_llama('get_weather', _PARIS)}", "I look.", calls=_CALL),
    "Python": Reply("llama3_json", "<|python_tag|>print({1: 2})", "<|python_tag|>print({1: 2})"),
    "JSON cut off": Reply(
        "llama3_json",
        '{"name": "get_weather", "parameters": {"city": "P',
        '{"name": "get_weather", "parameters": {"city": "P',
    ),
    # ---- pythonic ----
    "Python calls": Reply(
        "pythonic",
        "[get_weather(city='São Paulo 🌧', days=-3, options={'a': [1, None]}), now()]",
        calls=(("get_weather", {"city": "São Paulo 🌧", "days": -3, "options": {"a": [1, None]}}), ("now", {})),
    ),
    "a list": Reply("pythonic", "[1] says so", "[1] says so"),
    "a function that is no tool": Reply("pythonic", "[f(x=1)]", "[f(x=1)]"),
    "Python cut off": Reply("pythonic", "[get_weather(city='Par", "[get_weather(city='Par"),
    # ---- Mistral ----
    "a list behind the marker": Reply(
        "mistral",
        "[TOOL_CALLS] "
        + json.dumps([{"name": name, "arguments": arguments} for name, arguments in _TWO], ensure_ascii=False),
        calls=_TWO,
    ),
    "names and markers": Reply(
        "mistral",
        f"Wait [1].[TOOL_CALLS]get_weather[ARGS]{json.dumps(_PARIS)}"
        f"[TOOL_CALLS]write_file[CALL_ID]abcdef123[ARGS]{json.dumps(_CODE)}",
        "Wait [1].",
        calls=_TWO,
    ),
    "Magistral thinks": Reply("mistral", "[THINK]Hm.[/THINK]Yes[TOOL_CALLS]now{}", "Yes", "Hm.", (("now", {}),)),
    "Mistral cut off": Reply("mistral", '[TOOL_CALLS][{"name": "now", "argum', '[TOOL_CALLS][{"name": "now", "argum'),
    "two markers": Reply("mistral", "[TOOL_CALLS]x [TOOL_CALLS]now[ARGS]{}", "[TOOL_CALLS]x", calls=(("now", {}),)),
    # ---- harmony ----
    "analysis and an answer": Reply(
        "openai",
        "<|channel|>analysis<|message|>User says hi.<|end|><|start|>assistant<|channel|>final<|message|>Hello 🎉!",
        "Hello 🎉!",
        "User says hi.",
    ),
    "a call": Reply(
        "openai",
        "<|channel|>analysis<|message|>Need it.<|end|><|start|>assistant<|channel|>commentary to=functions.get_weather "
        f"<|constrain|>json<|message|>{json.dumps(_DEEP, ensure_ascii=False)}",
        None,
        "Need it.",
        (("get_weather", _DEEP),),
    ),
    "a preamble and two calls": Reply(
        "openai",
        "<|channel|>commentary<|message|>First this.<|end|><|start|>assistant to=functions.now<|channel|>commentary "
        "json<|message|>{}<|call|><|start|>assistant<|channel|>commentary to=functions.get_weather<|message|>"
        f"{json.dumps(_PARIS)}<|call|>",
        "First this.",
        None,
        (("now", {}), *_CALL),
    ),
    "two analyses": Reply(
        "openai",
        "<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>analysis<|message|>Two.<|end|>",
        None,
        "One.\nTwo.",
    ),
    "no harmony": Reply("openai", "Just text <b>", "Just text <b>"),
    "a call cut off": Reply(
        "openai",
        '<|channel|>commentary to=functions.now <|constrain|>json<|message|>{"a": ',
        '<|channel|>commentary to=functions.now <|constrain|>json<|message|>{"a": ',
    ),
    # ---- forced by a grammar ----
    "required": Reply(
        "required",
        json.dumps([{"name": name, "parameters": arguments} for name, arguments in _TWO], ensure_ascii=False, indent=1),
        calls=_TWO,
    ),
    "required, thinking": Reply(
        "required, thinking",
        f'Hm.\n</think>\n\n[{{"name": "get_weather", "parameters": {json.dumps(_DEEP)}}}]',
        None,
        "Hm.",
        (("get_weather", _DEEP),),
    ),
    "by name": Reply("named", json.dumps(_DEEP, ensure_ascii=False), calls=(("get_weather", _DEEP),)),
}
