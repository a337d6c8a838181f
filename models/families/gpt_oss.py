"""gpt-oss: experts with biases and a clamped SwiGLU, sinks in the softmax, a window on every other layer, yarn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.families import expert_keys
from jaxserve.models.families.family import Family
from jaxserve.models.families.layer_windows import listed_windows
from jaxserve.models.families.mlp_keys import activation
from jaxserve.models.families.tensor_names import TensorNames
from jaxserve.models.layer_specs import GateClamp, LayerSpec, MLPSpec, SelfAttentionSpec
from jaxserve.models.loading.config_keys import flag, optional, required_count
from jaxserve.models.value_checks import brief, check_number


def layers(keys: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """Maps the keys of a `config.json` to layers."""
    if not (keys.get("rope_scaling") or keys.get("rope_parameters")):
        raise ValueError("config.json has no rope_scaling; GptOssForCausalLM needs it: published ones are yarn's")
    if activation(keys) != "silu":
        raise ValueError(f"config.json hidden_act is {brief(keys['hidden_act'])}; GptOssForCausalLM has silu alone")
    limit, alpha = optional(keys, "swiglu_limit", 7.0), optional(keys, "swiglu_alpha", 1.702)
    for name, value in (("swiglu_limit", limit), ("swiglu_alpha", alpha)):
        check_number(f"config.json {name}", value)
    biased = flag(keys, "attention_bias")
    mlp = MLPSpec(
        required_count(keys, "intermediate_size"),
        bias=True,
        kind="experts",
        router=expert_keys.router(keys, count=128, per_token=4, softmax="chosen", bias=True),
        clamp=GateClamp(limit, alpha),
    )
    return tuple(
        LayerSpec(SelfAttentionSpec(sliding_window=window, sinks=True, qkv_bias=biased, out_bias=biased), mlp)
        for window in listed_windows(keys, pattern=2)
    )


GPT_OSS = Family(
    "GptOssForCausalLM",
    "gpt_oss",
    layers,
    {
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "sliding_window": 128,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
    },
    inert=expert_keys.INERT | {"initial_context_length"},
    rope_theta=150000.0,
    names=TensorNames(
        renamed={"mlp.gate": "mlp.router"},
        fused_experts={"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
    ),
    dequantized=frozenset({"mxfp4"}),
)
