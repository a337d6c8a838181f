"""Gemma 3, its text part: Gemma 2 with normed queries and keys, two rotations, and five windows for a full layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxserve.models.families.family import Family
from jaxserve.models.families.gemma2 import DEFAULTS, INERT, fields, gemma_layers
from jaxserve.models.layer_specs import LayerSpec
from jaxserve.models.layers.rope import Rope, RopeScaling
from jaxserve.models.loading.config_keys import optional, optional_count
from jaxserve.models.loading.rope_settings import layer_type_settings, rope_settings


def layers(keys: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """Maps the keys of a `config.json` to layers; those with a window have the local rotation."""
    pattern = optional_count(keys, "sliding_window_pattern") or 6
    local = _local_rope(keys)
    return tuple(
        layer
        if layer.attention.sliding_window is None
        else dataclasses.replace(layer, attention=dataclasses.replace(layer.attention, rope=local))
        for layer in gemma_layers(keys, pattern=pattern, qk_norm=True)
    )


def _local_rope(keys: Mapping[str, Any]) -> Rope:
    theta, scaling = optional(keys, "rope_local_base_freq", 10000.0), RopeScaling()
    if layer_type_settings(keys, "sliding_attention") is not None:
        context = optional_count(keys, "max_position_embeddings") or 1
        theta, scaling = rope_settings(keys, context, "sliding_attention", theta)
    return Rope(theta, scaling)


GEMMA3 = Family(
    "Gemma3ForCausalLM",
    "gemma3_text",
    layers,
    DEFAULTS | {"vocab_size": 262208, "max_position_embeddings": 131072},
    fields=fields,
    inert=INERT,
    rope_theta=1e6,
    nested_rope=True,
    scaled_context=True,
)
