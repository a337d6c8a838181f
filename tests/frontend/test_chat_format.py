"""How the formats of replies are chosen, and what constrains outputs to calls and formats."""

from __future__ import annotations

import json
import logging

import pytest
from llguidance import LLMatcher, LLTokenizer

from jaxserve.config.chat_config import ChatConfig
from jaxserve.config.settings import EngineConfig
from jaxserve.frontend.chat_format import ChatFormat
from jaxserve.frontend.grammar_text import grammar_of
from jaxserve.frontend.openai import CHAT_URL, parse_body
from jaxserve.frontend.openai_chat import Chat
from jaxserve.frontend.openai_constraints import forced_calls
from jaxserve.frontend.openai_tools import Tools, parse_tools
from jaxserve.frontend.parsers.pieces import CallArguments, CallStart, Reasoning
from jaxserve.frontend.tokenizer import Tokenizer, load_tokenizer
from jaxserve.sampling_params import SamplingParams
from jaxserve.structured_outputs import StructuredOutputsParams
from tests.server.http.chat_model import TOOLS, chat_model

CITY = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/Name"}, "next": {"$ref": "#"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"Name": {"type": "string", "enum": ["Rome", "#/$defs"]}},
}
COUNT = {
    "type": "object",
    "properties": {"$ref": {"$ref": "#/$defs/Name"}},
    "required": ["$ref"],
    "$defs": {"Name": {"type": "integer"}},
}


def tools(choice="auto", **more) -> Tools:
    given = [
        {"type": "function", "function": {"name": name, "parameters": schema}}
        for name, schema in (("city", CITY), ("count", COUNT))
    ]
    return parse_tools({"tools": given, "tool_choice": choice, **more})


def chat(tools_: Tools) -> Chat:
    return Chat([{"role": "user", "content": "hi"}], tools=tools_)


HI = chat(Tools())


def accepts(grammar: str, text: str) -> bool:
    """Whether a grammar ends with the text, in llguidance."""
    matcher = LLMatcher(LLTokenizer("byte"), grammar)
    assert not matcher.get_error(), matcher.get_error()
    data = list(text.encode())
    return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()


def schema_of(schema) -> str:
    return LLMatcher.grammar_from_json_schema(json.dumps(schema))


def grammar_of_plan(plan) -> str:
    return grammar_of(plan.params.structured_outputs, {}, 100)


def test_required_calls_follow_the_schemas_of_their_tools():
    """Also where these refer to their own parts, by the same names."""
    grammar = schema_of(forced_calls(tools("required")))
    city = {"name": "city", "parameters": {"city": "Rome", "next": {"city": "#/$defs"}}}
    count = {"name": "count", "parameters": {"$ref": 3}}
    for calls in ([city], [count, city]):
        assert accepts(grammar, json.dumps(calls))
    for wrong in (
        {**city, "parameters": {"city": "Oslo"}},
        {**count, "parameters": {"$ref": "x"}},
        {**city, "name": "x"},
    ):
        assert not accepts(grammar, json.dumps([city, wrong]))
    assert not accepts(grammar, "[]")
    one = schema_of(forced_calls(tools("required", parallel_tool_calls=False)))
    assert accepts(one, json.dumps([city]))
    assert not accepts(one, json.dumps([city, city]))


def test_a_call_by_name_is_the_tools_arguments():
    choice = {"type": "function", "function": {"name": "city"}}
    grammar = schema_of(forced_calls(tools(choice)))
    assert accepts(grammar, '{"city": "Rome", "next": {"city": "Rome"}}')
    assert not accepts(grammar, '{"city": 1}')
    assert forced_calls(tools("auto")) is None


def test_allowed_tools_are_those_that_are_left():
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "count"}}]}
    parsed = tools({"type": "allowed_tools", "allowed_tools": allowed})
    assert ([tool.name for tool in parsed.declared], parsed.choice) == (["count"], "required")


TAG = {"format": {"type": "tag", "begin": "[", "content": {"type": "regex", "pattern": "[0-9]"}, "end": "]"}}


@pytest.mark.parametrize(
    ("constraint", "good", "bad"),
    [
        ({"json": {"type": "integer"}}, "42", "x"),
        ({"json": '{"type": "integer"}'}, "42", "x"),
        ({"json_object": True}, '{"a": [1]}', "[1]"),
        ({"choice": ['say "a"', "é\n"]}, "é\n", "b"),
        ({"regex": "[0-9]+/"}, "42/", "x"),
        ({"grammar": 'start: lead\nlead: "a" answer\nanswer: "b"'}, "ab", "b"),
        ({"structural_tag": TAG}, "[1]", "1"),
        ({"json": {"type": "array"}, "disable_any_whitespace": True}, "[1,2]", "[1, 2]"),
    ],
)
def test_a_constraint_behind_reasoning(constraint, good, bad):
    format_ = ChatFormat(ChatConfig(reasoning_parser="qwen3"), "", {})
    given = StructuredOutputsParams(**constraint)
    for prompt, reasoning in (("", "<think>\nNot </thin {\n</think>\n\n"), ("<think>\n", "1 < 2\n</think>\n\n")):
        plan = format_.plan(HI, prompt, SamplingParams(structured_outputs=given))
        grammar = grammar_of_plan(plan)
        assert accepts(grammar, reasoning + good)
        assert not accepts(grammar, reasoning + bad)
        assert accepts(grammar, good) == (prompt == ""), "thinking is left out only where the prompt has not begun it"
    plan = format_.plan(HI, "<think>\n\n</think>\n\n", SamplingParams(structured_outputs=given))
    assert plan.params.structured_outputs == given, "the prompt has ended it"


HARMONY = ChatConfig(tool_call_parser="openai", reasoning_parser="openai_gptoss")
LEAD = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>"


def test_forced_calls_in_harmony(tmp_path):
    """Special tokens are written by their ids, which no text spells."""
    call = '[{"name": "count", "parameters": {"$ref": 1}}]'
    for format_, tokenizer in ((ChatFormat(HARMONY, "", {}), None), (None, chat_model(tmp_path, chat=HARMONY))):
        if tokenizer is not None:
            format_ = tokenizer.chat_format
        plan = format_.plan(chat(tools("required")), "", SamplingParams())
        grammar = grammar_of_plan(plan)
        if tokenizer is None:
            assert accepts(grammar, LEAD + call)
            assert not accepts(grammar, LEAD + "[]")
        else:
            assert len(plan.shown_token_ids) == 5
            matcher = LLMatcher(LLTokenizer(str(tmp_path / "tokenizer.json")), grammar)
            ids = tokenizer.encode(LEAD + call)
            assert matcher.try_consume_tokens(ids) == len(ids)
            assert matcher.is_accepting()
        parser = plan.parser()
        assert parser.feed(LEAD + call) == [Reasoning("Hm."), CallStart("count"), CallArguments('{"$ref": 1}')]


def test_forced_calls_behind_special_tags(tmp_path):
    config = ChatConfig(tool_call_parser="hermes", reasoning_parser="qwen3")
    plan = ChatFormat(config, "", {"<think>": 300, "</think>": 301}).plan(chat(tools("required")), "", SamplingParams())
    grammar = grammar_of_plan(plan)
    assert "<[301]>" in grammar
    assert LLMatcher.validate_grammar(grammar) == ""
    assert plan.shown_token_ids == {300, 301}


TEMPLATES = {
    "<tool_call>\n{\"name\": <function-name>}</tool_call> {% if '</think>' in content %}": ("hermes", "qwen3"),
    "<tool_call>\n<function=example>\n<parameter=x>\n</tool_call>": ("qwen3_coder", None),
    '<|start_header_id|> {"name": function name, "parameters": dictionary}': ("llama3_json", None),
    "[AVAILABLE_TOOLS] [TOOL_CALLS]": ("mistral", None),
    "[THINK] [/THINK] [TOOL_CALLS]": ("mistral", "mistral"),
    "<|start|>assistant<|channel|>final<|message|>": ("openai", "openai_gptoss"),
    "[func_name1(params_name1=params_value1)]": ("pythonic", None),
    "<tool_call>{name}\n<arg_key>key</arg_key></tool_call>": (None, None),
    "{{ messages[0].content }}": (None, None),
    "": (None, None),
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_formats_that_a_chat_template_tells(template):
    format_ = ChatFormat(ChatConfig(), template, {})
    assert (format_.tool_call_parser, format_.reasoning_parser) == TEMPLATES[template]
    assert len(format_.lines()) == 2 - TEMPLATES[template].count(None)


def test_settings_of_formats(tmp_path, caplog):
    chat_model(tmp_path)
    with caplog.at_level(logging.INFO):
        load_tokenizer(EngineConfig(load_format="dummy", model=str(tmp_path), tokenizer=str(tmp_path)))
    assert "tool calls: parser 'hermes', as the chat template has them" in caplog.text
    assert "reasoning: parser 'qwen3'" in caplog.text
    off = Tokenizer(tmp_path, ChatConfig(tool_call_parser=None, reasoning_parser=None)).chat_format
    assert off.lines() == []
    with pytest.raises(ValueError, match="this server has no parser for the calls of its model"):
        off.check(tools("auto"))
    assert not off.plan(HI, "", SamplingParams()).is_parsed
    with pytest.raises(ValueError, match="this server has enable_auto_tool_choice False"):
        Tokenizer(tmp_path, ChatConfig(enable_auto_tool_choice=False)).chat_format.check(tools("auto"))
    with pytest.raises(ValueError, match="tool_call_parser is 'x'; it must be auto, None or one of openai"):
        Tokenizer(tmp_path, ChatConfig(tool_call_parser="x"))
    with pytest.raises(ValueError, match="set both, or neither"):
        Tokenizer(tmp_path, ChatConfig(tool_call_parser="openai"))
    with pytest.raises(ValueError, match="tool_call_parser is ''; it must be text"):
        ChatConfig(tool_call_parser="")


def test_a_chat_template_from_a_file(tmp_path):
    chat_model(tmp_path)
    path = tmp_path / "other.jinja"
    path.write_text(
        "{{ messages[0].content }} [TOOL_CALLS]{% for t in tools or [] %} {{ t.function.name }}{% endfor %}"
    )
    tokenizer = Tokenizer(tmp_path, ChatConfig(chat_template=str(path)))
    assert tokenizer.chat_format.tool_call_parser == "mistral"
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.render_chat(messages, tools=TOOLS) == "hi [TOOL_CALLS] weather time"
    with pytest.raises(ValueError, match=r"chat_template is '.*missing'; the file cannot be read"):
        Tokenizer(tmp_path, ChatConfig(chat_template=str(tmp_path / "missing")))


def test_an_effort_for_a_template_that_knows_it(tmp_path):
    path = tmp_path / "effort.jinja"
    path.write_text("{{ messages[0].content }}: {{ reasoning_effort }}")
    tokenizer = chat_model(tmp_path, chat=ChatConfig(chat_template=str(path)))
    body = {"messages": [{"role": "user", "content": "hi"}], "reasoning_effort": "low"}
    assert parse_body(CHAT_URL, body).single_prompt(tokenizer) == "hi: low"


def test_a_message_that_is_continued_is_open_where_it_is():
    format_ = ChatFormat(ChatConfig(reasoning_parser="deepseek_r1"), "", {})
    for message, opened in (("<think>Hm", True), ("<think>Hm</think>An", False), ("An", False)):
        continued = Chat([{"role": "assistant", "content": message}], continue_final_message=True)
        assert format_.plan(continued, f"<｜Assistant｜>{message}", SamplingParams()).begins_open is opened
    assert format_.plan(HI, "<｜Assistant｜>", SamplingParams()).begins_open, "this model always thinks"


def test_ids_of_calls(tmp_path):
    plan = ChatFormat(ChatConfig(tool_call_parser="mistral"), "", {}).plan(chat(tools()), "", SamplingParams())
    assert len({plan.call_id() for _ in range(20)}) == 20
    assert {len(plan.call_id()) for _ in range(20)} == {9}, "which Mistral's templates ask for"
