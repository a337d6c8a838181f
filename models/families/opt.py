"""OPT: learned positions, LayerNorm before or after, a plain MLP, and projections around narrower embeddings."""

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
    if flag(keys, "_remove_final_layer_norm"):
        raise ValueError("config.json _remove_final_layer_norm is true; only models with that norm are served")
    if optional(keys, "layer_norm_elementwise_affine", True) is not True:
        raise ValueError("config.json layer_norm_elementwise_affine is false; only norms with scales are served")
    biased = optional(keys, "enable_bias", True) is True
    layer = LayerSpec(
        SelfAttentionSpec(rotation=False, qkv_bias=biased, out_bias=biased),
        MLPSpec(
            required_count(keys, "intermediate_size"),
            bias=biased,
            kind="plain",
            activation=activation(keys, "activation_function", "relu"),
        ),
        norm="layer",
        norm_place="before" if optional(keys, "do_layer_norm_before", True) else "sum",
    )
    return (layer,) * required_count(keys, "num_hidden_layers")


def fields(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Maps keys to fields of the configuration."""
    size = optional_count(keys, "word_embed_proj_dim")
    return {
        "learned_positions": True,
        "embedding_size": None if size == required_count(keys, "hidden_size") else size,
    }


NAMES = TensorNames(
    renamed={
        "model.layers": "model.decoder.layers",
        "model.embed_tokens": "model.decoder.embed_tokens",
        "model.embed_positions": "model.decoder.embed_positions",
        "model.project_in": "model.decoder.project_in",
        "model.project_out": "model.decoder.project_out",
        "model.norm": "model.decoder.final_layer_norm",
        "self_attn.o_proj": "self_attn.out_proj",
        "input_layernorm": "self_attn_layer_norm",
        "post_attention_layernorm": "final_layer_norm",
        "mlp.up_proj": "fc1",
        "mlp.down_proj": "fc2",
    },
    skipped_rows={"model.embed_positions": 2},  # the first position is the third row
    prefixes=(("decoder.", "model.decoder."),),
)

OPT = Family(
    "OPTForCausalLM",
    "opt",
    layers,
    {
        "vocab_size": 50272,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    fields=fields,
    key_names={"intermediate_size": "ffn_dim"},
    inert=frozenset({"layerdrop", "init_std", "activation_dropout"}),
    names=NAMES,
)
