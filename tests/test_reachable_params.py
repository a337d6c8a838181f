"""Every sampling parameter can be set in every way that there is, also one that is added to the table tomorrow."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from smg_grpc_proto.generated import vllm_engine_pb2

from jaxserve import client as command
from jaxserve.config import plain_params
from jaxserve.config.plain_params import Form, params_of, plain_fields, written
from jaxserve.config.sampling_fields import Ids, Number, OneOf, Texts, Whole, sampling
from jaxserve.frontend.openai import CHAT_URL, COMPLETIONS_URL, Dialect, parse_body
from jaxserve.sampling_params import SAMPLING_FIELDS, SamplingParams
from jaxserve.serving.clients.client_results import Conversation
from jaxserve.serving.clients.http_client import generate_body
from jaxserve.serving.clients.sampling_flags import given_params
from jaxserve.serving.grpc_port import convert, proto_values, vllm_convert
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2

HTTP = Dialect(streams=True, lower_first=True)
MESSAGES = [{"role": "user", "content": "hi"}]

EXAMPLES: Mapping[str, Any] = {
    "n": 2,
    "temperature": 0.5,
    "top_p": 0.25,
    "top_k": 7,
    "min_p": 0.125,
    "typical_p": 0.5,
    "seed": 11,
    "presence_penalty": -0.5,
    "frequency_penalty": 1.5,
    "repetition_penalty": 1.25,
    "logit_bias": {"5": -1.5, "9": 100.0},
    "allowed_token_ids": [3, 4],
    "bad_words": ["ab", "c d"],
    "min_tokens": 2,
    "max_tokens": 9,
    "stop": ["a", "b"],
    "stop_token_ids": [5, 6],
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    "logprobs": 3,
    "prompt_logprobs": 2,
    "detokenize": False,
    "truncate_prompt_tokens": -1,
    "output_kind": "final_only",
    "structured_outputs": {"regex": "[ab]+"},
    "use_beam_search": True,
    "length_penalty": 0.5,
    "early_stopping": "never",
}
"""A value, not the default, of each parameter, as JSON has it."""

BESIDE: Mapping[str, dict[str, Any]] = {
    "length_penalty": {"use_beam_search": True},
    "early_stopping": {"use_beam_search": True},
}
"""What a parameter needs beside it."""

WITHOUT_FALSE = {"skip_special_tokens", "spaces_between_special_tokens"}
"""Parameters that are true by default, and of which the gateway's messages cannot say that they are false."""


def arguments(name: str, value: Any) -> list[str]:
    """The command line's words for a value."""
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, list):
        return [word for one in value for word in (flag, str(one))]
    if plain_fields()[name].form is Form.MAPPING:
        return [word for key, one in value.items() for word in (flag, f"{key}={one}")]
    return [flag, json.dumps(value) if isinstance(value, dict) else str(value)]


def from_command_line(*words: str) -> dict[str, Any]:
    parser, actions = command._parser()
    others, _, _ = command.split_prompt(words, actions)
    return given_params(parser.parse_args(others))


def http_body(name: str, value: Any, url: str) -> dict[str, Any]:
    if url == COMPLETIONS_URL:
        return {"prompt": "hi", name: value}
    if name == "logprobs":  # a flag there, and the number beside it
        return {"messages": MESSAGES, "logprobs": True, "top_logprobs": value}
    return {"messages": MESSAGES, name: value}


@pytest.mark.parametrize("name", SAMPLING_FIELDS)
def test_a_parameter_can_be_set_in_every_way(name):
    assert name in EXAMPLES, f"give {name} an example here, other than its default"
    value, beside = EXAMPLES[name], BESIDE.get(name, {})
    expected = params_of({name: value, **beside}, {})
    assert getattr(expected, name) != SAMPLING_FIELDS[name].default, "the example is the default"

    # Python.
    if not isinstance(value, dict):
        assert SamplingParams(**{name: value}, **beside) == expected

    # jaxserve.v1: as a whole, and alone.
    assert name in jaxserve_pb2.SamplingParams.DESCRIPTOR.fields_by_name
    for sent in (expected, {name: value, **beside}):
        wire = convert.params_to_proto(sent).SerializeToString()
        assert convert.params_from_proto(jaxserve_pb2.SamplingParams.FromString(wire)) == expected

    # HTTP, and lines of a batch.
    for url in (COMPLETIONS_URL, CHAT_URL):
        for dialect in (HTTP, Dialect()):
            assert parse_body(url, http_body(name, value, url) | beside, dialect).params == expected

    # The client's HTTP bodies.
    for prompt in ("hi", Conversation(MESSAGES)):
        for sent in (expected, {name: value, **beside}):
            url, body = generate_body(prompt, sent)
            if name == "prompt_logprobs":  # refused in streams, and the client always asks for one
                del body["stream"], body["stream_options"]
            assert parse_body(url, json.loads(json.dumps(body)), HTTP).params == expected

    # The command line.
    words = [word for part in (beside, {name: value}) for one in part.items() for word in arguments(*one)]
    given = from_command_line(*words, "hi")
    assert set(given) == {"temperature", name, *beside}  # greedy, unless it says otherwise
    assert params_of({one: given[one] for one in (name, *beside)}, {}) == expected


GATEWAY_CONSTRAINTS = ("json_schema", "regex", "grammar", "structural_tag", "json_object", "choice")


@pytest.mark.parametrize(
    "name", [name for name in SAMPLING_FIELDS if name in vllm_engine_pb2.SamplingParams.DESCRIPTOR.fields_by_name]
)
def test_a_parameter_that_the_gateway_has_can_be_set_by_it(name):
    value = True if name in WITHOUT_FALSE else EXAMPLES[name]
    proto = proto_values.made(vllm_engine_pb2.SamplingParams, {name: written({name: value})[name]})
    got = convert_of_gateway(proto)
    assert getattr(got, name) == getattr(params_of({name: value}, {}), name)
    assert got == dataclasses.replace(SamplingParams(), **{name: getattr(got, name)})


def convert_of_gateway(proto: Any) -> SamplingParams:
    return vllm_convert.params_from_proto(vllm_engine_pb2.SamplingParams.FromString(proto.SerializeToString()))


def test_the_constraints_that_the_gateway_has_can_be_set_by_it():
    values = {
        "json_schema": ("json", '{"type": "object"}'),
        "regex": ("regex", "a+"),
        "grammar": ("grammar", 'start: "a"'),
        "structural_tag": ("structural_tag", "{}"),
        "json_object": ("json_object", True),
        "choice": ("choice", ["a", "b"]),
    }
    assert set(values) == set(GATEWAY_CONSTRAINTS)
    for name, (own, value) in values.items():
        given = vllm_engine_pb2.ChoiceConstraint(choices=value) if name == "choice" else value
        if name == "structural_tag":
            continue  # its content is checked
        got = convert_of_gateway(vllm_engine_pb2.SamplingParams(**{name: given, "grammar_from_first_token": True}))
        assert got == params_of({"structured_outputs": {own: value}}, {})


# ---- rows that are made up ------------------------------------------------------------------------------------------


class Taste(enum.Enum):
    SWEET = 1
    VERY_SOUR = 2


@dataclasses.dataclass(frozen=True)
class Recipe:
    regex: str | None = None
    choice: Sequence[str] | None = None
    json: str | dict | None = None


@dataclasses.dataclass(frozen=True)
class Anything:
    limits = "anything"

    def checked(self, name: str, value: Any) -> Any:
        return tuple(sorted(value.items())) if isinstance(value, Mapping) else value


@dataclasses.dataclass(frozen=True, kw_only=True)
class More(SamplingParams):
    epsilon: float = dataclasses.field(default=0.0, metadata=sampling(Number(0.0, 1.0), "made up"))
    weights: tuple[tuple[int, float], ...] = dataclasses.field(default=(), metadata=sampling(Anything(), "made up"))
    ids: tuple[int, ...] = dataclasses.field(default=(), metadata=sampling(Ids(4), "made up"))
    words: tuple[str, ...] = dataclasses.field(default=(), metadata=sampling(Texts(4, 9), "made up"))
    taste: Taste | None = dataclasses.field(default=None, metadata=sampling(OneOf(Taste), "made up"))
    recipe: Recipe | None = dataclasses.field(default=None, metadata=sampling(Anything(), "made up"))

    def __post_init__(self) -> None:
        for name, field in plain_fields(More).items():
            object.__setattr__(self, name, field.row.checked(getattr(self, name)))


MADE_UP = {
    "epsilon": (0.5, 0.5),
    "weights": ({"7": 1.5, "2": -1.0}, ((2, -1.0), (7, 1.5))),
    "ids": ([4, 5], (4, 5)),
    "words": (["x", "y z"], ("x", "y z")),
    "taste": ("very_sour", Taste.VERY_SOUR),
    "recipe": ({"choice": ["a", "b"], "json": {"type": "object"}}, Recipe(choice=["a", "b"], json={"type": "object"})),
}


@pytest.fixture
def more(monkeypatch):
    monkeypatch.setattr(plain_params, "SamplingParams", More)


def made_up_proto():
    """A message with fields for the rows that are made up."""
    types = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="made_up.proto", package="made_up", syntax="proto3")
    taste = file.enum_type.add(name="TasteKind")
    for number, word in enumerate(("UNSPECIFIED", "SWEET", "VERY_SOUR")):
        taste.value.add(name=f"TASTE_KIND_{word}", number=number)
    choices = file.message_type.add(name="Choices")
    choices.field.add(name="choices", number=1, label=types.LABEL_REPEATED, type=types.TYPE_STRING)
    recipe = file.message_type.add(name="Recipe")
    recipe.oneof_decl.add(name="what")
    recipe.field.add(name="regex", number=1, label=1, type=types.TYPE_STRING, oneof_index=0)
    recipe.field.add(name="choice", number=2, label=1, type=types.TYPE_MESSAGE, type_name=".made_up.Choices")
    recipe.field.add(name="json", number=3, label=1, type=types.TYPE_STRING)
    params = file.message_type.add(name="Params")
    entry = params.nested_type.add(name="WeightsEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=1, type=types.TYPE_INT32)
    entry.field.add(name="value", number=2, label=1, type=types.TYPE_DOUBLE)
    params.field.add(name="epsilon", number=1, label=1, type=types.TYPE_DOUBLE)
    params.field.add(
        name="weights", number=2, label=3, type=types.TYPE_MESSAGE, type_name=".made_up.Params.WeightsEntry"
    )
    params.field.add(name="ids", number=3, label=types.LABEL_REPEATED, type=types.TYPE_INT32)
    params.field.add(name="words", number=4, label=types.LABEL_REPEATED, type=types.TYPE_STRING)
    params.field.add(name="taste", number=5, label=1, type=types.TYPE_ENUM, type_name=".made_up.TasteKind")
    params.field.add(name="recipe", number=6, label=1, type=types.TYPE_MESSAGE, type_name=".made_up.Recipe")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("made_up.Params"))


def test_rows_that_are_made_up_need_nothing_else_of_bodies_and_flags(more):
    for name, (plain, stored) in MADE_UP.items():
        expected = More(**{name: stored})
        for url in (COMPLETIONS_URL, CHAT_URL):
            assert parse_body(url, http_body(name, plain, url), HTTP).params == expected
            assert parse_body(url, http_body(name, plain, url)).params == expected
        given = from_command_line(*arguments(name, plain), "hi")
        assert params_of({name: given[name]}, {}) == expected
        url, body = generate_body("hi", expected)
        assert parse_body(url, json.loads(json.dumps(body)), HTTP).params == expected


def test_rows_that_are_made_up_need_nothing_else_of_messages(more):
    message = made_up_proto()
    for name, (plain, stored) in MADE_UP.items():
        values = {name: written({name: plain})[name]}
        read = proto_values.read_fields(message.FromString(proto_values.made(message, values).SerializeToString()))
        if name == "recipe":  # the schema is text there
            stored = dataclasses.replace(stored, json='{"type": "object"}')
        assert params_of(read, {}) == More(**{name: stored})
    assert proto_values.read_fields(message()) == {}
    unknown = message.FromString(bytes([5 << 3, 9]))
    with pytest.raises(ValueError, match=r"^taste is 9; it must be one of sweet, very_sour$"):
        proto_values.read_fields(unknown)


@pytest.mark.parametrize(
    ("body", "line"),
    [
        ({"weights": {"x": 1}}, "weights has the key 'x'; its keys must be token ids"),
        ({"weights": {"5": 1, "05": 2}}, "weights has the token id 5 twice; give it once"),
        ({"weights": [1]}, r"weights is \[1\]; it must be an object of token ids and numbers"),
        ({"recipe": {"regx": "a"}}, "recipe has the unknown field 'regx'; did you mean regex?"),
        ({"recipe": "a"}, "recipe is 'a'; it must be an object"),
        ({"taste": "bitter"}, "taste is 'bitter'; it must be one of sweet, very_sour"),
        ({"taste": 2}, "taste is 2; it must be one of sweet, very_sour"),
        ({"ids": 5}, "ids is 5; it must be a list of token ids"),
        ({"words": 5}, "words is 5; it must be text or a list of texts"),
        ({"wurds": "a"}, "body has the unknown field 'wurds'; did you mean words?"),
    ],
)
def test_plain_values_of_the_wrong_form_are_refused_by_name(more, body, line):
    with pytest.raises(ValueError, match=f"^{line}$".replace("?$", r"\?$")):
        parse_body(COMPLETIONS_URL, {"prompt": "hi", **body}, HTTP)


# ---- unknown names --------------------------------------------------------------------------------------------------


def test_an_unknown_name_is_told_with_the_nearest_one():
    line = r"; did you mean temperature\?"
    with pytest.raises(ValueError, match="SamplingParams has no field 'temprature'" + line):
        SamplingParams(temprature=0.5)
    with pytest.raises(TypeError, match="SamplingParams has no field"):
        SamplingParams(temprature=0.5)
    with pytest.raises(ValueError, match="sampling parameter 'temprature' is unknown" + line):
        convert.params_to_proto({"temprature": 0.5})
    for url, own in ((COMPLETIONS_URL, {"prompt": "hi"}), (CHAT_URL, {"messages": MESSAGES})):
        for dialect in (HTTP, Dialect()):
            with pytest.raises(ValueError, match="body has the unknown field 'temprature'" + line):
                parse_body(url, {**own, "temprature": 0.5}, dialect)
    with pytest.raises(ValueError, match=r"there is no option --temprature; did you mean --temperature\?"):
        from_command_line("--temprature", "1", "hi")
    with pytest.raises(ValueError, match=r"SamplingParams has no field 'x+\.\.\.x+'; known are"):
        SamplingParams(**{"x" * 100_000: 1})


# ---- bad values -----------------------------------------------------------------------------------------------------

NUMERIC = [name for name, row in SAMPLING_FIELDS.items() if isinstance(row.kind, Number | Whole)]
WRONG = [
    math.nan,
    math.inf,
    -math.inf,
    1e308,
    -1e308,
    10**400,
    -(10**400),
    2**63,
    -(2**63) - 1,
    "1",
    [1],
    {},
    True,
    b"1",
]


@pytest.mark.parametrize("name", NUMERIC)
@pytest.mark.parametrize("value", WRONG, ids=lambda value: str(value)[:12])
def test_a_number_that_is_none_or_out_of_range_is_named_with_its_value_and_the_limit(name, value):
    """In Python, in bodies of both URLs and in lines of a batch alike."""
    with pytest.raises(ValueError, match=f"^{name} is .*; it must be ") as caught:
        SamplingParams(**{name: value})
    assert len(str(caught.value)) < 400
    for url in (COMPLETIONS_URL, CHAT_URL):
        for dialect in (HTTP, Dialect()):
            with pytest.raises(ValueError, match=f"^({name}|top_logprobs|logprobs) is .*; it must be "):
                parse_body(url, http_body(name, value, url), dialect)
    if isinstance(value, float) or (isinstance(value, int) and not isinstance(value, bool)):
        with pytest.raises(ValueError, match=f"^{name} is .*; it must be "):
            convert.params_to_proto({name: value})


@pytest.mark.parametrize("name", NUMERIC)
def test_the_ends_of_a_range_are_taken_and_what_is_beyond_is_not(name):
    kind = SAMPLING_FIELDS[name].kind
    least = kind.high if isinstance(kind, Number) and kind.open_low else kind.low
    for value in {least, kind.high}:
        params = {"max_tokens": kind.high} if name == "min_tokens" else BESIDE.get(name, {})
        assert getattr(SamplingParams(**{name: value, **params}), name) == value
    for value in (kind.low - 1, kind.high + max(1, abs(kind.high))):
        with pytest.raises(ValueError, match=f"^{name} is "):
            SamplingParams(**{name: value})


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, r"min_tokens is 5; it must be at most max_tokens 4"),
        (
            {"stop": ["a"], "detokenize": False},
            r"stop is \('a',\) and detokenize is False; stop strings are looked for",
        ),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens is 0; it must be from -1 to 2147483647, and not 0"),
        ({"output_kind": "partial"}, "output_kind is 'partial'; it must be one of cumulative, delta, final_only"),
        ({"detokenize": "yes"}, "detokenize is 'yes'; it must be true or false"),
    ],
)
def test_contradictions_and_words_are_told(options, line):
    with pytest.raises(ValueError, match=f"^{line}"):
        SamplingParams(**options)
    for url, own in ((COMPLETIONS_URL, {"prompt": "hi"}), (CHAT_URL, {"messages": MESSAGES})):
        with pytest.raises(ValueError, match=f"^{line}"):
            parse_body(url, own | options, HTTP)
