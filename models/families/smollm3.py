"""SmolLM3: Llama's layers, of which every fourth does not rotate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.families.family import Family
from jaxserve.models.families.layer_windows import layer_windows
from jaxserve.models.families.mlp_keys import gated_mlp
from jaxserve.models.layer_specs import LayerSpec, SelfAttentionSpec
from jaxserve.models.loading.config_keys import flag, optional_count, required_count
from jaxserve.models.value_checks import brief


def layers(keys: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """Maps the keys of a `config.json` to layers."""
    rotated = _rotated(keys)
    windowed = flag(keys, "use_sliding_window") and optional_count(keys, "sliding_window") is not None
    kinds = ["full_attention" if turns or not windowed else "sliding_attention" for turns in rotated]
    biased = flag(keys, "attention_bias")
    mlp = gated_mlp(keys, bias=flag(keys, "mlp_bias"))
    return tuple(
        LayerSpec(SelfAttentionSpec(sliding_window=window, rotation=turns, qkv_bias=biased, out_bias=biased), mlp)
        for window, turns in zip(layer_windows(keys, kinds), rotated, strict=True)
    )


def _rotated(keys: Mapping[str, Any]) -> list[bool]:
    """Returns whether each layer rotates: `no_rope_layers` is 1 where it does."""
    count = required_count(keys, "num_hidden_layers")
    interval = optional_count(keys, "no_rope_layer_interval") or 4
    turns = keys.get("no_rope_layers")
    if turns is None:
        return [(number + 1) % interval != 0 for number in range(count)]
    if not isinstance(turns, list) or len(turns) != count or any(turn not in (0, 1) for turn in turns):
        raise ValueError(
            f"config.json no_rope_layers is {brief(turns)}; it must list 1 (rotated) or 0 for each of "
            f"num_hidden_layers {count}"
        )
    return [bool(turn) for turn in turns]


SMOLLM3 = Family(
    "SmolLM3ForCausalLM",
    "smollm3",
    layers,
    {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    rope_theta=2e6,
)
