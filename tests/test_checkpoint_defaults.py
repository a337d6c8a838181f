"""Defaults of sampling parameters from a checkpoint's generation_config.json."""

from __future__ import annotations

import json
import logging

import pytest

from jaxserve.config.plain_params import params_of
from jaxserve.config.settings import EngineConfig
from jaxserve.engine.core import EngineCore
from jaxserve.engine.messages import EngineReady, decode, encode
from jaxserve.frontend.openai import CHAT_URL, COMPLETIONS_URL, parse_body
from jaxserve.llm import LLM
from jaxserve.models.config import ModelConfig
from jaxserve.planning.checkpoint_defaults import defaults_line, sampling_defaults
from jaxserve.request_checks import ModelLimits, validate_request
from jaxserve.runner.fake import FakeRunner
from jaxserve.sampling_params import SamplingParams
from jaxserve.serving.grpc_port import convert
from jaxserve.serving.protos.jaxserve.v1 import jaxserve_pb2 as pb
from tests.engine_ready import changed
from tests.frontend.fakes import RuleEngine
from tests.frontend.tokenizers_for_tests import load

QWEN = {
    "bos_token_id": 1,
    "do_sample": True,
    "eos_token_id": [2],
    "max_new_tokens": 12,
    "min_p": None,
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 1.0,
    "transformers_version": "4.51.0",
}
DEFAULTS = {"temperature": 0.6, "top_k": 20, "max_tokens": 12}


def config(directory, content=None, **options):
    if content is not None:
        (directory / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return EngineConfig(model=str(directory), **options)


def test_the_file_has_the_defaults(tmp_path):
    assert sampling_defaults(config(tmp_path)) == {}
    assert sampling_defaults(config(tmp_path, QWEN)) == DEFAULTS
    assert sampling_defaults(config(tmp_path, generation_config="vllm")) == {}
    other = tmp_path / "other"
    other.mkdir()
    (other / "generation_config.json").write_text('{"top_p": 0.5}')
    assert sampling_defaults(config(tmp_path, generation_config=str(other))) == {"top_p": 0.5}
    line = defaults_line(DEFAULTS)
    assert "temperature 0.6, top_k 20, max_tokens 12" in line
    assert "EngineConfig.generation_config='vllm'" in line


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"top_p": 0}', "top_p is 0; it must be above 0 and at most 1; correct it"),
        ('{"temperature": NaN}', "temperature is nan; it must be a finite number"),
        ('{"top_k": "50"}', "top_k is '50'; it must be a whole number"),
        ('{"max_new_tokens": 0}', "max_tokens is 0; it must be from 1"),
        ("{", "is not valid JSON"),
        ("[]", "holds a list; it must hold an object"),
    ],
)
def test_a_faulty_file_is_refused_with_one_line_that_names_it(tmp_path, content, line):
    with pytest.raises(ValueError, match=r"generation_config\.json") as caught:
        sampling_defaults(config(tmp_path, content))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_a_request_sets_counts_and_else_the_checkpoints():
    def parsed(**body):
        found = [
            parse_body(COMPLETIONS_URL, {"prompt": "x", **body}, defaults=DEFAULTS).params,
            parse_body(CHAT_URL, {"messages": [{"role": "user", "content": "x"}], **body}, defaults=DEFAULTS).params,
            convert.params_from_proto(convert.params_to_proto(body), DEFAULTS),
        ]
        assert all(one == found[0] for one in found)
        return found[0]

    assert parsed() == SamplingParams(temperature=0.6, top_k=20)  # max_tokens gives way to the prompt
    assert parsed(temperature=1.0, top_k=0) == SamplingParams()  # our defaults, said in so many words
    assert parsed(top_k=-1, max_tokens=3) == SamplingParams(temperature=0.6, top_k=-1, max_tokens=3)
    # All parameters of Python's client are said, and mean what they are.
    assert convert.params_from_proto(convert.params_to_proto(SamplingParams()), DEFAULTS) == SamplingParams()
    assert convert.params_from_proto(pb.SamplingParams(), DEFAULTS) == params_of({}, DEFAULTS)


def test_max_new_tokens_is_the_default_as_far_as_there_is_room():
    limits = ModelLimits(100, 64, 1000, 64, (2,), default_max_tokens=12)
    assert validate_request([1] * 5, SamplingParams(), limits) == 12
    assert validate_request([1] * 60, SamplingParams(), limits) == 4
    assert validate_request([1] * 5, SamplingParams(max_tokens=40), limits) == 40
    assert validate_request([1] * 5, SamplingParams(min_tokens=20), limits) == 20
    with pytest.raises(ValueError, match="min_tokens is 20; only max_tokens 4 can be generated"):
        validate_request([1] * 60, SamplingParams(min_tokens=20), limits)


def test_llm_offers_the_defaults_and_takes_them_where_no_parameters_are_given(tmp_path):
    engine = RuleEngine()
    engine.ready = changed(engine.ready, sampling_defaults=DEFAULTS, default_max_tokens=12)
    llm = LLM(client=engine, tokenizer=load(tmp_path))
    assert llm.get_default_sampling_params() == SamplingParams(**DEFAULTS)
    long = "abcdefghij" * 4
    short, rest = llm.generate([long[:20], long], use_tqdm=False)
    assert (len(short.outputs[0].token_ids), short.outputs[0].finish_reason) == (12, "length")
    assert rest.outputs[0].token_ids  # fewer than 12 fit: no error
    assert {(request.temperature, request.top_k) for request in engine.requests} == {(0.6, 20)}
    engine.requests.clear()
    llm.generate("ab", SamplingParams(temperature=0.25), use_tqdm=False)
    assert [(request.temperature, request.top_k) for request in engine.requests] == [(0.25, 0)]
    plain = LLM(client=RuleEngine(), tokenizer=load(tmp_path))
    assert plain.get_default_sampling_params() == SamplingParams()


def test_a_setting_that_is_unknown_is_told_with_the_nearest_one():
    with pytest.raises(
        ValueError, match=r"engine option 'generation_confg' is unknown; did you mean generation_config\?"
    ):
        EngineConfig.from_options(model="m", generation_confg="vllm")
    assert EngineConfig.from_options(model="m", generation_config="vllm").generation_config == "vllm"
    with pytest.raises(ValueError, match="generation_config is ''; it must be 'auto', 'vllm' or a directory's name"):
        EngineConfig(model="m", generation_config="")


def test_the_engine_says_its_defaults_and_logs_them(tmp_path, caplog):
    (tmp_path / "generation_config.json").write_text(json.dumps(QWEN))

    def ready(setting):
        model = ModelConfig("LlamaForCausalLM", 101, 8, 8, 1, 1, 1, 8, 256)
        made = EngineConfig(architecture=model, load_format="dummy", generation_config=setting)
        return decode(encode(EngineCore(made, FakeRunner()).ready(0.0)))

    with caplog.at_level(logging.INFO, logger="jaxserve"):
        found = ready(str(tmp_path))
    assert isinstance(found, EngineReady)
    assert (found.sampling_defaults, found.limits.default_max_tokens) == (DEFAULTS, 12)
    assert [record.message for record in caplog.records] == [defaults_line(DEFAULTS)]
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="jaxserve"):
        found = ready("vllm")
    assert isinstance(found, EngineReady)
    assert (found.sampling_defaults, found.limits.default_max_tokens, caplog.records) == ({}, None, [])
