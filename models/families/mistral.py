"""Mistral 7B, Nemo and Small: Llama's layers without biases, under a sliding window in the first releases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.families.family import Family
from jaxserve.models.families.mlp_keys import gated_mlp
from jaxserve.models.layer_specs import LayerSpec, SelfAttentionSpec
from jaxserve.models.loading.config_keys import optional_count, required_count


def layers(keys: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """Maps the keys of a `config.json` to layers, which all have the one window, or none."""
    window = optional_count(keys, "sliding_window")
    if window is not None and keys.get("use_sliding_window") is False:
        raise ValueError(
            f"config.json sliding_window is {window} and use_sliding_window is false; MistralForCausalLM has the "
            "window wherever sliding_window is set: remove use_sliding_window, or set sliding_window to null"
        )
    layer = LayerSpec(SelfAttentionSpec(sliding_window=window), gated_mlp(keys))
    return (layer,) * required_count(keys, "num_hidden_layers")


MISTRAL = Family("MistralForCausalLM", "mistral", layers, {"sliding_window": 4096, "num_key_value_heads": 8})
