"""config.json in and out, the registry, and rotary frequencies."""

import dataclasses
import json
import math

import numpy as np
import pytest

from jaxserve.models import registry
from jaxserve.models.config import ModelConfig, RopeScaling
from jaxserve.models.layers.rope import rope_frequencies
from tests.models.checkpoints import BASE, LLAMA3, SHAPES


@pytest.mark.parametrize("name", SHAPES)
def test_a_configuration_survives_a_round_trip(name):
    config = ModelConfig.from_hf(SHAPES[name].raw)
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_defaults_and_both_places_of_rotary_settings():
    raw = BASE | {"num_key_value_heads": None, "rope_theta": None, "rms_norm_eps": None, "eos_token_id": [2, 3]}
    config = ModelConfig.from_hf(raw)
    assert (config.num_key_value_heads, config.head_dim, config.rope_theta, config.rms_norm_eps) == (4, 16, 1e4, 1e-6)
    assert config.eos_token_ids == (2, 3)
    new = ModelConfig.from_hf(raw | {"rope_parameters": LLAMA3 | {"rope_theta": 7.0}})
    old = ModelConfig.from_hf(raw | {"rope_scaling": LLAMA3, "rope_theta": 7})
    assert new == old
    assert new.rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
    shorter = {name: value for name, value in LLAMA3.items() if name != "original_max_position_embeddings"}
    context = ModelConfig.from_hf(raw | {"rope_scaling": shorter}).rope_scaling.original_max_position_embeddings
    assert context == BASE["max_position_embeddings"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": None}, r"^config.json has no vocab_size; a checkpoint without it cannot be served$"),
        ({"hidden_size": "64"}, r"^config.json hidden_size is '64'; it must be a whole number of at least 1$"),
        ({"num_hidden_layers": True}, r"^config.json num_hidden_layers is True; it must be a whole number"),
        ({"num_attention_heads": 0}, r"^config.json num_attention_heads is 0; it must be a whole number"),
        ({"num_key_value_heads": 3}, r"num_attention_heads is 4; it must be a multiple of num_key_value_heads 3$"),
        ({"head_dim": 15}, r"^model head_dim is 15; rotary embeddings need an even number$"),
        ({"rms_norm_eps": 0}, r"^model rms_norm_eps is 0; it must be a finite number above 0$"),
        ({"rope_theta": "x"}, r"^model rope_theta is 'x'; it must be a finite number above 0$"),
        ({"hidden_act": "tanh"}, r"^config.json hidden_act is 'tanh'; it must be one of silu, swish, gelu, gelu_new"),
        ({"quantization_config": {"bits": 4}}, r"^config.json quantization_config quant_method is None; sup"),
        (
            {"architectures": ["A", "B"]},
            r"^config.json architectures is \['A', 'B'\]; exactly one name is needed; known",
        ),
        ({"attention_bias": "no"}, r"^config.json attention_bias is 'no'; it must be true or false$"),
        ({"eos_token_id": "</s>"}, r"^config.json eos_token_id is '</s>'; it must be a token id or a list of them$"),
        ({"dtype": 16}, r"^config.json dtype is 16; it must be a name such as 'bfloat16'$"),
        ({"partial_rotary_factor": 0.5}, r"^config.json partial_rotary_factor is 0.5; only whole heads are rotated$"),
        ({"rope_scaling": [1]}, r"^config.json rope_scaling is \[1\]; it must be an object$"),
        (
            {"rope_scaling": {"type": "mrope"}},
            r"^rope_scaling kind is 'mrope'; supported kinds are default, linear, dynamic, yarn, longrope, llama3$",
        ),
        (
            {"rope_scaling": LLAMA3 | {"mrope_section": [2, 3, 3]}},
            r"^config.json rope_scaling has mrope_section \[2, 3, 3\], which is not known; if the checkpoint was mad",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
            r"^rope_scaling short_factor has 1 numbers; kind 'longrope' needs one for each pair of the 16 rotated elem",
        ),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            r"^config.json rope_scaling long_factor is None; kind 'longrope' needs a list of numbers$",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2.0, "beta_fast": 1.0}},
            r"^rope_scaling beta_slow is 1.0; it must be below beta_fast 1.0$",
        ),
        ({"rope_scaling": {"type": "linear"}}, r"^config.json rope_scaling has no factor; kind 'linear' needs it$"),
        ({"rope_scaling": LLAMA3 | {"factor": 0.5}}, r"^rope_scaling factor is 0.5; it must be at least 1$"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 4.0}}, r"low_freq_factor is 4.0; it must be below high_freq_"),
        ({"rope_scaling": LLAMA3 | {"factor": math.nan}}, r"^rope_scaling factor is nan; it must be a finite number"),
    ],
)
def test_an_unusable_configuration_gets_one_clear_line(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        ModelConfig.from_hf(BASE | fields)
    assert "\n" not in str(caught.value)


def test_a_factor_without_a_kind_is_not_ignored():
    with pytest.raises(ValueError, match=r"^rope_scaling factor is 2.0; kind 'default' has none, so it must be 1$"):
        RopeScaling(factor=2.0)


def test_the_registry_names_what_it_knows():
    assert set(registry.ARCHITECTURES) >= {"LlamaForCausalLM"}
    known = ", ".join(sorted(registry.ARCHITECTURES))
    with pytest.raises(ValueError, match=rf"^model architecture is 'Gpt'; known architectures are {known}$"):
        registry.lookup("Gpt")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("Gemma4ForCausalLM", ["Gemma2ForCausalLM", "Gemma3ForCausalLM"]),
        ("llamaforcausallm", []),
        ("Qwen2ForCausalLm", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"]),
        ("LLaMAForCausalLM", ["LlamaForCausalLM"]),
    ],
)
def test_names_like_an_unknown_one_are_told(name, near):
    with pytest.raises(ValueError, match=rf"^model architecture is '{name}'; .*known architectures are ") as refused:
        registry.lookup(name)
    told = str(refused.value).split("known")[0]
    assert all(other in told for other in near), told


def test_rotary_frequencies_by_hand():
    plain = rope_frequencies(8, 10000.0, RopeScaling())
    np.testing.assert_allclose(plain, [1, 0.1, 0.01, 0.001], rtol=1e-7)
    np.testing.assert_allclose(rope_frequencies(8, 10000.0, RopeScaling("linear", 4.0)), plain / 4, rtol=1e-7)
    scaled = rope_frequencies(8, 10000.0, RopeScaling("llama3", 8.0, 1.0, 4.0, 128))
    # Turns in 128 positions: 20.4 (kept), 2.04 (a share (2.04 - 1) / 3 kept), 0.2 and 0.02 (an eighth).
    share = (128 * 0.1 / (2 * math.pi) - 1) / 3
    np.testing.assert_allclose(scaled, [1, 0.1 * share + 0.0125 * (1 - share), 0.00125, 0.000125], rtol=1e-6)


YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
SHORT, LONG = [1.0 + 0.1 * number for number in range(8)], [1.5 + 0.5 * number for number in range(8)]
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": SHORT,
    "long_factor": LONG,
    "original_max_position_embeddings": 32,
}


# What ROPE_INIT_FUNCTIONS of transformers 5.24 return for heads of 16 in float32.
@pytest.mark.parametrize(
    ("theta", "scaling", "served", "attention_factor", "frequencies"),
    [
        (
            10000.0,
            YARN,
            256,
            1.2079441541679836,
            [1.0, 0.1778781, 0.0125, 0.003952847, 0.00125, 0.0003952847, 0.000125, 3.952847e-05],
        ),
        (
            30000.0,
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16.0}
            | {"beta_slow": 2.0, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False},
            256,
            0.9634746568860826,
            [1.0, 0.1119963, 0.01899589, 0.00523624, 0.001443376, 0.0003978682, 0.0001096728, 3.023145e-05],
        ),
        (
            10000.0,
            LONGROPE,
            256,
            1.2649110640673518,
            [0.6666667, 0.1581139, 0.04, 0.01054092, 0.002857143, 0.0007905695, 0.0002222222, 6.324556e-05],
        ),
        (
            10000.0,
            LONGROPE | {"type": "longrope"},
            32,
            1.2649110640673518,
            [1.0, 0.2874798, 0.08333334, 0.02432521, 0.007142857, 0.002108185, 0.000625, 0.0001860163],
        ),
        (
            10000.0,
            {"type": "dynamic", "factor": 4.0},
            512,
            1.0,
            [1.0, 0.2512738, 0.06313851, 0.01586505, 0.00398647, 0.001001695, 0.0002516998, 6.324555e-05],
        ),
    ],
)
def test_rotary_frequencies_are_those_of_transformers(theta, scaling, served, attention_factor, frequencies):
    old = ModelConfig.from_hf(BASE | {"rope_scaling": scaling, "rope_theta": theta})
    new = ModelConfig.from_hf(BASE | {"rope_parameters": scaling | {"rope_theta": theta}, "rope_theta": None})
    assert old == new == ModelConfig.from_hf(json.loads(json.dumps(old.to_hf())))
    assert old.rope_scaling.attention_factor == pytest.approx(attention_factor, rel=1e-9)
    shortened = dataclasses.replace(old, max_position_embeddings=served)
    np.testing.assert_allclose(shortened.rotary_frequencies(), frequencies, rtol=1e-6)
    assert old.decisive == dataclasses.replace(old, rope_scaling=old.rope_scaling.normalized)


def test_contexts_of_scaled_rotations():
    """yarn multiplies the original context, dynamic scaling lends more than is used by itself."""
    qwen = BASE | {"max_position_embeddings": 40960}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert ModelConfig.from_hf(qwen | {"rope_scaling": yarn}).context_length == 131072
    assert ModelConfig.from_hf(BASE | {"rope_scaling": YARN}).context_length == 256
    dynamic = ModelConfig.from_hf(BASE | {"rope_scaling": {"type": "dynamic", "factor": 4.0}})
    assert (dynamic.context_length, dynamic.longest_context) == (256, 1024)
    plain = ModelConfig.from_hf(BASE)
    np.testing.assert_array_equal(dynamic.rotary_frequencies(), plain.rotary_frequencies())


FAMILIES = {
    name: BASE | {"architectures": [f"{prefix}ForCausalLM"], "model_type": name}
    for name, prefix in (("mistral", "Mistral"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3"))
}
WINDOWED = {"use_sliding_window": True, "sliding_window": 9}


@pytest.mark.parametrize(
    ("family", "fields", "windows"),
    [
        ("mistral", {}, [4096, 4096]),  # what transformers takes for a missing key
        ("mistral", {"sliding_window": None}, [None, None]),
        ("mistral", {"sliding_window": 9}, [9, 9]),
        ("qwen2", {}, [None, None]),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 0}, [None, None]),
        ("qwen2", WINDOWED, [None, None]),  # from layer 28 on
        ("qwen2", WINDOWED | {"max_window_layers": 1}, [None, 9]),
        ("qwen2", WINDOWED | {"max_window_layers": 0}, [9, 9]),
        ("qwen2", WINDOWED | {"layer_types": ["sliding_attention", "full_attention"]}, [9, None]),
        ("qwen3", WINDOWED | {"layer_types": ["full_attention", "full_attention"]}, [None, None]),
        ("qwen3", WINDOWED | {"max_window_layers": 1}, [None, 9]),
    ],
)
def test_windows_of_layers_and_back(family, fields, windows):
    config = ModelConfig.from_hf(FAMILIES[family] | fields)
    assert [layer.attention.sliding_window for layer in config.layer_specs] == windows
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_what_a_family_takes_for_missing_keys():
    sizes = {"hidden_size": 320, "num_attention_heads": 32}
    missing = {name: value for name, value in (FAMILIES["qwen3"] | sizes).items() if name != "num_key_value_heads"}
    config = ModelConfig.from_hf(missing)
    assert (config.head_dim, config.num_key_value_heads) == (128, 32)
    assert ModelConfig.from_hf(FAMILIES["qwen2"]).head_dim == 16
    assert all(layer.attention.qkv_bias for layer in ModelConfig.from_hf(FAMILIES["qwen2"]).layer_specs)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("mistral", {"attn_logit_softcapping": 30.0}, r"^config.json has attn_logit_softcapping 30.0, by which models"),
        (
            "mistral",
            {"layer_types": ["full_attention"] * 2},
            r"^config.json has layer_types \['full_attention', 'full_",
        ),
        ("mistral", {"sliding_window": 0}, r"^config.json sliding_window is 0; it must be a whole number of at least"),
        ("mistral", {"sliding_window": 9, "use_sliding_window": False}, r"^config.json sliding_window is 9 and use_sl"),
        ("qwen2", {"use_sliding_window": 1}, r"^config.json use_sliding_window is 1; it must be true or false$"),
        ("qwen2", WINDOWED | {"max_window_layers": "x"}, r"^config.json max_window_layers is 'x'; it must be a whole"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, r"^config.json layer_types has sliding_attention, which"),
        ("qwen3", {"layer_types": ["full_attention"]}, r"layer_types is \['full_attention'\]; it must list .* each of"),
        ("qwen3", {"layer_types": ["full_attention", "linear"]}, r"^config.json layer_types is .*it must list full_at"),
        ("qwen3", {"num_experts": 8}, r"^config.json has num_experts 8, by which models compute something else and w"),
        ("qwen3", {"rope_scaling": {"rope_type": "axial", "factor": 4.0}}, r"^rope_scaling kind is 'axial'; supporte"),
    ],
)
def test_a_key_that_a_family_does_not_serve_is_refused(family, fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        ModelConfig.from_hf(FAMILIES[family] | fields)
    assert "\n" not in str(caught.value)


def test_keys_that_nobody_reads_are_told_and_inert_ones_are_not(tmp_path, caplog):
    raw = FAMILIES["qwen2"] | {"attention_dropout": 0.1, "initializer_range": 0.02, "use_cache": True, "_name": "x"}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"use_mrope": False, "sliding_window": 5}))
    ModelConfig.from_directory(tmp_path)
    assert not caplog.messages
    (tmp_path / "config.json").write_text(json.dumps(raw | {"use_mrope": True, "invented": [3]}))
    ModelConfig.from_directory(tmp_path)
    assert caplog.messages == ["config.json has invented, use_mrope, which Qwen2ForCausalLM does not know; not used"]
