"""Configuration and checkpoint together fix the shapes; planning does without a checkpoint that is not there."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from jaxserve.config import gin_config
from jaxserve.config.settings import CacheConfig, EngineConfig
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers.rope import RopeScaling
from jaxserve.models.params import make_mesh
from jaxserve.planning.resolve import resolve_model, resolve_shapes
from jaxserve.programs.aot.bundle import identity
from jaxserve.programs.step_programs import Shapes
from jaxserve.runner import engine_startup as startup
from jaxserve.runner.model_runner import ModelRunner
from tests.models.checkpoints import BASE, random_tensors, write_files

MODEL = ModelConfig("LlamaForCausalLM", 96, 32, 48, 2, 4, 2, 8, 256)
CONFIG_JSON = (
    '{"architectures": ["LlamaForCausalLM"], "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48,'
    ' "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,'
    ' "rms_norm_eps": 1e-5, "max_position_embeddings": 256}'
)


@pytest.mark.parametrize("planning", [False, True])
def test_configuration_and_checkpoint_must_agree(tmp_path, planning):
    (tmp_path / "config.json").write_text(CONFIG_JSON)
    config = EngineConfig(model=str(tmp_path), architecture=dataclasses.replace(MODEL, hidden_size=64))
    with pytest.raises(ValueError, match=r"architecture hidden_size is 64; the checkpoint .* has 32"):
        resolve_shapes(config, "cpu", planning=planning)
    agreed = dataclasses.replace(config, architecture=MODEL)
    assert resolve_model(agreed, planning=planning) == MODEL


def test_planning_does_without_weights(tmp_path):
    config = EngineConfig(model=str(tmp_path / "missing"), architecture=MODEL)
    assert resolve_shapes(config, "cpu", planning=True).model == MODEL
    with pytest.raises(ValueError, match="there is no such directory"):
        resolve_shapes(config, "cpu")
    with pytest.raises(ValueError, match="there is no such directory"):
        resolve_shapes(dataclasses.replace(config, architecture=None), "cpu", planning=True)


def test_shared_pages_are_read_once_where_the_attention_can():
    config = EngineConfig(load_format="dummy", architecture=MODEL, attention="xla")
    for cascade in ("auto", "off"):
        assert resolve_shapes(dataclasses.replace(config, cascade_attention=cascade), "cpu").cascade == cascade
    with pytest.raises(ValueError, match=r"cascade_attention is 'on'; attention 'xla' reads the pages of each row by"):
        resolve_shapes(dataclasses.replace(config, cascade_attention="on"), "cpu")
    on = dataclasses.replace(config, cascade_attention="on", attention="triton_interpret")
    assert resolve_shapes(on, "cpu").cascade == "on"
    with pytest.raises(ValueError, match="cascade_attention is 'always'; it must be one of auto, on, off"):
        dataclasses.replace(config, cascade_attention="always")


def test_limits_of_the_model():
    config = EngineConfig(load_format="dummy", architecture=MODEL, max_model_len=512)
    with pytest.raises(ValueError, match=r"max_model_len is 512; the model's context .* is 256"):
        resolve_shapes(config, "cpu")
    many = dataclasses.replace(
        config, max_model_len=None, architecture=dataclasses.replace(MODEL, eos_token_ids=tuple(range(96)))
    )
    with pytest.raises(ValueError, match="model has 96 end-of-sequence ids; at most"):
        resolve_shapes(many, "cpu")


SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": None,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000,
    "rope_scaling": SCALING,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def llama_gin(tmp_path: Any, fields: dict[str, Any], overrides: tuple[str, ...] = (), **files: Any) -> ModelConfig:
    """What llama.gin makes of a checkpoint that differs from Llama-3.1-8B in some fields; weights are not needed."""
    directory = write_files(tmp_path, LLAMA | fields, **files)
    server, _ = gin_config.load("llama.gin", [f"EngineConfig.model='{directory}'", *overrides])
    return resolve_model(server.engine)


@pytest.mark.parametrize(
    ("fields", "overrides"),
    [
        ({}, ()),
        ({"eos_token_id": 128001}, ()),
        ({"eos_token_id": [128009, 128001]}, ()),
        ({"bos_token_id": 5, "pad_token_id": 128255}, ()),
        ({"dtype": "float32"}, ()),
        ({"_name_or_path": "x", "transformers_version": "4.1", "use_cache": False, "pretraining_tp": 2}, ()),
        (
            {"rope_scaling": None, "rope_theta": None, "rope_parameters": LLAMA["rope_scaling"] | {"rope_theta": 5e5}},
            (),
        ),
        ({"max_position_embeddings": 32768}, ("EngineConfig.max_model_len=8192",)),
    ],
)
def test_what_no_program_depends_on_may_differ_from_the_configured_architecture(tmp_path, fields, overrides):
    found = llama_gin(tmp_path, fields, overrides)
    assert found.eos_token_ids == tuple(np.atleast_1d(fields.get("eos_token_id", [])).tolist())


def test_an_end_token_of_the_tokenizer_does_not_differ_either(tmp_path):
    ids = [{"id": 128040, "content": "<|im_end|>"}]
    files = {"tokenizer": {"added_tokens": ids}, "tokenizer_config": {"eos_token": "<|im_end|>"}}
    assert llama_gin(tmp_path, {"eos_token_id": 128001}, **files).eos_token_ids == (128001, 128040)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_hidden_layers": 16}, "architecture num_hidden_layers is 32; the checkpoint .* has 16: take"),
        ({"rope_scaling": None}, "architecture rope_scaling is RopeScaling.* has RopeScaling.*: take"),
        ({"rms_norm_eps": 1e-6}, "architecture rms_norm_eps is 1e-05; the checkpoint .* has 1e-06: take"),
        ({"tie_word_embeddings": True}, "architecture tie_word_embeddings is False; the checkpoint .* has True: take"),
        (
            {"max_position_embeddings": 8192},
            r"is 131072; the checkpoint .* has 8192: .*or set EngineConfig.max",
        ),
    ],
)
def test_other_differences_name_the_remedy(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message) as refused:
        llama_gin(tmp_path, fields)
    assert "--gin.EngineConfig.architecture=None" in str(refused.value)
    overrides = ("EngineConfig.architecture=None",)
    assert llama_gin(tmp_path, fields, overrides) == ModelConfig.from_directory(tmp_path)


def test_a_context_that_the_checkpoint_has_not_is_refused_all_the_same(tmp_path):
    directory = write_files(tmp_path, LLAMA | {"max_position_embeddings": 4096})
    overrides = [f"EngineConfig.model='{directory}'", "EngineConfig.max_model_len=8192"]
    with pytest.raises(ValueError, match=r"max_model_len is 8192; the model's context .* is 4096"):
        resolve_shapes(gin_config.load("llama.gin", overrides)[0].engine, "cpu", planning=True)


def test_a_scaled_context_is_served(tmp_path):
    fields = {"rope_scaling": {"type": "linear", "factor": 4.0}}
    model = write_files(tmp_path, fields, random_tensors(BASE, 0))
    assert resolve_shapes(EngineConfig(model=model), "cpu").max_model_len == 1024
    assert resolve_shapes(EngineConfig(model=model, max_model_len=1000), "cpu").max_model_len == 1000
    with pytest.raises(ValueError, match=r"is 1025; the model's context \(max_position_embeddings, scaled\) is 1024$"):
        resolve_shapes(EngineConfig(model=model, max_model_len=1025), "cpu")


def test_programs_do_not_depend_on_what_may_differ(tmp_path):
    def shapes(architecture: ModelConfig, **options: Any) -> Shapes:
        config = EngineConfig(load_format="dummy", architecture=architecture, **{"max_model_len": 128} | options)
        return resolve_shapes(config, "cpu")

    mesh = make_mesh()
    expected = identity(shapes(MODEL), mesh)
    for changed in (
        {"eos_token_ids": (1, 2)},
        {"bos_token_id": 5},
        {"max_position_embeddings": 512},
        {"rope_scaling": RopeScaling("linear", 1.0)},
    ):
        assert identity(shapes(dataclasses.replace(MODEL, **changed)), mesh) == expected
    assert identity(shapes(dataclasses.replace(MODEL, dtype="bfloat16"), dtype="float32"), mesh) == expected
    for changed in ({"rope_theta": 5.0}, {"rope_scaling": RopeScaling("linear", 2.0)}, {"dtype": "bfloat16"}):
        assert identity(shapes(dataclasses.replace(MODEL, **changed)), mesh) != expected
    assert identity(shapes(MODEL, max_model_len=64), mesh) != expected


NORM = "model.norm.weight"


def misshapen() -> dict[str, np.ndarray]:
    tensors = random_tensors(BASE, 0)
    tensors[NORM] = tensors[NORM][:-1]
    return tensors


def without_norm() -> dict[str, np.ndarray]:
    return {name: array for name, array in random_tensors(BASE, 0).items() if name != NORM}


TOKENIZER = {"added_tokens": [{"id": 160, "content": "<x>"}]}
FAULTS: dict[str, tuple[dict[str, Any], Any, dict[str, Any], dict[str, Any], str]] = {
    "shape": ({}, misshapen, {}, {}, r"tensor model.norm.weight has shape \[63\]; config.json asks for \[64\]$"),
    "missing": ({}, without_norm, {}, {}, r"has no tensor model.norm.weight, which norm.scale needs$"),
    "layers": (
        {"num_hidden_layers": 900},
        None,
        {},
        {},
        r"num_hidden_layers is 900; checkpoint .* of 2 layers$",
    ),
    "no end": (
        {"num_hidden_layers": 10**9},
        None,
        {},
        {},
        r"num_hidden_layers is 1000000000; it must be at most",
    ),
    "tokenizer": (
        {},
        None,
        {"tokenizer": TOKENIZER},
        {},
        r"has the token '<x>' with the id 160; the",
    ),
    "dtype": (
        {"dtype": "float64"},
        None,
        {},
        {},
        r"^model dtype is 'float64'; set EngineConfig.dtype to one of",
    ),
    "architecture": ({"architectures": ["GPTJForCausalLM"]}, None, {}, {}, r"^model architecture is 'GPTJForCausalLM'"),
    "scales": (
        {},
        lambda: random_tensors(BASE, 0) | {"model.layers.0.self_attn.k_scale": np.ones(3, np.float32)},
        {},
        {"cache": CacheConfig(kv_cache_dtype="int8")},
        r"k_scale has dtype F32 and shape \[3\]; a kv scale is one",
    ),
    "weights": ({}, dict, {}, {}, r"has no tensor model.embed_tokens.weight"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_checkpoint_is_refused_before_anything_is_compiled(tmp_path, name, monkeypatch):
    fields, tensors, files, options, message = FAULTS[name]
    directory = write_files(tmp_path, fields, random_tensors(BASE, 0) if tensors is None else tensors(), **files)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a start went on with a faulty checkpoint")

    for later in ("SetBuilder", "products_of", "load", "random_params"):
        monkeypatch.setattr(startup, later, refuse)
    config = EngineConfig(model=directory, **options)
    with pytest.raises(ValueError, match=message) as refused:
        ModelRunner(config)
    assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match=message):
        resolve_shapes(config, "cpu", planning=True)


def test_planning_alone_does_without_weights(tmp_path):
    config = EngineConfig(model=write_files(tmp_path, {}))
    assert resolve_shapes(config, "cpu", planning=True).model.vocab_size == 160
    with pytest.raises(ValueError, match=r"has neither model.safetensors nor model.safetensors.index.json$"):
        resolve_shapes(config, "cpu")


def test_a_tokenizer_that_is_not_loaded_may_have_more_tokens(tmp_path):
    directory = write_files(
        tmp_path,
        {"eos_token_id": 2},
        random_tensors(BASE, 0),
        tokenizer={"added_tokens": [{"id": 160, "content": "<x>"}, {"id": 9, "content": "<end>"}]},
        special_tokens_map={"eos_token": "<end>"},
    )
    config = EngineConfig(model=directory, skip_tokenizer_init=True)
    assert resolve_shapes(config, "cpu").model.eos_token_ids == (2, 9)
    with pytest.raises(ValueError, match=r"tokenizer in .* has the token '<x>' with the id 160"):
        resolve_shapes(dataclasses.replace(config, skip_tokenizer_init=False), "cpu")


def test_scales_that_are_not_asked_for_may_be_anything(tmp_path):
    scales = {"model.layers.0.self_attn.k_scale": np.ones(3, np.float32)}
    directory = write_files(tmp_path, {}, random_tensors(BASE, 0) | scales)
    assert resolve_shapes(EngineConfig(model=directory), "cpu").kv_cache_dtype == "float32"
