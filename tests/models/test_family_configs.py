"""What families read of a config.json and of the names of tensors, as published checkpoints have them."""

import json
import math

import numpy as np
import pytest

from jaxserve.models import params
from jaxserve.models.config import ModelConfig
from jaxserve.models.loading import checkpoint
from tests.models.checkpoints import BASE, random_tensors, write_checkpoint, write_files
from tests.models.family_shapes import raw_config, shape_names, write_family_shape

GEMMA3_1B = {  # google/gemma-3-1b-it
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid", "eos_token_id": [1, 106],
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
    "initializer_range": 0.02, "intermediate_size": 6912, "max_position_embeddings": 32768,
    "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
    "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0", "use_cache": True, "vocab_size": 262144,
}  # fmt: skip
GEMMA3_4B = {  # google/gemma-3-4b-it
    "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999, "eoi_token_index": 256000,
    "eos_token_id": [1, 106], "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256,
    "model_type": "gemma3", "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
    "text_config": {
        "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model", "vision_use_head": False},
}  # fmt: skip
PHI4_MINI = {  # microsoft/Phi-4-mini-instruct, with numbers for its factors
    "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "bos_token_id": 199999, "embd_pdrop": 0.0,
    "eos_token_id": 199999, "full_attn_mod": 1, "hidden_act": "silu", "hidden_size": 3072, "initializer_range": 0.02,
    "intermediate_size": 8192, "interpolate_factor": 1, "lm_head_bias": False, "max_position_embeddings": 131072,
    "mlp_bias": False, "model_type": "phi3", "num_attention_heads": 24, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "original_max_position_embeddings": 4096, "pad_token_id": 199999,
    "partial_rotary_factor": 0.75, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
    "rope_scaling": {"long_factor": [2.0] * 48, "short_factor": [1.0] * 48, "type": "longrope"},
    "rope_theta": 10000.0, "sliding_window": 262144, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0", "use_cache": True, "vocab_size": 200064,
}  # fmt: skip
OPT_350M = {  # facebook/opt-350m
    "_remove_final_layer_norm": False, "activation_dropout": 0.0, "activation_function": "relu",
    "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2, "do_layer_norm_before": False,
    "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 4096, "hidden_size": 1024, "init_std": 0.02, "layerdrop": 0.0,
    "max_position_embeddings": 2048, "model_type": "opt", "num_attention_heads": 16, "num_hidden_layers": 24,
    "pad_token_id": 1, "prefix": "</s>", "torch_dtype": "float16", "transformers_version": "4.20.0.dev0",
    "use_cache": True, "vocab_size": 50272, "word_embed_proj_dim": 512,
}  # fmt: skip
GPT2 = {  # openai-community/gpt2
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
    "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
    "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
}  # fmt: skip


def read(tmp_path, raw):
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return ModelConfig.from_directory(tmp_path)


def test_published_configurations_are_read_without_a_word(tmp_path, caplog):
    gemma, phi, opt, gpt2 = (read(tmp_path, raw) for raw in (GEMMA3_1B, PHI4_MINI, OPT_350M, GPT2))
    assert not caplog.messages
    windows = [layer.attention.sliding_window for layer in gemma.layer_specs]
    assert windows == [None if number % 6 == 5 else 512 for number in range(26)]
    thetas = {layer.attention.rope and layer.attention.rope.theta for layer in gemma.layer_specs}
    assert (thetas, gemma.rope_theta) == ({None, 10000}, 1000000)
    assert gemma.embedding_multiplier == math.sqrt(1152)
    assert (phi.rotary_size, phi.head_dim, phi.context_length) == (96, 128, 131072)
    assert phi.rope_scaling.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert phi.tie_word_embeddings
    assert (opt.embedding_size, opt.layer_specs[0].norm_place, opt.intermediate_size) == (512, "sum", 4096)
    assert (gpt2.intermediate_size, gpt2.context_length, gpt2.num_key_value_heads) == (3072, 1024, 12)


def test_the_text_part_of_a_model_with_a_vision_tower_is_served(tmp_path, caplog):
    config = read(tmp_path, GEMMA3_4B)
    assert caplog.messages == [
        "the text part (Gemma3ForCausalLM) of Gemma3ForConditionalGeneration is served; its other parts are not read"
    ]
    assert (config.architecture, config.num_hidden_layers, config.vocab_size) == ("Gemma3ForCausalLM", 34, 262208)
    # Its context is told after scaling, of which only layers with full attention have any.
    assert (config.context_length, config.rope_scaling.factor, config.eos_token_ids) == (131072, 8.0, (1, 106))
    assert config.layer_specs[0].attention.rope.scaling.kind == "default"


@pytest.mark.parametrize("prefixes", [("language_model.model.", "language_model."), ("model.language_model.", "")])
def test_tensors_of_the_text_part_have_other_names_and_the_others_are_left(tmp_path, prefixes):
    raw = BASE | {"model_type": "llama"}
    tensors = random_tensors(raw, 0)
    alone = write_checkpoint(tmp_path / "alone", raw, tensors)
    text = {name: value for name, value in raw.items() if name not in ("architectures", "dtype")}
    wrapped = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "text_config": text,
        "vision_config": {"num_hidden_layers": 1},
        "image_token_index": 32000,
    }
    model, head = prefixes
    named = {(f"{head}{name}" if name.startswith("lm_head") else model + name[6:]): a for name, a in tensors.items()}
    ones = np.ones(3, np.float32)
    for name in ("vision_tower.encoder.layers.5.mlp.fc1.weight", "multi_modal_projector.linear_1.bias"):
        named[f"model.{name}" if model.startswith("model.") else name] = ones
    directory = write_checkpoint(tmp_path / "wrapped", wrapped, named)
    mesh = params.make_mesh()
    loaded = [checkpoint.load(one, ModelConfig.from_directory(one), "float32", mesh) for one in (alone, directory)]
    for (path, leaf), (_, other) in zip(*map(params.leaves, loaded), strict=True):
        np.testing.assert_array_equal(leaf, other, err_msg=str(path))
    named["audio_tower.weight"] = ones
    write_checkpoint(directory, wrapped, named)
    with pytest.raises(ValueError, match=r"holds 1 tensor \(audio_tower.weight\) that LlamaForCausalLM does not use"):
        checkpoint.check(directory, ModelConfig.from_directory(directory))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"architectures": ["MllamaForConditionalGeneration"], "vision_config": {"a": 1}},
            r"^model architecture is 'MllamaForConditionalGeneration', with a vision tower; its text part is not known",
        ),
        (
            {"architectures": ["LlavaForConditionalGeneration"], "text_config": {"model_type": "falcon"}},
            r"^model architecture is 'LlavaForConditionalGeneration' with a text_config of model_type 'falcon'; known",
        ),
    ],
)
def test_a_vision_tower_whose_text_part_is_not_known_is_refused_by_name(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message) as refused:
        ModelConfig.from_directory(write_files(tmp_path, fields))
    assert "\n" not in str(refused.value)


def test_the_first_checkpoints_of_gpt2_and_opt_name_tensors_otherwise(tmp_path):
    for family, prefix in (("gpt2", "transformer."), ("opt", "model.")):
        directory = write_family_shape(tmp_path / family, f"{family}.0", 1)
        config = ModelConfig.from_directory(directory)
        expected = checkpoint.load(directory, config, "float32", params.make_mesh())
        tensors = {
            source.tensor.removeprefix(prefix): stored
            for parameter in params.parameters(config).values()
            for source in parameter.sources
            for stored in [checkpoint._stored(directory, config).find(source.tensor).view()]
        }
        if family == "gpt2":
            tensors |= {"h.0.attn.bias": np.ones((1, 1, 4, 4), np.float32), "h.1.attn.masked_bias": np.float32([-1e4])}
        write_checkpoint(directory, raw_config(f"{family}.0"), tensors)
        loaded = checkpoint.load(directory, config, "float32", params.make_mesh())
        for (path, leaf), (_, other) in zip(params.leaves(expected), params.leaves(loaded), strict=True):
            np.testing.assert_array_equal(leaf, other, err_msg=str(path))


@pytest.mark.parametrize("name", shape_names())
def test_a_configuration_survives_a_round_trip(name):
    config = ModelConfig.from_hf(raw_config(name))
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize(
    ("shape", "fields", "message"),
    [
        ("gemma2.0", {"use_bidirectional_attention": True}, r"use_bidirectional_attention is true; only causal attent"),
        ("gemma2.0", {"query_pre_attn_scalar": 0}, r"^config.json query_pre_attn_scalar is 0; it must be a finite num"),
        (
            "gemma2.0",
            {"hidden_activation": "relu2"},
            r"^config.json hidden_activation is 'relu2'; it must be one of si",
        ),
        ("gemma2.0", {"sliding_window": None, "layer_types": ["sliding_attention"] * 2}, r"needs a sliding_window; it"),
        (
            "gemma3.0",
            {"layer_types": ["chunked_attention"] * 2},
            r"^config.json layer_types is \['chunked_attention', ",
        ),
        ("gemma3.0", {"rope_parameters": {"full_attention": {"rope_type": "x"}}}, r"^rope_scaling kind is 'x'; suppor"),
        ("phi3.0", {"attention_bias": True}, r"^config.json attention_bias is true; Phi3ForCausalLM has no such biase"),
        ("phi3.0", {"partial_rotary_factor": 1.5}, r"^config.json partial_rotary_factor is 1.5; of a head of 16 elem"),
        ("granite.0", {"residual_multiplier": -1.0}, r"^config.json residual_multiplier is -1.0; it must be a finite"),
        (
            "smollm3.0",
            {"no_rope_layers": [1]},
            r"^config.json no_rope_layers is \[1\]; it must list 1 \(rotated\) or 0",
        ),
        ("opt.0", {"_remove_final_layer_norm": True}, r"^config.json _remove_final_layer_norm is true; only models wi"),
        ("opt.0", {"layer_norm_elementwise_affine": False}, r"^config.json layer_norm_elementwise_affine is false; on"),
        ("gpt2.0", {"add_cross_attention": True}, r"^config.json add_cross_attention is true; only models without an "),
        ("olmo2.0", {"clip_qkv": 8.0}, r"^config.json has clip_qkv 8.0, by which models compute something else and wh"),
        ("olmo2.0", {"rope_parameters": {"llama_4_scaling_beta": 0.1}}, r"has llama_4_scaling_beta 0.1, which is not "),
    ],
)
def test_a_value_that_a_family_does_not_serve_is_refused_by_name(shape, fields, message):
    with pytest.raises(ValueError, match=message) as refused:
        ModelConfig.from_hf(raw_config(shape) | fields)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("shape", "fields", "message"),
    [
        (
            "opt.0",
            {"ffn_dim": 64},
            r"tensor model.decoder.layers.0.fc2.weight has shape \[64, 96\]; config.json asks f",
        ),
        ("opt.0", {"max_position_embeddings": 128}, r"embed_positions.weight has shape \[258, 64\]; config.json asks "),
        ("gpt2.0", {"n_head": 8, "n_embd": 128}, r"has shape \[160, 64\]; config.json asks for \[160, 128\]$"),
        ("phi3.0", {"num_key_value_heads": 4}, r"qkv_proj.weight has shape \[128, 64\]; config.json asks for \[192, 6"),
        ("gemma2.0", {"num_hidden_layers": 3}, r"^config.json num_hidden_layers is 3; checkpoint .* of 2 layers$"),
        ("gemma3.0", {"architectures": ["Gemma2ForCausalLM"]}, r"holds 4 tensors \(model.layers.0.self_attn.k_norm.we"),
    ],
)
def test_a_configuration_that_contradicts_its_tensors_is_refused(tmp_path, shape, fields, message):
    directory = write_family_shape(tmp_path, shape, 0)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(ValueError, match=message) as refused:
        checkpoint.check(directory, ModelConfig.from_directory(directory))
    assert "\n" not in str(refused.value)
