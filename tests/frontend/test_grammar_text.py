"""Grammars as llguidance takes them: what texts they accept, by its matcher over bytes."""

from __future__ import annotations

import json
import re

import llguidance
import pytest

from jaxserve.frontend.grammar_text import check_depth, grammar_of
from jaxserve.structured_outputs import StructuredOutputsParams
from tests.frontend.tokenizer_kinds import kind

BYTES = llguidance.LLTokenizer("byte")


def accepts(grammar: str, text: str) -> bool:
    matcher = llguidance.LLMatcher(BYTES, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    data = text.encode()
    return matcher.try_consume_tokens(list(data)) == len(data) and matcher.is_accepting()


def accepted(params: StructuredOutputsParams, *texts: str) -> list[bool]:
    grammar = grammar_of(params, {}, 100)
    return [accepts(grammar, text) for text in texts]


SCHEMA = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "integer"}}}, "required": ["a"]}


def test_json_in_the_layouts_that_people_write():
    texts = [json.dumps({"a": [1, 2]}, **layout) for layout in ({}, {"separators": (",", ":")}, {"indent": 4})]
    assert accepted(StructuredOutputsParams(json=SCHEMA), *texts) == [True, True, True]
    assert accepted(StructuredOutputsParams(json=SCHEMA), '{"b": 1}', '{"a": ["1"]}', '{"a": []') == [False] * 3
    endless = '{ \n \n \n "a": []}', '{"a":   []}', '{"a":' + " " * 50 + "[]}"
    assert accepted(StructuredOutputsParams(json=SCHEMA), *endless) == [False] * 3
    tight = StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True)
    assert accepted(tight, *texts) == [False, True, False]
    own = StructuredOutputsParams(json=SCHEMA, whitespace_pattern="_")
    assert accepted(own, '{"a"_:[]}', '{"a": []}') == [True, False]


def test_properties_that_a_schema_does_not_name():
    text = '{"a": [], "b": 1}'
    assert accepted(StructuredOutputsParams(json=SCHEMA), text) == [True]
    assert accepted(StructuredOutputsParams(json=SCHEMA, disable_additional_properties=True), text) == [False]
    assert accepted(StructuredOutputsParams(json_object=True), text, "[]", "1") == [True, False, False]


def test_choices_are_taken_as_they_are():
    texts = ['say "x"', "a/b", "\\n", "\n", "日本", "#", "{", "'", "a|b", "\0", "x\u2028y"]
    choice = StructuredOutputsParams(choice=texts)
    assert accepted(choice, *texts) == [True] * len(texts)
    assert accepted(choice, "a", "say x", "", "日") == [False] * 4


def test_regular_expressions_match_the_whole_output():
    assert accepted(StructuredOutputsParams(regex='a/b"|c\n#d'), 'a/b"', "c\n#d", "a/b", 'xa/b"') == [
        True,
        True,
        False,
        False,
    ]
    assert accepted(StructuredOutputsParams(regex='[/"]{2}'), '/"', "//", "/") == [True, True, False]


def test_classes_of_characters_are_what_every_notation_agrees_on():
    """The rules are those of Python, for any character that is let through."""
    texts = [
        *map(chr, range(0x100)),
        *map(chr, range(0x100, 0x250, 7)),
        "\u0903",
        "\u0661",
        "²",
        "½",
        "\u2028",
        "\u3000",
        "字",
        "\ufeff",
        "😀",
    ]
    for pattern in (r"\d", r"\w", r"\s", r"\D", r"\W", r"\S", r"[\w.]", r"[^\d\s]", r"[^\W]", r"[^a\S]"):
        grammar = grammar_of(StructuredOutputsParams(regex=pattern), {}, 100)
        found = [text for text in texts if accepts(grammar, text)]
        assert all(re.fullmatch(pattern, text) for text in found), pattern
        assert {text for text in texts if text.isascii() and re.fullmatch(pattern, text, re.ASCII)} - set(found) <= set(
            "\x1c\x1d\x1e\x1f"
        )
    assert accepted(StructuredOutputsParams(regex=r"\\w"), "\\w", "\\a") == [True, False]


def test_grammars_in_both_notations():
    lark = 'start: "(" start ")" | NAME\nNAME: /[a-zé]+/'
    gbnf = 'root ::= "(" root ")" | name\nname ::= [a-z]+'
    for grammar in (lark, gbnf):
        assert accepted(StructuredOutputsParams(grammar=grammar), "((x))", "((x)", "()") == [True, False, False]


OLD = {
    "structures": [
        {"begin": "<f=a>", "schema": {"type": "integer"}, "end": "</f>"},
        {"begin": "<f=b>", "schema": {"type": "null"}, "end": "</f>"},
    ],
    "triggers": ["<f="],
}


def tag(value: dict) -> StructuredOutputsParams:
    return StructuredOutputsParams(structural_tag={"type": "structural_tag", "format": value})


def test_structural_tags_of_the_older_form():
    params = StructuredOutputsParams(structural_tag=OLD)
    good = ("", "text\n", "a<f=a>12</f>b", "<f=a>1</f><f=b>null</f>", "<f")
    assert accepted(params, *good) == [True] * len(good)
    assert accepted(params, "<f=c>", "<f=a>x</f>", "<f=b>1</f>", "<f=a>1") == [False] * 4


def test_structural_tags_of_the_newer_form():
    number = {"type": "json_schema", "json_schema": {"type": "integer"}}
    one, two = ({"begin": f"<{name}>", "content": number, "end": f"</{name}>"} for name in "ab")
    assert accepted(tag({"type": "tag", **one}), "<a>1</a>", "<a>x</a>", "x<a>1</a>") == [True, False, False]
    text = tag({"type": "tag", "begin": "<t>", "content": {"type": "any_text"}, "end": ["</t>", "</u>"]})
    assert accepted(text, "<t>x\n<</t>", "<t></u>", "<t>x", "<t></t>x") == [True, True, False, False]
    several = {"type": "triggered_tags", "triggers": ["<a", "<b"], "tags": [one, two]}
    assert accepted(tag(several), "x", "x<a>1</a>y<b>2</b>", "<a>x") == [True, True, False]
    assert accepted(tag(several | {"at_least_one": True}), "x", "x<b>1</b>y") == [False, True]
    first = tag(several | {"at_least_one": True, "stop_after_first": True})
    assert accepted(first, "x<b>1</b>", "x<b>1</b>y") == [True, False]
    listed = {"type": "tags_with_separator", "tags": [one, two], "separator": ", ", "at_least_one": True}
    assert accepted(tag(listed), "<a>1</a>, <b>2</b>", "<a>1</a>", "", "<a>1</a>,") == [True, True, False, False]
    either = {
        "type": "or",
        "elements": [{"type": "const_string", "value": "#/"}, {"type": "regex", "pattern": "[0-9/]+"}],
    }
    assert accepted(tag({"type": "sequence", "elements": [either, number]}), "#/-1", "12/ 3", "#1") == [
        True,
        False,
        False,
    ]


def test_texts_of_special_tokens_become_the_tokens():
    vocabulary_ids = {"<bos>": 1, "[END]": 7}
    value = {"type": "tag", "begin": "<bos>{", "content": {"type": "any_text"}, "end": "[END]"}
    grammar = grammar_of(tag(value), vocabulary_ids, 100)
    assert 'start: (<[1]> "{" r0 (<[7]>))' in grammar
    triggered = {"type": "triggered_tags", "triggers": ["<bos>"], "tags": [value]}
    assert "r0 <[1]>" in grammar_of(tag(triggered), vocabulary_ids, 100) or "<[1]>" in grammar_of(
        tag(triggered), vocabulary_ids, 100
    )
    assert kind("tiny").token_to_id("<bos>") == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"type": "nothing"}, r"structural_tag\.format\.type is 'nothing'; known are"),
        ({"type": "tag", "begin": "a"}, r"structural_tag\.format has no end"),
        ({"type": "sequence", "elements": []}, r"structural_tag\.format\.elements is \[\]; it must be a list"),
        ({"type": "triggered_tags", "triggers": ["x"], "tags": [{"begin": "y"}]}, r"tags\[0\]\.begin is 'y'; none of"),
    ],
)
def test_a_structural_tag_that_is_malformed(value, message):
    with pytest.raises(ValueError, match=message):
        grammar_of(tag(value), {}, 100)


def test_depth_counts_what_is_not_in_strings():
    check_depth("json", '{"a": "[[[[[[[[\\"[[["}', 1)
    check_depth("json", "[[]]" * 50, 2)
    with pytest.raises(ValueError, match=r"^json is nested more than 2 deep \(max_grammar_depth\)"):
        check_depth("json", "[[[]]]", 2)
