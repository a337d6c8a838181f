import dataclasses
import math

import pytest

from jaxserve.config import plain_params
from jaxserve.request import FinishReason
from jaxserve.sampling_params import SAMPLING_FIELDS, SamplingParams
from jaxserve.serving.grpc_port import convert
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb
from jaxserve.structured_outputs import StructuredOutputsParams


def test_unset_parameters_have_the_defaults_of_sampling_params():
    assert convert.params_from_proto(pb.SamplingParams()) == SamplingParams()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.0, top_k=-1, top_p=0.25, min_p=0.5, seed=0, max_tokens=1),
        SamplingParams(
            temperature=0.7,
            seed=2**63 - 1,
            n=7,
            max_tokens=2**31 - 1,
            min_tokens=3,
            stop=("a", "\n\n"),
            stop_token_ids=(1, 2),
            ignore_eos=True,
        ),
        SamplingParams(
            typical_p=0.5,
            presence_penalty=-2.0,
            frequency_penalty=0.25,
            repetition_penalty=1.5,
            logit_bias={7: -100.0, 3: 0.5},  # type: ignore[arg-type]
            allowed_token_ids=(5, 3, 7),
            bad_words=("a", " b"),
            seed=-(2**63),
        ),
        *(
            SamplingParams(structured_outputs=StructuredOutputsParams(**given))
            for given in (
                {"json": {"type": "object"}, "disable_additional_properties": True},
                {"json_object": True, "whitespace_pattern": " "},
                {"json_object": True, "disable_any_whitespace": True},
                {"regex": "[ä]+"},
                {"choice": ["a", "ß\n"]},
                {"grammar": "start: /a/"},
                {"structural_tag": {"type": "structural_tag", "format": {"type": "any_text"}}},
            )
        ),
    ],
)
def test_parameters_survive_the_wire(params):
    wire = convert.params_to_proto(params).SerializeToString()
    assert convert.params_from_proto(pb.SamplingParams.FromString(wire)) == params


def test_every_parameter_of_the_wire_is_a_row_of_the_table_with_its_default():
    names = [field.name for field in pb.SamplingParams.DESCRIPTOR.fields]
    assert set(names) <= set(SAMPLING_FIELDS)
    assert set(names) == {field.name for field in dataclasses.fields(SamplingParams)}, "the wire carries all today"
    for field in pb.SamplingParams.DESCRIPTOR.fields:
        default = SAMPLING_FIELDS[field.name].default
        if field.enum_type is not None:
            assert default is None, f"{field.name} unset on the wire is none"
            continue
        if field.name == "allowed_token_ids":
            assert default is None  # and no list of it is empty, so that an empty one is unset
            continue
        unset = () if field.is_repeated else field.default_value
        assert field.has_presence or default == unset, f"{field.name} unset on the wire is {unset}, not {default}"


def test_a_parameter_that_the_wire_does_not_have_is_refused_unless_it_asks_for_nothing(monkeypatch):
    without = {name: field for name, field in convert._PARAMETERS.items() if name != "min_p"}
    monkeypatch.setattr(convert, "_PARAMETERS", without)
    monkeypatch.setattr(plain_params, "GENERATION_CONFIG", {"temperature": "temperature", "top_p": "top_p"})
    assert convert.params_to_proto(SamplingParams(top_k=3)) == pb.SamplingParams(temperature=1.0, top_k=3, top_p=1.0)
    with pytest.raises(ValueError, match=r"min_p is 0\.5; the gRPC API does not have it"):
        convert.params_to_proto(SamplingParams(min_p=0.5))


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.SamplingParams(temperature=math.nan), "temperature"),
        (pb.SamplingParams(temperature=math.inf), "temperature"),
        (pb.SamplingParams(temperature=-1), "temperature"),
        (pb.SamplingParams(top_p=0), "top_p"),
        (pb.SamplingParams(min_p=math.nan), "min_p"),
        (pb.SamplingParams(top_k=-2), "top_k"),
        (pb.SamplingParams(typical_p=0), "typical_p"),
        (pb.SamplingParams(presence_penalty=3), "presence_penalty"),
        (pb.SamplingParams(frequency_penalty=math.nan), "frequency_penalty"),
        (pb.SamplingParams(repetition_penalty=0), "repetition_penalty"),
        (pb.SamplingParams(logit_bias={1: 200}), r"logit_bias\[1\]"),
        (pb.SamplingParams(logit_bias={-1: 1}), "logit_bias id"),
        (pb.SamplingParams(allowed_token_ids=[-1]), "allowed_token_ids"),
        (pb.SamplingParams(bad_words=[""]), "bad_words"),
        (pb.SamplingParams(max_tokens=0), "max_tokens"),
        (pb.SamplingParams(max_tokens=-5), "max_tokens"),
        (pb.SamplingParams(max_tokens=2**31), "max_tokens"),
        (pb.SamplingParams(min_tokens=2, max_tokens=1), "min_tokens"),
        (pb.SamplingParams(stop=[""]), "stop"),
        (pb.SamplingParams(stop=["x"] * 10_000), "stop"),
        (pb.SamplingParams(stop_token_ids=[-1]), "stop_token_ids"),
    ],
)
def test_bad_parameters_name_their_field(message, field):
    with pytest.raises(ValueError, match=f"^{field} "):
        convert.params_from_proto(message)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (pb.GenerateRequest(), "prompt is not set"),
        (pb.GenerateRequest(text=""), "text is empty"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "token_ids is empty"),
    ],
)
def test_a_prompt_must_be_there(request_, message):
    with pytest.raises(ValueError, match=message):
        convert.prompt_from_proto(request_)


def test_the_earlier_deadline_wins():
    request = pb.GenerateRequest(deadline=100.0)
    assert convert.deadline_from_proto(request, None) == 100.0
    assert convert.deadline_from_proto(request, 50.0) == 50.0
    assert convert.deadline_from_proto(request, 150.0) == 100.0
    assert convert.deadline_from_proto(pb.GenerateRequest(), 150.0) == 150.0
    assert convert.deadline_from_proto(pb.GenerateRequest(), None) is None
    with pytest.raises(ValueError, match="deadline is nan"):
        convert.deadline_from_proto(pb.GenerateRequest(deadline=math.nan), 1.0)


def test_every_reason_is_on_the_wire():
    for reason in (None, *FinishReason):
        assert convert.reason_from_proto(convert.reason_to_proto(reason)) is reason


def test_an_unknown_field_is_refused():
    wire = pb.GenerateRequest(text="a").SerializeToString() + bytes([0xF8, 0x07, 0x01])  # field 127, varint 1
    with pytest.raises(ValueError, match="GenerateRequest has unknown field 127"):
        convert.refuse_unknown_fields(pb.GenerateRequest.FromString(wire))
    convert.refuse_unknown_fields(pb.GenerateRequest(text="a"))


def test_every_field_and_rpc_is_documented():
    """A comment stands before each; the generated code drops them, so the file itself is read."""
    lines = (convert.pb.__file__.replace("_pb2.py", ".proto"),)
    previous = ""
    with open(lines[0], encoding="utf-8") as proto:
        for line in map(str.strip, proto):
            if line.endswith(";") and line.startswith(("rpc ", "optional ", "repeated ", "int", "double ", "bool ")):
                assert previous.startswith("//"), f"no comment before: {line}"
            previous = line
