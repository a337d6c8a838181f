"""OLMo 2: norms on the outputs of attention and MLP, and over the queries and keys of all heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.families.family import Family
from jaxserve.models.families.mlp_keys import gated_mlp
from jaxserve.models.layer_specs import LayerSpec, SelfAttentionSpec
from jaxserve.models.loading.config_keys import flag, required_count


def layers(keys: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """Maps the keys of a `config.json` to layers."""
    biased = flag(keys, "attention_bias")
    attention = SelfAttentionSpec(whole_qk_norm=True, qkv_bias=biased, out_bias=biased)
    return (LayerSpec(attention, gated_mlp(keys), norm_place="after"),) * required_count(keys, "num_hidden_layers")


OLMO2 = Family(
    "Olmo2ForCausalLM",
    "olmo2",
    layers,
    {
        "vocab_size": 50304,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    },
)
