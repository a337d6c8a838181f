"""Mixtral: Mistral's layers with experts in place of the MLP, of which the chosen ones' weights sum to 1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.families import expert_keys
from jaxserve.models.families.family import Family
from jaxserve.models.families.mlp_keys import activation
from jaxserve.models.families.tensor_names import EXPERTS, TensorNames
from jaxserve.models.layer_specs import LayerSpec, MLPSpec, SelfAttentionSpec
from jaxserve.models.loading.config_keys import optional_count, required_count


def layers(keys: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """Maps the keys of a `config.json` to layers, which all have the one window, or none."""
    layer = LayerSpec(
        SelfAttentionSpec(sliding_window=optional_count(keys, "sliding_window")),
        MLPSpec(
            required_count(keys, "intermediate_size"),
            kind="experts",
            activation=activation(keys),
            router=expert_keys.router(keys, count=8, per_token=2, renormalized=True),
        ),
    )
    return (layer,) * required_count(keys, "num_hidden_layers")


MIXTRAL = Family(
    "MixtralForCausalLM",
    "mixtral",
    layers,
    {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072},
    inert=expert_keys.INERT,
    rope_theta=1e6,
    names=TensorNames(
        renamed={EXPERTS: "block_sparse_moe.experts", "mlp.gate": "block_sparse_moe.gate"},
        expert_matrices={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    ),
)
