"""Qwen3 (dense): Llama's layers with per-head norms of queries and keys; windows are configured as for Qwen2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.families.family import Family
from jaxserve.models.families.layer_windows import layer_windows
from jaxserve.models.families.mlp_keys import gated_mlp
from jaxserve.models.layer_specs import LayerSpec, SelfAttentionSpec
from jaxserve.models.loading.config_keys import flag


def layers(keys: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """Maps the keys of a `config.json` to layers."""
    biased = flag(keys, "attention_bias")
    mlp = gated_mlp(keys)
    return tuple(
        LayerSpec(SelfAttentionSpec(sliding_window=window, qk_norm=True, qkv_bias=biased, out_bias=biased), mlp)
        for window in layer_windows(keys)
    )


DEFAULTS = {"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28}

QWEN3 = Family("Qwen3ForCausalLM", "qwen3", layers, DEFAULTS)
