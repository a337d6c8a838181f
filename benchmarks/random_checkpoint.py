"""Hugging Face directories of random weights, for measurements that need a model's shape and not its sense."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

from jaxserve.models.config import ModelConfig
from jaxserve.models.layers.parameter import Source
from jaxserve.models.params import parameters

LLAMA_153M: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}
"""The config.json of the 153 million parameter Llama that peers were measured on."""

LLAMA_1B: dict[str, Any] = LLAMA_153M | {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
"""The same for the 1.1 billion parameter one, whose weights no cache holds: a decode step streams them from memory."""


def write_checkpoint(directory: pathlib.Path, raw: dict[str, Any], seed: int = 0, shards: int = 1) -> None:
    """Writes config.json and bfloat16 weights drawn from a normal distribution: model.safetensors, or `shards` files
    and their index.

    A file is written header first and tensor by tensor, as the format says
    (https://github.com/huggingface/safetensors#format). Norm scales are 1, so that activations keep their size.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    declared = parameters(ModelConfig.from_directory(directory))
    sources = [source for parameter in declared.values() for source in parameter.sources]
    rng = np.random.default_rng(seed)
    if shards == 1:
        _write_file(directory / "model.safetensors", sources, rng)
        return
    weight_map: dict[str, str] = {}
    for number in range(shards):
        name = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        held = sources[number * len(sources) // shards : (number + 1) * len(sources) // shards]
        _write_file(directory / name, held, rng)
        weight_map |= {part.tensor: name for part in held}
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def _write_file(path: pathlib.Path, sources: Sequence[Source], rng: np.random.Generator) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for part in sources:
        begin, end = end, end + 2 * math.prod(part.shape)
        header[part.tensor] = {"dtype": "BF16", "shape": list(part.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for part in sources:
            if len(part.shape) == 1:
                values = np.ones(part.shape, np.float32)
            else:
                values = rng.standard_normal(part.shape, np.float32) / math.sqrt(part.shape[-1])
            file.write(values.astype(ml_dtypes.bfloat16).tobytes())
