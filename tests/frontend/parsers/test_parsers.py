"""Parsers of tool calls and reasoning: what replies stand for, however they are divided, and whatever they are."""

from __future__ import annotations

import codecs
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.frontend.parsers.pieces import CallArguments, CallStart
from tests.budgets import budget
from tests.frontend.parsers.replies import NEW, REPLIES, Parsed, parse

MARKS = (
    "<tool_call> </tool_call> <think> </think> <function=now> </function> <parameter=a> </parameter> <|python_tag|> "
    "[TOOL_CALLS] [ARGS] [CALL_ID] [THINK] [/THINK] <|channel|> <|message|> <|start|> <|end|> <|call|> <|return|> "
    'analysis final commentary assistant to=functions.now { } [ ] " \\ ; , : < / > ( ) = now( {} {"name": '
    '"parameters": "arguments": "now" é 🎉 0'
).split() + [" ", "\n", "\n\n", '{"name": "now", "parameters": {}}', '[{"name": "now", "arguments": {"a": 1}}]']


@pytest.mark.parametrize("name", REPLIES)
def test_what_a_reply_stands_for(name):
    reply = REPLIES[name]
    parsed = parse(NEW[reply.parser](), [reply.text])
    assert (parsed.content, parsed.reasoning) == (reply.content, reply.reasoning)
    assert [(name, json.loads(arguments)) for name, arguments in parsed.calls] == list(reply.calls)


@pytest.mark.parametrize("name", REPLIES)
def test_a_reply_divided_at_any_byte_is_the_same(name):
    reply = REPLIES[name]
    new, data = NEW[reply.parser], reply.text.encode()
    whole = parse(new(), [reply.text])
    assert parse(new(), _texts([data[index : index + 1] for index in range(len(data))])) == whole
    for cut in range(len(data) + 1):
        assert parse(new(), _texts([data[:cut], data[cut:]])) == whole


def _texts(parts: list[bytes]) -> list[str]:
    """The text that bytes make certain, as a detokenizer gives it."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    return [decoder.decode(part) for part in parts]


@pytest.mark.parametrize("name", [name for name in NEW if name not in ("named", "required", "required, thinking")])
@budget(60)
@given(st.lists(st.one_of(st.sampled_from(MARKS), st.text(max_size=3)), max_size=24), st.data())
def test_any_text_is_parsed_without_an_error(name, marks, data):
    text = "".join(marks)
    whole = parse(NEW[name](), [text])
    _check(whole)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    parts = [text[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert parse(NEW[name](), parts) == whole
    assert parse(NEW[name](), text) == whole


@budget(150)
@given(st.sampled_from(sorted(REPLIES)), st.data())
def test_a_mutated_reply_is_parsed_without_an_error(name, data):
    reply = REPLIES[name]
    text = reply.text
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        stop = data.draw(st.integers(start, min(start + 12, len(text))))
        text = (
            text[:start] + data.draw(st.one_of(st.just(""), st.sampled_from(MARKS), st.text(max_size=2))) + text[stop:]
        )
    whole = parse(NEW[reply.parser](), [text])
    if reply.parser not in ("named", "required", "required, thinking"):
        _check(whole)
    assert parse(NEW[reply.parser](), text) == whole


def _check(parsed: Parsed) -> None:
    """Every call has a name, and arguments that are a JSON object; all can be sent."""
    for name, arguments in parsed.calls:
        assert name
        assert isinstance(json.loads(arguments), dict)
        (name + arguments).encode()


@pytest.mark.parametrize(
    ("parser", "text"),
    [
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": NaN}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "now", "arguments": [1]}</tool_call>'),
        ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
        ("hermes", "<tool_call>" + "[" * 60_000 + "</tool_call>"),
        ("hermes", '<tool_call>{"name": "now", "arguments": ' + '{"a": ' * 60_000 + "</tool_call>"),
        ("hermes", "<tool_call></tool_call>"),
        ("hermes", '<tool_call>"' * 5_000),
        ("qwen3_coder", "<tool_call><function=></function></tool_call>"),
        ("qwen3_coder", "<tool_call>" + "<parameter=a>" * 5_000),
        ("llama3_json", '{"name": "now", "parameters": ' + "[" * 60_000),
        ("pythonic", "[now(a=" + "(" * 60_000),
        ("pythonic", "[now(a=1+1)]"),
        ("pythonic", "[now(*a)]"),
        ("mistral", "[TOOL_CALLS]" * 5_000),
        ("mistral", "[TOOL_CALLS]" + "x" * 5_000 + "{}"),
        ("mistral", "[TOOL_CALLS][]"),
        ("openai", "<|channel|>" + "x" * 5_000),
    ],
)
def test_what_is_malformed_is_text_to_the_letter(parser, text):
    expected = None if text.startswith("<|channel|>" + "x" * 1_000) else text
    parsed = parse(NEW[parser](), [text])
    assert parsed.calls == ()
    assert parsed.content == (expected or text)


def test_arguments_that_escape_half_a_character_can_be_sent():
    text = '<tool_call>{"name": "now", "arguments": {"a": "\n\\ud800"}}</tool_call>'
    ((_, arguments),) = parse(NEW["hermes"](), [text]).calls
    assert json.loads(arguments) == {"a": "\n\ud800"}
    arguments.encode()


def test_a_forced_call_that_is_cut_off_has_the_arguments_so_far():
    text = '[{"name": "now", "parameters": {"a": "b'
    assert parse(NEW["required"](), [text]).calls == (("now", '{"a": "b'),)
    assert parse(NEW["named"](), ['{"city": "P']).calls == (("get_weather", '{"city": "P'),)


def test_arguments_of_forced_calls_arrive_in_parts():
    parser = NEW["required"]()
    assert parser.feed('[{"name": "now", "parameters": {') == [CallStart("now"), CallArguments("{")]
    assert [parser.feed(part) for part in ('"a": ', '"long', ' text"}')] == [
        [CallArguments('"a": ')],
        [CallArguments('"long')],
        [CallArguments(' text"}')],
    ]


@pytest.mark.parametrize("parser", ["hermes", "qwen3_coder", "mistral", "openai", "llama3_json"])
def test_plain_text_is_not_held_back(parser):
    machine = NEW[parser]()
    parsed = "".join(piece.text for character in "A < b, so {that} is it" for piece in machine.feed(character))
    assert parsed.startswith("A < b, so {that} is")
