"""Shapes of every family, as their checkpoints' config.json has them, and random checkpoints of these shapes.

The first shape of a family is the one that every check compares with recorded numbers (test_family_parity.py); all of
them are compared with transformers itself by `make test-all` (test_family_matrix.py).
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np

from jaxserve.models import params
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers.parameter import Initial
from tests.models.checkpoints import BASE, write_checkpoint

PROMPT_TOKENS = 45
NEW_TOKENS = 64
WINDOW = 12
"""Positions of windows; prompts are longer."""

_SIZES_OF_BASE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "max_position_embeddings"),
)

SIZES: dict[str, Any] = {
    **{name: BASE[name] for name in _SIZES_OF_BASE},
    **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
}
_GPT2_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "n_positions",
    "intermediate_size": "n_inner",
}
ODD = {"vocab_size": 137, "hidden_size": 48, "intermediate_size": 90}
SINGLE = {"num_key_value_heads": 1}
MANY = {"num_key_value_heads": 4}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
SLIDING, FULL = "sliding_attention", "full_attention"


def _scaled(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0} | fields}


def _longrope(pairs: int) -> dict[str, Any]:
    short, long = [[start + step * number for number in range(pairs)] for start, step in ((1.0, 0.1), (1.5, 0.5))]
    return {"short_factor": short, "long_factor": long}


GEMMA = {"head_dim": 32, "sliding_window": WINDOW, "query_pre_attn_scalar": 24}
GRANITE = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 0.25,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.1,
}

QWEN2_MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48} | {
    "shared_expert_intermediate_size": 80
}
QWEN3_MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "head_dim": 32}

GPT_OSS = {"sliding_window": WINDOW, "num_experts_per_tok": 3, "head_dim": 32} | _scaled(
    "yarn", factor=8.0, original_max_position_embeddings=32, truncate=False, rope_theta=150000.0
)

FAMILIES: dict[str, tuple[str, str, tuple[dict[str, Any], ...]]] = {
    "llama": (
        "LlamaForCausalLM",
        "llama",
        (
            UNTIED | _scaled("yarn", factor=8.0, original_max_position_embeddings=32),
            ODD | SINGLE | TIED | {"attention_bias": True, "mlp_bias": True},
            # Prompts are longer than the original context: up to there transformers rotates otherwise.
            MANY | {"rope_scaling": _longrope(8) | {"type": "longrope", "original_max_position_embeddings": 32}},
            {"rope_scaling": {"type": "dynamic", "factor": 4.0}, "head_dim": 32, "rope_theta": 500000.0},
            _scaled("linear", factor=4.0) | TIED,
            _scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
            | {"original_max_position_embeddings": 32, "head_dim": 32},
        ),
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        "qwen2",
        (
            TIED | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
            ODD | SINGLE | UNTIED | {"use_sliding_window": False, "sliding_window": WINDOW},
            MANY | _scaled("yarn", factor=4.0, original_max_position_embeddings=64) | UNTIED,
        ),
    ),
    "qwen3": (
        "Qwen3ForCausalLM",
        "qwen3",
        (
            UNTIED
            | {"head_dim": 32, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": [SLIDING, FULL]},
            ODD | SINGLE | TIED | {"head_dim": 16},
            MANY | UNTIED | {"head_dim": 16, "attention_bias": True},
        ),
    ),
    "mistral": (
        "MistralForCausalLM",
        "mistral",
        (
            UNTIED | {"sliding_window": WINDOW, "head_dim": 32},
            ODD | SINGLE | TIED | {"sliding_window": None, "head_dim": 12},
            MANY | UNTIED | {"sliding_window": WINDOW, "head_dim": 16, "rope_theta": 1e6},
        ),
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "mixtral",
        (
            UNTIED | {"num_local_experts": 4, "num_experts_per_tok": 2},
            ODD | SINGLE | TIED | {"num_local_experts": 3, "num_experts_per_tok": 3, "sliding_window": WINDOW},
            MANY | UNTIED | {"num_local_experts": 8, "num_experts_per_tok": 1, "head_dim": 32, "rope_theta": 10000.0},
        ),
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        (
            QWEN2_MOE | UNTIED | {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": WINDOW},
            QWEN2_MOE | ODD | SINGLE | TIED | {"mlp_only_layers": [0], "qkv_bias": False},
            QWEN2_MOE | MANY | UNTIED | {"norm_topk_prob": True, "hidden_act": "gelu", "num_experts_per_tok": 8},
        ),
    ),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        (
            QWEN3_MOE | UNTIED | {"norm_topk_prob": True, "mlp_only_layers": [1], "num_hidden_layers": 3},
            QWEN3_MOE | ODD | SINGLE | TIED | {"num_experts_per_tok": 1, "attention_bias": True, "head_dim": 12},
            QWEN3_MOE
            | MANY
            | UNTIED
            | {"norm_topk_prob": False, "decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": WINDOW},
        ),
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "gpt_oss",
        (
            GPT_OSS | UNTIED | {"num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 1.0},
            GPT_OSS | ODD | SINGLE | TIED | {"num_local_experts": 6, "layer_types": [FULL, SLIDING], "head_dim": 12},
            GPT_OSS
            | MANY
            | UNTIED
            | {"num_local_experts": 5, "num_experts_per_tok": 1, "attention_bias": False, "num_hidden_layers": 3},
        ),
    ),
    "ministral": (
        "MinistralForCausalLM",
        "ministral",
        (
            UNTIED | {"sliding_window": WINDOW, "head_dim": 32, "layer_types": [SLIDING, FULL]},
            ODD | SINGLE | TIED | {"sliding_window": WINDOW, "head_dim": 12},
            MANY | UNTIED | {"sliding_window": WINDOW, "head_dim": 16, "layer_types": [FULL, FULL]},
        ),
    ),
    "ministral3": (
        "Ministral3ForCausalLM",
        "ministral3",
        (
            UNTIED
            | {"head_dim": 32}
            | _scaled("yarn", factor=8.0, original_max_position_embeddings=32, llama_4_scaling_beta=0.1),
            ODD
            | SINGLE
            | TIED
            | {"head_dim": 16, "sliding_window": WINDOW}
            | _scaled("yarn", factor=16.0, original_max_position_embeddings=16, llama_4_scaling_beta=0.1)
            | {"max_position_embeddings": 256},
            MANY
            | UNTIED
            | {"head_dim": 16}
            | _scaled("yarn", factor=4.0, original_max_position_embeddings=64, llama_4_scaling_beta=0.3)
            | {"tie_word_embeddings": False},
        ),
    ),
    "phi3": (
        "Phi3ForCausalLM",
        "phi3",
        (
            {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 32, "sliding_window": 262144}
            | {"rope_scaling": _longrope(6) | {"type": "longrope"}},
            ODD | SINGLE | TIED | {"sliding_window": WINDOW},
            MANY | UNTIED | {"original_max_position_embeddings": 256, "partial_rotary_factor": 0.5},
        ),
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        "gemma2",
        (
            GEMMA,
            GEMMA | ODD | SINGLE | {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 2.0, "head_dim": 16},
            GEMMA | MANY | UNTIED | {"attn_logit_softcapping": None, "layer_types": [FULL, SLIDING]},
        ),
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "gemma3_text",
        (
            GEMMA | {"layer_types": [SLIDING, FULL]},
            GEMMA | ODD | SINGLE | {"sliding_window_pattern": 2, "rope_local_base_freq": 500.0, "num_hidden_layers": 3},
            GEMMA
            | MANY
            | UNTIED
            | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 30000.0}
            | {"layer_types": [SLIDING, FULL], "final_logit_softcapping": 5.0},
        ),
    ),
    "olmo2": (
        "Olmo2ForCausalLM",
        "olmo2",
        (
            UNTIED,
            ODD | SINGLE | TIED,
            MANY | UNTIED | {"attention_bias": True, "rope_theta": 500000.0},
        ),
    ),
    "granite": (
        "GraniteForCausalLM",
        "granite",
        (
            GRANITE | TIED,
            GRANITE | ODD | SINGLE | UNTIED | {"attention_bias": True},
            GRANITE | MANY | TIED | {"mlp_bias": True, "residual_multiplier": 1.0},
        ),
    ),
    "smollm3": (
        "SmolLM3ForCausalLM",
        "smollm3",
        (
            TIED | {"no_rope_layer_interval": 2},
            ODD | SINGLE | UNTIED | {"no_rope_layers": [0, 1], "attention_bias": True},
            MANY
            | TIED
            | {"use_sliding_window": True, "sliding_window": WINDOW, "num_hidden_layers": 3}
            | {"no_rope_layers": [1, 0, 1], "mlp_bias": True},
        ),
    ),
    "starcoder2": (
        "Starcoder2ForCausalLM",
        "starcoder2",
        (
            TIED | {"sliding_window": WINDOW},
            ODD | SINGLE | UNTIED | {"sliding_window": None, "use_bias": False},
            MANY | TIED | {"sliding_window": WINDOW, "rope_theta": 999999.0, "hidden_act": "gelu"},
        ),
    ),
    "opt": (
        "OPTForCausalLM",
        "opt",
        (
            {"word_embed_proj_dim": 48, "do_layer_norm_before": False},
            ODD | UNTIED,
            TIED | {"enable_bias": False, "activation_function": "gelu", "num_attention_heads": 2},
        ),
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "gpt2",
        (
            {"intermediate_size": None},
            ODD | UNTIED | {"activation_function": "gelu"},
            {"scale_attn_by_inverse_layer_idx": True, "num_attention_heads": 8, "reorder_and_upcast_attn": True},
        ),
    ),
}
"""Of each family its architecture, its model_type, and what its shapes have besides SIZES."""


def shape_names(family: str | None = None) -> list[str]:
    """Names of all shapes, or of a family's: its name and the number of the shape."""
    return [
        f"{name}.{number}" for name in FAMILIES if family in (None, name) for number in range(len(FAMILIES[name][2]))
    ]


def raw_config(name: str) -> dict[str, Any]:
    """The config.json of a shape."""
    family, _, number = name.partition(".")
    architecture, model_type, shapes = FAMILIES[family]
    fields = SIZES | shapes[int(number)]
    if family in ("opt", "gpt2"):
        del fields["num_key_value_heads"]
    if family == "opt":
        fields["ffn_dim"] = fields.pop("intermediate_size")
    if family == "gpt2":
        fields = {_GPT2_NAMES.get(key, key): value for key, value in fields.items()}
    return {"architectures": [architecture], "model_type": model_type, "dtype": "float32"} | fields


def random_weights(config: ModelConfig, seed: int) -> dict[str, np.ndarray]:
    """float32 tensors of a checkpoint, drawn so that every one of them matters."""
    random = np.random.RandomState(seed)
    tensors = {}
    for path, parameter in params.parameters(config).items():
        for source in parameter.sources:
            if source.tensor in tensors:
                continue
            drawn = random.standard_normal(source.shape)
            if parameter.initial is Initial.ONES:
                drawn = 1 + 0.2 * drawn
            elif parameter.initial is Initial.ZEROS or path[-1] in ("embedding", "positions"):
                drawn = 0.3 * drawn
            else:
                drawn = 1.5 * drawn / np.sqrt(source.shape[-2 if source.transposed else -1])
            tensors[source.tensor] = drawn.astype(np.float32)
    return tensors


def write_family_shape(directory: pathlib.Path, name: str, seed: int) -> pathlib.Path:
    """Writes the checkpoint of a shape; returns the directory."""
    raw = raw_config(name)
    config = dataclasses.replace(ModelConfig.from_hf(raw), dtype="float32")
    return write_checkpoint(directory, raw, random_weights(config, seed))


def prompts(name: str, lengths: tuple[int, ...] = (PROMPT_TOKENS,)) -> list[np.ndarray]:
    """int32 random tokens, of each length."""
    vocabulary = raw_config(name)["vocab_size"]
    return [
        np.random.RandomState(number + 7).randint(0, vocabulary, length).astype(np.int32)
        for number, length in enumerate(lengths)
    ]
