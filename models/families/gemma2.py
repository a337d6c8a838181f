"""Gemma 2: windows on every other layer, soft caps, norms around attention and MLP, GeGLU, scaled embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.families.family import Family
from jaxserve.models.families.layer_windows import listed_windows
from jaxserve.models.families.mlp_keys import activation
from jaxserve.models.layer_specs import LayerSpec, MLPSpec, SelfAttentionSpec
from jaxserve.models.loading.config_keys import flag, optional, required_count
from jaxserve.models.value_checks import check_number


def layers(keys: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """Maps the keys of a `config.json` to layers."""
    return gemma_layers(keys, pattern=2, qk_norm=False)


def gemma_layers(keys: Mapping[str, Any], *, pattern: int, **attention: Any) -> tuple[LayerSpec, ...]:
    """Maps the keys that Gemma 2 and Gemma 3 share; further arguments are fields of `SelfAttentionSpec`.

    pattern: every so manyth layer has full attention where `layer_types` does not tell it.
    """
    if flag(keys, "use_bidirectional_attention"):
        raise ValueError("config.json use_bidirectional_attention is true; only causal attention is served")
    biased = flag(keys, "attention_bias")
    scalar = optional(keys, "query_pre_attn_scalar", 256)
    check_number("config.json query_pre_attn_scalar", scalar)
    gelu = activation(keys, "hidden_activation", "gelu_pytorch_tanh")
    mlp = MLPSpec(required_count(keys, "intermediate_size"), activation=gelu)
    kinds = [
        SelfAttentionSpec(
            sliding_window=window,
            soft_cap=keys.get("attn_logit_softcapping"),
            scale=scalar**-0.5,
            qkv_bias=biased,
            out_bias=biased,
            **attention,
        )
        for window in listed_windows(keys, pattern)
    ]
    return tuple(LayerSpec(kind, mlp, norm="rms_offset", norm_place="both") for kind in kinds)


def fields(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Maps keys to fields of the configuration."""
    return {
        "embedding_multiplier": required_count(keys, "hidden_size") ** 0.5,
        "final_logit_softcapping": keys.get("final_logit_softcapping"),
    }


DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
"""What transformers takes for keys that checkpoints of Gemma 2 and Gemma 3 leave out."""

INERT = frozenset({"hidden_act"})
"""hidden_activation alone counts."""

GEMMA2 = Family(
    "Gemma2ForCausalLM",
    "gemma2",
    layers,
    DEFAULTS
    | {"vocab_size": 256000, "max_position_embeddings": 8192}
    | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    fields=fields,
    inert=INERT,
)
