"""GPT-2: learned positions, LayerNorm, a plain MLP with GELU, and matrices that are stored [in, out]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.families.family import Family
from jaxserve.models.families.mlp_keys import activation
from jaxserve.models.families.tensor_names import TensorNames
from jaxserve.models.layer_specs import LayerSpec, MLPSpec, SelfAttentionSpec
from jaxserve.models.loading.config_keys import flag, optional, optional_count, required_count


def layers(keys: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """Maps the keys of a `config.json` to layers."""
    if flag(keys, "add_cross_attention"):
        raise ValueError("config.json add_cross_attention is true; only models without an encoder are served")
    hidden, heads = required_count(keys, "hidden_size"), required_count(keys, "num_attention_heads")
    scale = (hidden // heads) ** -0.5 if optional(keys, "scale_attn_weights", True) else 1.0
    fades = flag(keys, "scale_attn_by_inverse_layer_idx")
    mlp = MLPSpec(
        optional_count(keys, "intermediate_size") or 4 * hidden,
        bias=True,
        kind="plain",
        activation=activation(keys, "activation_function", "gelu_new"),
    )
    kinds = [
        SelfAttentionSpec(rotation=False, scale=scale / (number + 1) if fades else scale, qkv_bias=True, out_bias=True)
        for number in range(required_count(keys, "num_hidden_layers"))
    ]
    return tuple(LayerSpec(kind, mlp, norm="layer") for kind in kinds)


def fields(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Maps keys to fields of the configuration."""
    del keys
    return {"learned_positions": True}


NAMES = TensorNames(
    renamed={
        "model.layers": "transformer.h",
        "model.embed_tokens": "transformer.wte",
        "model.embed_positions": "transformer.wpe",
        "model.norm": "transformer.ln_f",
        "input_layernorm": "ln_1",
        "post_attention_layernorm": "ln_2",
        "self_attn.qkv_proj": "attn.c_attn",
        "self_attn.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    },
    fused={"self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")},
    transposed=frozenset({"self_attn.qkv_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"}),
    # The first checkpoints were saved without the head, and with masks.
    prefixes=tuple((f"{part}.", f"transformer.{part}.") for part in ("h", "wte", "wpe", "ln_f")),
    ignored=(".attn.bias", ".attn.masked_bias"),
)

GPT2 = Family(
    "GPT2LMHeadModel",
    "gpt2",
    layers,
    {
        "vocab_size": 50257,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    fields=fields,
    key_names={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
        "rms_norm_eps": "layer_norm_epsilon",
    },
    # How heads of other models pool, and where sums of scores are float32, which they are here anyway.
    inert=frozenset(
        "n_ctx reorder_and_upcast_attn summary_type summary_use_proj summary_activation summary_proj_to_labels "
        "summary_first_dropout".split()
    ),
    names=NAMES,
)
