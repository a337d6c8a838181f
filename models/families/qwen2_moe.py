"""Qwen1.5-MoE and Qwen2-MoE: Qwen2's layers with experts in place of the MLP, and one that all tokens go through."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.families import expert_keys
from jaxserve.models.families.family import Family
from jaxserve.models.families.layer_windows import layer_windows
from jaxserve.models.families.mlp_keys import activation, gated_mlp
from jaxserve.models.layer_specs import LayerSpec, MLPSpec, SelfAttentionSpec
from jaxserve.models.loading.config_keys import flag, optional, optional_count, required_count


def layers(keys: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """Maps the keys of a `config.json` to layers; without `layer_types` the even ones have the window, up to
    `max_window_layers`.
    """
    count = required_count(keys, "num_hidden_layers")
    windowed = flag(keys, "use_sliding_window")
    most = optional_count(keys, "max_window_layers") or count
    kinds = [("full_attention", "sliding_attention")[windowed and n % 2 == 0 and n < most] for n in range(count)]
    biased = optional(keys, "qkv_bias", True) is True
    experts = MLPSpec(
        optional_count(keys, "moe_intermediate_size") or 1408,
        kind="experts",
        activation=activation(keys),
        router=expert_keys.router(
            keys,
            count=60,
            per_token=4,
            renormalized=flag(keys, "norm_topk_prob"),
            shared_size=optional_count(keys, "shared_expert_intermediate_size") or 5632,
        ),
    )
    return tuple(
        LayerSpec(
            SelfAttentionSpec(sliding_window=window, qkv_bias=biased),
            experts if sparse else gated_mlp(keys),
        )
        for window, sparse in zip(layer_windows(keys, kinds), expert_keys.sparse_layers(keys, count), strict=True)
    )


QWEN2_MOE = Family(
    "Qwen2MoeForCausalLM",
    "qwen2_moe",
    layers,
    {"num_key_value_heads": 16, "sliding_window": 4096, "max_window_layers": 28, "max_position_embeddings": 32768},
    inert=expert_keys.INERT | {"intermediate_size"},  # that of layers without experts, of which there may be none
)
