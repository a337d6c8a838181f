"""Configuration and checkpoint together fix the shapes; planning does without a checkpoint that is not there."""

from __future__ import annotations

import dataclasses

import pytest

from jaxserve.config import EngineConfig
from jaxserve.runner.resolve import resolve_model, resolve_shapes
from models.config import ModelConfig

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


def test_limits_of_the_model():
    config = EngineConfig(load_format="dummy", architecture=MODEL, max_model_len=512)
    with pytest.raises(ValueError, match=r"max_model_len is 512; the model's context .* is 256"):
        resolve_shapes(config, "cpu")
    many = dataclasses.replace(
        config, max_model_len=None, architecture=dataclasses.replace(MODEL, eos_token_ids=tuple(range(96)))
    )
    with pytest.raises(ValueError, match="model has 96 end-of-sequence ids; at most"):
        resolve_shapes(many, "cpu")
