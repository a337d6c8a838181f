"""What a request says of its output's structure: its parameters, and how bodies give them."""

from __future__ import annotations

import dataclasses
import math
import pathlib

import pytest

import jaxserve
from jaxserve.config.settings import EngineConfig
from jaxserve.config.structured_outputs_config import StructuredOutputsConfig
from jaxserve.frontend.openai import CHAT_URL, COMPLETIONS_URL, parse_body
from jaxserve.sampling_params import SamplingParams
from jaxserve.structured_outputs import StructuredOutputsParams


def test_it_is_imported_from_jaxserve_and_kept_as_text():
    assert jaxserve.StructuredOutputsParams is StructuredOutputsParams
    given = StructuredOutputsParams(json={"type": "string", "title": "ä"})
    assert given.json == '{"type":"string","title":"ä"}'
    assert given == StructuredOutputsParams(json=given.json)
    assert given.digest() == StructuredOutputsParams(json=given.json).digest()
    assert given.digest() != StructuredOutputsParams(json=given.json, disable_any_whitespace=True).digest()
    assert SamplingParams(structured_outputs=given).structured_outputs is given
    assert StructuredOutputsParams(choice=["a"]).as_dict() == {"choice": ["a"]}


def deep(levels: int) -> dict:
    value: dict = {}
    for _ in range(levels):
        value = {"not": value}
    return value


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "structured_outputs must have exactly one of json, regex, .*; it has none"),
        ({"regex": "a", "choice": ["a"]}, "structured_outputs must have exactly one of .*; it has regex and choice"),
        ({"json_object": False}, "structured_outputs must have exactly one"),
        ({"json": 5}, r"structured_outputs\.json is 5; it must be an object"),
        ({"json": ""}, r"structured_outputs\.json is ''; it must be a text"),
        ({"json": {"a": math.nan}}, r"structured_outputs\.json is no JSON"),
        ({"json": {"a": object()}}, r"structured_outputs\.json is no JSON"),
        ({"json": deep(60_000)}, r"structured_outputs\.json is nested too deep"),
        ({"regex": "\ud800"}, r"structured_outputs\.regex has a lone surrogate"),
        ({"regex": 5}, r"structured_outputs\.regex is 5; it must be a text"),
        ({"choice": []}, r"structured_outputs\.choice is \[\]; it must be a list of at least one"),
        ({"choice": "ab"}, r"structured_outputs\.choice is 'ab'; it must be a list"),
        ({"choice": ["a", 5]}, r"structured_outputs\.choice is 5; it must be a text"),
        ({"choice": ["x"] * 5000}, r"structured_outputs\.choice has 5000 texts; at most 4096"),
        ({"json_object": 1}, r"structured_outputs\.json_object is 1; it must be true or false"),
        ({"regex": "a", "disable_any_whitespace": 1}, r"structured_outputs\.disable_any_whitespace is 1; it must be"),
    ],
)
def test_bad_parameters_name_their_field(given, message):
    with pytest.raises(ValueError, match=message) as caught:
        StructuredOutputsParams(**given)
    assert len(str(caught.value)) < 400


SCHEMA = {"type": "object", "properties": {"a": {"type": "null"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": SCHEMA, "description": "d"}}
TAG = {"type": "structural_tag", "format": {"type": "any_text"}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"json_object": True}),
        ({"response_format": FORMAT}, {"json": SCHEMA}),
        ({"response_format": TAG}, {"structural_tag": TAG}),
        ({"structured_outputs": {"json": SCHEMA, "regex": None}}, {"json": SCHEMA}),
        ({"structured_outputs": {"json": '{"type": "null"}'}}, {"json": '{"type": "null"}'}),
        ({"structured_outputs": {"choice": ["a", "b"]}}, {"choice": ["a", "b"]}),
        ({"guided_json": SCHEMA}, {"json": SCHEMA}),
        ({"guided_json": SCHEMA, "guided_whitespace_pattern": " "}, {"json": SCHEMA, "whitespace_pattern": " "}),
        ({"guided_regex": "a+"}, {"regex": "a+"}),
        ({"guided_choice": ["a"]}, {"choice": ["a"]}),
        ({"guided_grammar": "start: /a/"}, {"grammar": "start: /a/"}),
    ],
)
@pytest.mark.parametrize("url", [COMPLETIONS_URL, CHAT_URL])
def test_fields_of_a_body(url, fields, expected):
    own = {"prompt": "a"} if url == COMPLETIONS_URL else {"messages": [{"role": "user", "content": "a"}]}
    found = parse_body(url, own | fields).params.structured_outputs
    assert found == (None if expected is None else StructuredOutputsParams(**expected))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema is None; it must be an object"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "json_schema has no schema; give"),
        ({"response_format": {"type": "json_object", "schema": {}}}, "response_format has the unknown field 'schema'"),
        (
            {"response_format": FORMAT, "guided_regex": "a"},
            "response_format and guided_regex both constrain the",
        ),
        ({"structured_outputs": {"reg": "a"}}, "structured_outputs has the unknown field 'reg'; known are json, regex"),
        ({"structured_outputs": "a"}, "structured_outputs is 'a'; it must be an object with one of"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern is of guided_json; give both, or neither"),
    ],
)
def test_fields_of_a_body_that_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        parse_body(COMPLETIONS_URL, {"prompt": "a"} | fields)


def test_settings_bound_grammars():
    config = EngineConfig.from_options(model="x", max_grammar_bytes=10, mask_threads=3)
    assert config.structured_outputs == StructuredOutputsConfig(max_grammar_bytes=10, mask_threads=3)
    for field in dataclasses.fields(StructuredOutputsConfig):
        with pytest.raises(ValueError, match=f"^{field.name} is 0; it must be "):
            StructuredOutputsConfig(**{field.name: 0})
    page = (pathlib.Path(__file__).parents[1] / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| `StructuredOutputsConfig.")]
    for field in dataclasses.fields(StructuredOutputsConfig):
        assert any(f"{field.name}`" in row for row in rows), field.name
