"""Ministral: Mistral's layers, of which `layer_types` says whether each has the window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.families.family import Family
from jaxserve.models.families.layer_windows import listed_windows
from jaxserve.models.families.mlp_keys import gated_mlp
from jaxserve.models.layer_specs import LayerSpec, SelfAttentionSpec


def layers(keys: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """Maps the keys of a `config.json` to layers."""
    mlp = gated_mlp(keys)
    return tuple(LayerSpec(SelfAttentionSpec(sliding_window=window), mlp) for window in listed_windows(keys))


MINISTRAL = Family(
    "MinistralForCausalLM",
    "ministral",
    layers,
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
)
