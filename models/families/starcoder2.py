"""StarCoder 2: LayerNorm, a plain MLP with GELU, biases everywhere, and one window in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.models.families.family import Family
from jaxserve.models.families.mlp_keys import activation
from jaxserve.models.families.tensor_names import TensorNames
from jaxserve.models.layer_specs import LayerSpec, MLPSpec, SelfAttentionSpec
from jaxserve.models.loading.config_keys import flag, optional_count, required_count


def layers(keys: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """Maps the keys of a `config.json` to layers."""
    biased = flag(keys, "use_bias")
    layer = LayerSpec(
        SelfAttentionSpec(sliding_window=optional_count(keys, "sliding_window"), qkv_bias=biased, out_bias=biased),
        MLPSpec(
            required_count(keys, "intermediate_size"),
            bias=biased,
            kind="plain",
            activation=activation(keys, default="gelu_pytorch_tanh"),
        ),
        norm="layer",
    )
    return (layer,) * required_count(keys, "num_hidden_layers")


STARCODER2 = Family(
    "Starcoder2ForCausalLM",
    "starcoder2",
    layers,
    {
        "vocab_size": 49152,
        "hidden_size": 3072,
        "intermediate_size": 12288,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "use_bias": True,
        "tie_word_embeddings": True,
    },
    key_names={"rms_norm_eps": "norm_epsilon"},
    inert=frozenset({"residual_dropout", "embedding_dropout", "layer_norm_epsilon", "norm_type", "mlp_type"}),
    names=TensorNames(renamed={"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"}),
)
