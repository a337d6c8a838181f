"""Llama 2 and 3, and models of the same architecture: full attention, identical layers, biases everywhere or
nowhere.
"""

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
    layer = LayerSpec(
        SelfAttentionSpec(qkv_bias=biased, out_bias=biased),
        gated_mlp(keys, bias=flag(keys, "mlp_bias")),
    )
    return (layer,) * required_count(keys, "num_hidden_layers")


# Checkpoints that were converted to this architecture keep keys of the one they come from; transformers ignores them.
LLAMA = Family("LlamaForCausalLM", "llama", layers, ignores_others=True)
