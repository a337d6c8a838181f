"""Qwen2 and Qwen2.5: Llama's layers with biases on queries, keys and values, and sliding windows on listed layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.families.family import Family
from jaxserve.models.families.layer_windows import layer_windows
from jaxserve.models.families.mlp_keys import gated_mlp
from jaxserve.models.layer_specs import LayerSpec, SelfAttentionSpec


def layers(keys: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """Maps the keys of a `config.json` to layers."""
    mlp = gated_mlp(keys)
    return tuple(
        LayerSpec(SelfAttentionSpec(sliding_window=window, qkv_bias=True), mlp) for window in layer_windows(keys)
    )


QWEN2 = Family(
    "Qwen2ForCausalLM", "qwen2", layers, {"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
)
