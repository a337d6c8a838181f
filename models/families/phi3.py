"""Phi-3, Phi-3.5 and Phi-4: Llama's layers from fused tensors, with longrope, and rotated shares of heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.families.family import Family
from jaxserve.models.families.mlp_keys import gated_mlp
from jaxserve.models.families.tensor_names import TensorNames
from jaxserve.models.layer_specs import LayerSpec, SelfAttentionSpec
from jaxserve.models.loading.config_keys import flag, optional_count, required_count


def layers(keys: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """Maps the keys of a `config.json` to layers, which all have the one window, or none."""
    for name in ("attention_bias", "mlp_bias", "lm_head_bias"):
        if flag(keys, name):
            raise ValueError(f"config.json {name} is true; Phi3ForCausalLM has no such biases: set it to false")
    layer = LayerSpec(SelfAttentionSpec(sliding_window=optional_count(keys, "sliding_window")), gated_mlp(keys))
    return (layer,) * required_count(keys, "num_hidden_layers")


NAMES = TensorNames(
    fused={
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    }
)

PHI3 = Family(
    "Phi3ForCausalLM",
    "phi3",
    layers,
    {
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    partial_rotation=True,
    inert=frozenset({"original_max_position_embeddings"}),  # longrope alone reads it
    names=NAMES,
)
