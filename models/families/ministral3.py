"""Ministral 3: Mistral's layers with yarn, whose queries grow with their positions."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxserve.models.families import mistral
from jaxserve.models.families.family import Family
from jaxserve.models.layer_specs import LayerSpec, QueryGrowth
from jaxserve.models.loading.config_keys import required_count

BETA = "llama_4_scaling_beta"


def layers(keys: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """Maps the keys of a `config.json` to layers."""
    rotary = keys.get("rope_parameters") or keys.get("rope_scaling")
    rotary = rotary if isinstance(rotary, dict) else {}
    growth = None
    if rotary.get(BETA):
        growth = QueryGrowth(rotary[BETA], required_count(rotary, "original_max_position_embeddings"))
    return tuple(
        dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, query_growth=growth))
        for layer in mistral.layers(keys)
    )


YARN = {
    "type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    BETA: 0.1,
}

MINISTRAL3 = Family(
    "Ministral3ForCausalLM",
    "ministral3",
    layers,
    {
        "vocab_size": 131072,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 34,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-5,
        "rope_parameters": YARN,
    },
    rope_keys=frozenset({BETA}),
)
