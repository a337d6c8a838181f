"""Random checkpoints in Hugging Face's format, made from a seed, and the shapes the parity tests use."""

import dataclasses
import json
import math
import pathlib
import struct
from typing import Any

import ml_dtypes
import numpy as np

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "dtype": "float32",
}

# An original context of 32 puts wavelengths of small heads on both sides of and inside the blended range.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclasses.dataclass(frozen=True)
class Shape:
    """One architecture: fields that differ from BASE, and how many files its checkpoint is split into."""

    fields: dict[str, Any]
    shards: int = 1
    seed: int = 0

    @property
    def raw(self) -> dict[str, Any]:
        """Its config.json."""
        return BASE | self.fields


SHAPES: dict[str, Shape] = {
    "mha_tied": Shape({"num_key_value_heads": 4, "tie_word_embeddings": True}, seed=1),
    "gqa_untied": Shape({"num_attention_heads": 8, "num_key_value_heads": 2}, shards=3, seed=42),
    "mqa": Shape({"num_attention_heads": 6, "num_key_value_heads": 1, "hidden_size": 72}, seed=3),
    "head_dim": Shape({"head_dim": 32, "num_key_value_heads": 2}, shards=2, seed=24),
    "rope_llama3": Shape({"rope_scaling": LLAMA3, "rope_theta": 500000.0, "head_dim": 32}, seed=5),
    "rope_linear": Shape({"rope_scaling": {"type": "linear", "factor": 4.0}}, seed=16),
    "attention_bias": Shape({"attention_bias": True}, shards=2, seed=17),
    "mlp_bias": Shape({"mlp_bias": True}, seed=48),
    "odd_sizes": Shape(
        {
            "vocab_size": 137,
            "hidden_size": 54,
            "intermediate_size": 91,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 10,
        },
        shards=4,
        seed=9,
    ),
    "everything": Shape(
        {
            "tie_word_embeddings": True,
            "attention_bias": True,
            "mlp_bias": True,
            "head_dim": 16,
            "num_attention_heads": 8,
            "rope_parameters": LLAMA3 | {"rope_theta": 30000.0},
            "rope_theta": None,
            "num_hidden_layers": 3,
        },
        shards=3,
        seed=60,
    ),
    # Windows are shorter than PROMPT_TOKENS.
    "mistral": Shape(
        {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "sliding_window": 9,
            "head_dim": 32,
        },
        shards=2,
        seed=2,
    ),
    "qwen2": Shape(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "use_sliding_window": True,
            "sliding_window": 9,
            "max_window_layers": 1,
            "num_hidden_layers": 3,
            "tie_word_embeddings": True,
        },
        seed=4,
    ),
    "qwen3": Shape(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "head_dim": 32,
            "use_sliding_window": False,
            "sliding_window": 9,
            "attention_bias": True,
        },
        shards=3,
        seed=11,
    ),
}

PROMPT_TOKENS = 16
NEW_TOKENS = 64


def prompt(shape: Shape) -> np.ndarray:
    """int32 [PROMPT_TOKENS] random tokens."""
    return np.random.RandomState(100 + shape.seed).randint(0, shape.raw["vocab_size"], PROMPT_TOKENS).astype(np.int32)


def tensor_shapes(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors that transformers saves for a config.json, written down by hand."""
    hidden, wide, heads = raw["hidden_size"], raw["intermediate_size"], raw["num_attention_heads"]
    dim = raw.get("head_dim") or hidden // heads
    q, kv = heads * dim, raw["num_key_value_heads"] * dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (raw["vocab_size"], hidden)}
    for number in range(raw["num_hidden_layers"]):
        layer = f"model.layers.{number}."
        shapes[layer + "input_layernorm.weight"] = (hidden,)
        shapes[layer + "post_attention_layernorm.weight"] = (hidden,)
        matrices = {"self_attn.q_proj": (q, hidden), "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden)}
        matrices["self_attn.o_proj"] = (hidden, q)
        for name, size in matrices.items():
            shapes[f"{layer}{name}.weight"] = size
            if raw.get("attention_bias") or (raw["model_type"] == "qwen2" and name != "self_attn.o_proj"):
                shapes[f"{layer}{name}.bias"] = size[:1]
        if raw["model_type"] == "qwen3":
            shapes |= {f"{layer}self_attn.{name}.weight": (dim,) for name in ("q_norm", "k_norm")}
        for name, size in (("gate_proj", (wide, hidden)), ("up_proj", (wide, hidden)), ("down_proj", (hidden, wide))):
            shapes[f"{layer}mlp.{name}.weight"] = size
            if raw.get("mlp_bias"):
                shapes[f"{layer}mlp.{name}.bias"] = size[:1]
    shapes["model.norm.weight"] = (hidden,)
    if not raw.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (raw["vocab_size"], hidden)
    return shapes


def random_tensors(raw: dict[str, Any], seed: int) -> dict[str, np.ndarray]:
    """float32 weights. RandomState's streams are frozen, so a seed means the same weights in every numpy."""
    random = np.random.RandomState(seed)
    tensors = {}
    for name, shape in tensor_shapes(raw).items():
        drawn = random.standard_normal(shape)
        if name.endswith("norm.weight"):
            drawn = 1 + 0.2 * drawn
        elif name.endswith(".bias"):
            drawn = 0.3 * drawn
        elif name == "model.embed_tokens.weight":
            drawn = 0.3 * drawn  # small beside what the layers add, or a tied model repeats its last token
        else:
            drawn = 1.5 * drawn / math.sqrt(shape[-1])
        tensors[name] = drawn.astype(np.float32)
    return tensors


NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int8": "I8", "uint8": "U8"}
NAMES |= {"int32": "I32", "int64": "I64", "float8_e4m3fn": "F8_E4M3"}


def write_safetensors(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes the format by hand: the numpy interface of the safetensors package has no bfloat16."""
    header, offset = {}, 0
    for name, array in tensors.items():
        ends = [offset, offset + array.nbytes]
        header[name] = {"dtype": NAMES[array.dtype.name], "shape": list(array.shape), "data_offsets": ends}
        offset += array.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            file.write(array.tobytes())


def write_checkpoint(
    directory: pathlib.Path,
    raw: dict[str, Any],
    tensors: dict[str, np.ndarray],
    shards: int = 1,
    dtype: str = "float32",
) -> pathlib.Path:
    """Writes config.json and the tensors as `dtype`, in one file or in shards with an index; returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw | {"dtype": dtype}))
    stored = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}[dtype]
    tensors = {name: array.astype(stored) for name, array in tensors.items()}
    if shards == 1:
        write_safetensors(directory / "model.safetensors", tensors)
        return directory
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        held = names[shard::shards]  # spreads the parts of one fused parameter over several files
        write_safetensors(directory / file, {name: tensors[name] for name in held})
        weight_map |= dict.fromkeys(held, file)
    index = {"metadata": {"total_size": sum(array.nbytes for array in tensors.values())}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_shape(directory: pathlib.Path, shape: Shape, dtype: str = "float32") -> pathlib.Path:
    """Writes the checkpoint of a parity shape; returns the directory."""
    return write_checkpoint(directory, shape.raw, random_tensors(shape.raw, shape.seed), shape.shards, dtype)


def lookup_tensors(raw: dict[str, Any], follow: dict[int, int]) -> dict[str, np.ndarray]:
    """Weights with which token t is followed by follow[t], or else by 0, whatever came before.

    Attention and MLP write nothing, embeddings are one-hot (hidden_size must be at least vocab_size), and row follow[t]
    of the head holds the one-hot of t.
    """
    tensors = {name: np.zeros(shape, np.float32) for name, shape in tensor_shapes(raw).items()}
    for name, array in tensors.items():
        if name.endswith("norm.weight"):
            array[:] = 1.0
    np.fill_diagonal(tensors["model.embed_tokens.weight"], 1.0)
    for token in range(raw["vocab_size"]):
        tensors["lm_head.weight"][follow.get(token, 0), token] = 1.0
    return tensors


def write_files(
    directory: pathlib.Path, fields: dict[str, Any] | None = None, tensors: Any = None, **files: Any
) -> str:
    """Writes config.json with fields over BASE (None drops one), tensors if any, and JSON files by their stems."""
    directory.mkdir(parents=True, exist_ok=True)
    raw = {name: value for name, value in (BASE | (fields or {})).items() if value is not None}
    for name, content in {"config": raw, **files}.items():
        (directory / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    if tensors is not None:
        write_safetensors(directory / "model.safetensors", tensors)
    return str(directory)
