"""Qwen3-MoE: Qwen3's layers, with experts in place of the MLP of all or some of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.families import expert_keys
from jaxserve.models.families.family import Family
from jaxserve.models.families.mlp_keys import activation, gated_mlp
from jaxserve.models.layer_specs import LayerSpec, MLPSpec, SelfAttentionSpec
from jaxserve.models.loading.config_keys import flag, optional_count, required_count


def layers(keys: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """Maps the keys of a `config.json` to layers, which all have the one window, or none."""
    biased = flag(keys, "attention_bias")
    window = optional_count(keys, "sliding_window")
    window = window if flag(keys, "use_sliding_window") else None
    attention = SelfAttentionSpec(sliding_window=window, qk_norm=True, qkv_bias=biased, out_bias=biased)
    experts = MLPSpec(
        optional_count(keys, "moe_intermediate_size") or 768,
        kind="experts",
        activation=activation(keys),
        router=expert_keys.router(keys, count=128, per_token=8, renormalized=flag(keys, "norm_topk_prob")),
    )
    sparse = expert_keys.sparse_layers(keys, required_count(keys, "num_hidden_layers"))
    return tuple(LayerSpec(attention, experts if each else gated_mlp(keys)) for each in sparse)


QWEN3_MOE = Family(
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    layers,
    {"num_key_value_heads": 4, "sliding_window": 4096, "max_position_embeddings": 32768},
    inert=expert_keys.INERT | {"intermediate_size"},  # that of layers without experts, of which there may be none
)
