"""Checkpoints of experts: what their config.json and their tensors may say, and MXFP4."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from jaxserve.models import params
from jaxserve.models.config import ModelConfig
from jaxserve.models.loading import checkpoint
from jaxserve.models.loading.mxfp4 import dequantized
from tests.budgets import budget
from tests.models.checkpoints import write_safetensors
from tests.models.family_shapes import random_weights, raw_config

MIXTRAL_8X7B = {  # mistralai/Mixtral-8x7B-Instruct-v0.1
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
    "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0",
    "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
QWEN3_30B_A3B = {  # Qwen/Qwen3-30B-A3B
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960,
    "max_window_layers": 48, "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
GPT_OSS_20B = {  # openai/gpt-oss-20b
    "architectures": ["GptOssForCausalLM"], "attention_bias": True, "attention_dropout": 0.0, "eos_token_id": 200002,
    "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880,
    "initial_context_length": 4096, "initializer_range": 0.02, "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12, "max_position_embeddings": 131072,
    "model_type": "gpt_oss", "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24,
    "num_key_value_heads": 8, "num_local_experts": 32, "output_router_logits": False, "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "rope_type": "yarn", "truncate": False,
    },
    "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
    "tie_word_embeddings": False, "transformers_version": "4.55.0.dev0", "use_cache": True, "vocab_size": 201088,
}  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "billions", "context"),
    [(MIXTRAL_8X7B, 46.7, 32768), (QWEN3_30B_A3B, 30.5, 40960), (GPT_OSS_20B, 20.9, 131072)],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_published_files_are_read(
    raw: dict[str, Any], billions: float, context: int, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = ModelConfig.from_directory(tmp_path)
    assert not caplog.messages  # every key is read or known to decide nothing
    assert config.context_length == context
    abstract = params.abstract_params(config, "bfloat16", params.make_mesh())
    numbers = sum(leaf.size for _, leaf in params.leaves(abstract))
    assert round(numbers / 1e9, 1) == billions
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize(
    ("raw", "fields", "message"),
    [
        (
            MIXTRAL_8X7B,
            {"num_experts_per_tok": 9},
            r"num_experts_per_tok is 9; it must be at most num_local_experts 8$",
        ),
        (MIXTRAL_8X7B, {"num_experts": 4}, r"has num_local_experts 8 and num_experts 4; they contradict each other$"),
        (MIXTRAL_8X7B, {"num_local_experts": 0}, r"num_local_experts is 0; it must be a whole number of at least 1$"),
        (QWEN3_30B_A3B, {"mlp_only_layers": [48]}, r"mlp_only_layers is \[48\]; it must list numbers of layers, from"),
        (QWEN3_30B_A3B, {"decoder_sparse_step": 0}, r"decoder_sparse_step is 0; it must be a whole number of at leas"),
        (QWEN3_30B_A3B, {"norm_topk_prob": "no"}, r"norm_topk_prob is 'no'; it must be true or false$"),
        (QWEN3_30B_A3B, {"quantization_config": {"quant_method": "mxfp4"}}, r"quant_method is 'mxfp4'; supported"),
        (GPT_OSS_20B, {"hidden_act": "gelu"}, r"hidden_act is 'gelu'; GptOssForCausalLM has silu alone$"),
        (GPT_OSS_20B, {"swiglu_limit": -1}, r"swiglu_limit is -1; it must be a finite number above 0$"),
        (GPT_OSS_20B, {"rope_scaling": None}, r"has no rope_scaling; GptOssForCausalLM needs it"),
        (GPT_OSS_20B, {"quantization_config": {"quant_method": "gptq"}}, r"quant_method is 'gptq'; supported are mx"),
        (GPT_OSS_20B, {"experts_per_token": 2}, r"has num_experts_per_tok 4 and experts_per_token 2; they contradic"),
    ],
)
def test_what_cannot_be_served_is_named(raw: dict[str, Any], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^config.json .*" + message):
        ModelConfig.from_hf(raw | fields)


# ---- tensors


def written(directory: pathlib.Path, raw: dict[str, Any], tensors: dict[str, np.ndarray]) -> pathlib.Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw))
    write_safetensors(directory / "model.safetensors", tensors)
    return directory


def loaded(directory: pathlib.Path) -> Any:
    return checkpoint.load(directory, ModelConfig.from_directory(directory), "float32", params.make_mesh())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "qwen3_moe.0",
            lambda tensors: tensors.pop("model.layers.0.mlp.experts.3.up_proj.weight"),
            r"has no tensor model.layers.0.mlp.experts.3.up_proj.weight, which layers.0.mlp.up needs$",
        ),
        (
            "mixtral.0",
            lambda tensors: tensors.update({"model.layers.0.block_sparse_moe.experts.4.w1.weight": np.zeros((1, 1))}),
            r"holds 1 tensor \(model.layers.0.block_sparse_moe.experts.4.w1.weight\) that .*; layers have 4 experts$",
        ),
        (
            "mixtral.0",
            lambda tensors: tensors.update({"model.layers.1.block_sparse_moe.gate.weight": np.zeros((8, 64))}),
            r"tensor model.layers.1.block_sparse_moe.gate.weight has shape \[8, 64\]; config.json asks for \[4, 64\]$",
        ),
        (
            "gpt_oss.0",
            lambda tensors: tensors.update({"model.layers.0.mlp.experts.down_proj": np.zeros((5, 96, 64))}),
            r"tensor model.layers.0.mlp.experts.down_proj has shape \[5, 96, 64\]; config.json asks for \[4, 96, 64\]$",
        ),
    ],
)
def test_experts_that_do_not_match_are_named(name: str, change: Any, message: str, tmp_path: pathlib.Path) -> None:
    raw = raw_config(name)
    tensors = random_weights(ModelConfig.from_hf(raw), 0)
    change(tensors)
    directory = written(tmp_path, raw, {key: array.astype(np.float32) for key, array in tensors.items()})
    with pytest.raises(ValueError, match=message):
        checkpoint.check(directory, ModelConfig.from_directory(directory))


# ---- MXFP4


@budget(20)
@given(
    blocks=arrays.arrays(np.uint8, (3, 2, 16)),
    scales=arrays.arrays(np.uint8, (3, 2), elements=st.integers(0, 255)),
)
def test_numbers_are_those_of_the_formats_that_the_specification_names(blocks: np.ndarray, scales: np.ndarray) -> None:
    """Against the types E2M1 and E8M0 of ml_dtypes."""
    nibbles = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(3, 2, 32)
    numbers = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    factors = scales.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    with np.errstate(over="ignore"):
        expected = (numbers * factors[..., None]).reshape(3, 64)
    np.testing.assert_array_equal(dequantized(blocks, scales), expected)
    # bfloat16 holds them as they are, except where they leave the range of its normal numbers.
    normal = (np.abs(expected) >= 2.0**-126) & np.isfinite(expected)
    held = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(held[normal], expected[normal])


@pytest.mark.long
def test_they_are_what_transformers_dequantizes_to() -> None:
    torch = pytest.importorskip("torch")
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (2, 6, 4, 16), np.uint8)
    scales = random.integers(100, 140, (2, 6, 4), np.uint8)
    expected = mxfp4.convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
    np.testing.assert_array_equal(dequantized(blocks, scales).swapaxes(1, 2), expected.numpy())


def packed(random: np.random.Generator, experts: int, rows: int, length: int) -> dict[str, np.ndarray]:
    return {
        "blocks": random.integers(0, 256, (experts, rows, length // 32, 16), np.uint8),
        "scales": random.integers(118, 124, (experts, rows, length // 32), np.uint8),
    }


def in_mxfp4(name: str) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A config.json, its tensors with experts in MXFP4, and the same with the numbers that these stand for."""
    raw = raw_config(name) | {"quantization_config": {"quant_method": "mxfp4"}}
    plain = random_weights(ModelConfig.from_hf(raw), 0)
    stored = dict(plain)
    random = np.random.default_rng(1)
    for tensor in [key for key in plain if key.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, length, rows = stored.pop(tensor).shape
        parts = packed(random, experts, rows, length)
        stored |= {f"{tensor}_{part}": array for part, array in parts.items()}
        plain[tensor] = dequantized(parts["blocks"], parts["scales"]).swapaxes(1, 2)
    return raw, stored, plain


def test_a_checkpoint_in_mxfp4_is_loaded_as_the_numbers_it_holds(tmp_path: pathlib.Path) -> None:
    raw, stored, plain = in_mxfp4("gpt_oss.0")
    expected = dict(params.leaves(loaded(written(tmp_path / "plain", raw, plain))))
    found = dict(params.leaves(loaded(written(tmp_path / "packed", raw, stored))))
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, expected[path])
    # Rows alternate between gate and up, in the checkpoint and in the numbers.
    both = plain["model.layers.1.mlp.experts.gate_up_proj"]
    np.testing.assert_array_equal(found["layers", 1, "mlp", "gate"], both[..., ::2].swapaxes(1, 2))
    np.testing.assert_array_equal(found["layers", 1, "mlp", "up"], both[..., 1::2].swapaxes(1, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scales: None, r"down_proj_blocks needs model.layers.0.mlp.experts.down_proj_scales, which is in no f"),
        (lambda scales: scales[:, :-1], r"have shapes .* and .*; they must be \[E, N, K / 32, 16\] and \[E, N, K / 3"),
        (lambda scales: scales.astype(np.int8), r"tensor model.layers.0.mlp.experts.down_proj_scales has dtype I8, n"),
    ],
)
def test_scales_that_do_not_fit_are_named(change: Any, message: str, tmp_path: pathlib.Path) -> None:
    raw, stored, _ = in_mxfp4("gpt_oss.0")
    scales = change(stored.pop("model.layers.0.mlp.experts.down_proj_scales"))
    if scales is not None:
        stored["model.layers.0.mlp.experts.down_proj_scales"] = scales
    directory = written(tmp_path, raw, stored)
    with pytest.raises(ValueError, match=message):
        checkpoint.check(directory, ModelConfig.from_directory(directory))
