"""Granite 3 and 4 (dense): Llama's layers, with multipliers of embeddings, scores, residuals and logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.families.family import Family
from jaxserve.models.families.mlp_keys import gated_mlp
from jaxserve.models.layer_specs import LayerSpec, SelfAttentionSpec
from jaxserve.models.loading.config_keys import flag, optional, required_count
from jaxserve.models.value_checks import check_number


def layers(keys: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """Maps the keys of a `config.json` to layers."""
    biased = flag(keys, "attention_bias")
    layer = LayerSpec(
        SelfAttentionSpec(scale=_multiplier(keys, "attention_multiplier"), qkv_bias=biased, out_bias=biased),
        gated_mlp(keys, bias=flag(keys, "mlp_bias")),
        residual_multiplier=_multiplier(keys, "residual_multiplier"),
    )
    return (layer,) * required_count(keys, "num_hidden_layers")


def fields(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Maps keys to fields of the configuration."""
    return {name: _multiplier(keys, name) for name in ("embedding_multiplier", "logits_scaling")}


def _multiplier(keys: Mapping[str, Any], name: str) -> float:
    value = optional(keys, name, 1.0)
    check_number(f"config.json {name}", value)
    return float(value)


GRANITE = Family(
    "GraniteForCausalLM",
    "granite",
    layers,
    {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    },
    fields=fields,
)
