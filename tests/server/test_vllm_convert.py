"""What every field of the gateway's requests means here, unset and set."""

import importlib.metadata
import math

import pytest
from google.protobuf.message import DecodeError
from smg_grpc_proto.generated import vllm_engine_pb2 as pb

from jaxserve.frontend.delta import Delta
from jaxserve.request import FinishReason
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.grpc_port import vllm_convert as convert
from jaxserve.structured_outputs import StructuredOutputsParams

UNSET = SamplingParams()
REFUSED = "refused by its name"
OF_THE_TABLE = "what the row of the table takes"
NO_EFFECT = "asks for what is so anyway"

SAMPLING = {
    # field: (what its zero means, a value, what that value does)
    "temperature": ("zero is greedy; absent is the default", 0.5, 0.5),
    "top_p": ("unset", 0.5, 0.5),
    "top_k": ("unset", 7, 7),
    "min_p": ("unset", 0.125, 0.125),
    "frequency_penalty": ("unset", 0.5, OF_THE_TABLE),
    "presence_penalty": ("unset", 0.5, OF_THE_TABLE),
    "repetition_penalty": ("unset", 1.5, OF_THE_TABLE),
    "max_tokens": ("zero is refused; absent is the rest of the context", 9, 9),
    "min_tokens": ("unset", 3, 3),
    "stop": ("unset", ["a", "b"], ("a", "b")),
    "stop_token_ids": ("unset", [5, 6], (5, 6)),
    "skip_special_tokens": ("unset", True, True),
    "spaces_between_special_tokens": ("unset", True, True),
    "ignore_eos": ("unset", True, True),
    "n": ("unset", 2, OF_THE_TABLE),
    "logprobs": ("zero asks for the log probability of each token; absent is none", 1, OF_THE_TABLE),
    "prompt_logprobs": ("zero asks for the log probability of each token; absent is none", 1, OF_THE_TABLE),
    "seed": ("zero is a seed; absent draws one", 11, 11),
    "include_stop_str_in_output": ("unset", True, True),
    "logit_bias": ("unset", {5: 1.0}, OF_THE_TABLE),
    "truncate_prompt_tokens": ("zero keeps nothing of the prompt; absent is no truncation", 8, 8),
    "grammar_from_first_token": ("unset", True, NO_EFFECT),
    "json_schema": ("empty is refused; absent is none", "{}", StructuredOutputsParams(json="{}")),
    "regex": ("empty is refused; absent is none", "a+", StructuredOutputsParams(regex="a+")),
    "grammar": ("empty is refused; absent is none", "start: /a/", StructuredOutputsParams(grammar="start: /a/")),
    "structural_tag": ("empty is refused; absent is none", "{}", StructuredOutputsParams(structural_tag="{}")),
    "json_object": ("unset", True, StructuredOutputsParams(json_object=True)),
    "choice": (
        "empty is refused; absent is none",
        pb.ChoiceConstraint(choices=["a"]),
        StructuredOutputsParams(choice=("a",)),
    ),
}

REQUEST = {
    "request_id": ("unset: the server makes one", "mine", None),
    "tokenized": ("refused: no prompt", pb.TokenizedInput(input_ids=[1, 2]), None),
    "text": ("refused: no prompt", "hello", None),
    "sampling_params": ("unset: every default", pb.SamplingParams(top_k=1), None),
    "stream": ("the answer comes as one message", True, None),
    "kv_transfer_params": ("absent is none", pb.KvTransferParams(), REFUSED),
    "kv_transfer_params_json": ("unset", "{}", REFUSED),
    "mm_inputs": ("absent is none", pb.MultimodalInputs(), REFUSED),
    "extra_mm_inputs": ("unset", [pb.MultimodalInputs()], REFUSED),
    "media_refs": ("absent is none", pb.MediaRefs(), REFUSED),
    "data_parallel_rank": ("zero is the only rank; absent is any", 1, REFUSED),
}

OTHERS = {
    pb.TokenizedInput: {"original_text": "for reference; never read", "input_ids": "refused: no prompt"},
    pb.AbortRequest: {"request_ids": "aborts nothing"},
    pb.GetLoadsRequest: {"dp_rank": "the only rank; absent too", "include": "every section; so does any list"},
    pb.EmbedRequest: {"request_id": "empty: a new one", "tokenized": "refused: no prompt"},
    pb.HealthCheckRequest: {},
    pb.GetModelInfoRequest: {},
    pb.GetServerInfoRequest: {},
}


def names(message):
    return {field.name for field in message.DESCRIPTOR.fields}


def test_the_package_is_the_pinned_one():
    assert importlib.metadata.version("smg-grpc-proto") == "0.4.28", "read its new fields and raise the pin on purpose"


@pytest.mark.parametrize(
    ("message", "known"),
    [(pb.SamplingParams, SAMPLING), (pb.GenerateRequest, REQUEST), *OTHERS.items()],
    ids=lambda value: value.DESCRIPTOR.name if hasattr(value, "DESCRIPTOR") else "",
)
def test_the_meaning_of_every_field_is_known(message, known):
    assert names(message) - set(known) == set(), "fields that this server does not know"
    assert set(known) - names(message) == set(), "fields that the package does not have"


def test_the_service_has_the_known_methods():
    assert {method.name for method in pb.DESCRIPTOR.services_by_name["VllmEngine"].methods} == {
        "Generate", "Embed", "HealthCheck", "FlushCache", "StartProfile", "StopProfile", "Abort", "GetModelInfo",
        "GetServerInfo", "GetLoads", "GetTokenizer", "SubscribeKvEvents",
    }  # fmt: skip


def test_nothing_set_is_every_default():
    assert convert.params_from_proto(pb.SamplingParams()) == UNSET


@pytest.mark.parametrize("name", SAMPLING)
def test_the_zero_of_a_sampling_parameter(name):
    meaning, *_ = SAMPLING[name]
    field = pb.SamplingParams.DESCRIPTOR.fields_by_name[name]
    if field.is_repeated:
        assert meaning == "unset"  # an empty list is not even sent
        return
    value = pb.ChoiceConstraint() if name == "choice" else field.default_value
    proto = pb.SamplingParams(**{name: value})
    assert pb.SamplingParams.FromString(proto.SerializeToString()) == proto
    if meaning == "unset":
        assert convert.params_from_proto(proto) == UNSET
    elif name in ("temperature", "seed", "logprobs", "prompt_logprobs"):
        assert convert.params_from_proto(proto) == SamplingParams(**{name: 0})
    else:
        assert field.has_presence
        own = f"structured_outputs.{convert.CONSTRAINTS[name]}" if name in convert.CONSTRAINTS else name
        with pytest.raises(ValueError, match=f"^{own} is "):
            convert.params_from_proto(proto)


@pytest.mark.parametrize("name", SAMPLING)
def test_a_value_of_a_sampling_parameter(name):
    _, value, outcome = SAMPLING[name]
    proto = pb.SamplingParams(**{name: value})
    if outcome == OF_THE_TABLE:
        value = dict(value) if isinstance(value, dict) else value
        assert convert.params_from_proto(proto) == SamplingParams(**{name: value})
    elif outcome == NO_EFFECT:
        assert convert.params_from_proto(proto) == UNSET
    else:
        name = "structured_outputs" if name in convert.CONSTRAINTS else name
        assert convert.params_from_proto(proto) == SamplingParams(**{name: outcome})


def test_values_that_ask_for_nothing_are_accepted():
    neutral = pb.SamplingParams(n=1, repetition_penalty=1.0, frequency_penalty=-0.0, top_p=1.0)
    assert convert.params_from_proto(neutral) == UNSET


@pytest.mark.parametrize(
    ("proto", "name"),
    [
        (pb.SamplingParams(temperature=math.nan), "temperature"),
        (pb.SamplingParams(temperature=-1), "temperature"),
        (pb.SamplingParams(top_p=math.nan), "top_p"),
        (pb.SamplingParams(top_p=1.5), "top_p"),
        (pb.SamplingParams(top_k=2**32 - 1), "top_k"),
        (pb.SamplingParams(min_p=math.inf), "min_p"),
        (pb.SamplingParams(repetition_penalty=math.nan), "repetition_penalty"),
        (pb.SamplingParams(frequency_penalty=math.nan), "frequency_penalty"),
        (pb.SamplingParams(n=10**9), "n"),
        (pb.SamplingParams(max_tokens=2**31), "max_tokens"),
        (pb.SamplingParams(stop=[""]), "stop"),
        (pb.SamplingParams(stop=["x"] * 10_000), "stop"),
        (pb.SamplingParams(stop_token_ids=[2**32 - 1]), "stop_token_ids"),
        (pb.SamplingParams(min_tokens=2, max_tokens=1), "min_tokens"),
    ],
)
def test_bad_values_name_their_field(proto, name):
    with pytest.raises(ValueError, match=f"^{name} "):
        convert.params_from_proto(proto)


@pytest.mark.parametrize("name", REQUEST)
def test_a_field_of_a_request(name):
    _, value, outcome = REQUEST[name]
    request = pb.GenerateRequest(**{name: value})
    if outcome == REFUSED:
        with pytest.raises(ValueError, match=f"^{name} is .*; this engine does not support it: leave it out"):
            convert.check_request(request)
    else:
        convert.check_request(request)
    convert.check_request(pb.GenerateRequest(data_parallel_rank=0, kv_transfer_params_json=""))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (pb.GenerateRequest(), "input is not set"),
        (pb.GenerateRequest(text=""), "text is empty"),
        (pb.GenerateRequest(tokenized=pb.TokenizedInput(original_text="a")), "input_ids of tokenized is empty"),
    ],
)
def test_a_prompt_must_be_there(request_, message):
    with pytest.raises(ValueError, match=message):
        convert.prompt_from_proto(request_)


def test_a_large_request_is_measured_by_its_prompt():
    sizes = []

    def measure(request: pb.GenerateRequest) -> tuple[int, bool]:
        convert.check_generate(request.SerializeToString(), lambda *prompt: sizes.append(prompt))
        return sizes.pop()

    assert measure(pb.GenerateRequest(text="é" * 9, request_id="r")) == (18, True)
    ids = pb.TokenizedInput(input_ids=[2**31] * 1000)
    alone = measure(pb.GenerateRequest(tokenized=ids))
    assert alone == (1000 * 5 + 3, False)  # five bytes an id, and the tag and length of all
    ids.original_text = "x" * 100_000
    size, is_text = measure(pb.GenerateRequest(tokenized=ids))
    assert (size - alone[0] < 10, is_text) == (True, False)  # the text is not the prompt


@pytest.mark.parametrize(
    "message",
    [
        pb.GenerateRequest(sampling_params=pb.SamplingParams(stop=["x" * 100] * 1000)),
        pb.GenerateRequest(mm_inputs=pb.MultimodalInputs(mm_placeholders=[pb.PlaceholderRange()] * 50_000)),
        pb.GenerateRequest(extra_mm_inputs=[pb.MultimodalInputs()] * 1000),
    ],
    ids=["stop", "nested", "repeated"],
)
def test_what_has_many_parts_is_refused_before_it_is_parsed(message):
    with pytest.raises(DecodeError, match=r"at most 65536 are allowed|more than 64 fields"):
        convert.check_generate(message.SerializeToString(), lambda *prompt: None)


def test_what_is_malformed_is_left_to_the_parser():
    for data in (b"\x12", b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", b"\xff" * 30, b"\x13\x14", b"\x0d\x00"):
        convert.check_generate(data, lambda *prompt: None)


def test_the_last_message_says_what_stopped_the_output():
    def last(reason, stop_string=None, stop_token_ids=(7,)):
        delta = Delta("r", finish_reason=reason, stop_string=stop_string, prompt_tokens=3, cached_tokens=1)
        return convert.complete(delta, [5, 7], SamplingParams(stop_token_ids=stop_token_ids)).complete

    assert last(FinishReason.STOP).matched_token_id == 7
    assert last(FinishReason.STOP, "ll").matched_stop_str == "ll"
    for other in (last(FinishReason.STOP, stop_token_ids=()), last(FinishReason.LENGTH), last(FinishReason.ABORT)):
        assert other.WhichOneof("matched_stop") is None
    answer = last(FinishReason.LENGTH)
    assert (answer.finish_reason, list(answer.output_ids), answer.completion_tokens) == ("length", [5, 7], 2)
    assert (answer.prompt_tokens, answer.cached_tokens) == (3, 1)
