"""Writes a training checkpoint as a Hugging Face model: `python -m jaxserve.models.tiny.export --run DIR --out DIR`.

The weights are stored as float32, in `LlamaForCausalLM`'s names and shapes.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from jaxserve.models.layers.decoder import Decoder
from jaxserve.models.layers.parameter import get
from jaxserve.models.params import parameters, params_of
from jaxserve.models.tiny.tiny_tokenizer import BOS, BOS_ID, CHAT_TEMPLATE, EOS, EOS_ID, PAD, PAD_ID, build_tokenizer
from jaxserve.models.tiny.train import Progress, checkpoints, restore
from jaxserve.models.tiny.training_step import CONFIG, initial_params, make_optimizer


def hf_tensors(model: Decoder) -> dict[str, np.ndarray]:
    """The model's weights under Hugging Face's names, fused projections taken apart, float32."""
    held = params_of(model)
    tensors: dict[str, np.ndarray] = {}
    for path, parameter in parameters(model.config).items():
        values = np.asarray(get(held, path), np.float32)
        for source in parameter.sources:
            tensors[source.tensor] = np.ascontiguousarray(source.target(values).reshape(source.shape))
    return tensors


def hf_config() -> dict[str, Any]:
    """The `config.json` of CONFIG."""
    return {
        "architectures": [CONFIG.architecture],
        "model_type": "llama",
        "vocab_size": CONFIG.vocab_size,
        "hidden_size": CONFIG.hidden_size,
        "intermediate_size": CONFIG.intermediate_size,
        "num_hidden_layers": CONFIG.num_hidden_layers,
        "num_attention_heads": CONFIG.num_attention_heads,
        "num_key_value_heads": CONFIG.num_key_value_heads,
        "head_dim": CONFIG.head_dim,
        "max_position_embeddings": CONFIG.max_position_embeddings,
        "rms_norm_eps": CONFIG.rms_norm_eps,
        "rope_theta": CONFIG.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
        "torch_dtype": "float32",
    }


def write_tokenizer(out: pathlib.Path) -> None:
    """tokenizer.json and tokenizer_config.json."""
    build_tokenizer().save(str(out / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": CONFIG.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    _write_json(out / "tokenizer_config.json", settings)


def export(run: pathlib.Path, out: pathlib.Path, optimizer: str) -> Progress:
    """Writes the newest checkpoint of `run` to `out` and returns how far it had come."""
    graph, params = initial_params(0)
    manager = checkpoints(run)
    if manager.latest_step() is None:
        raise ValueError(f"run is {str(run)!r}; it holds no checkpoint")
    progress, params, _ = restore(manager, params, make_optimizer(optimizer).init(params))
    manager.close()
    out.mkdir(parents=True, exist_ok=True)
    tensors = hf_tensors(nnx.merge(graph, jax.device_get(params)))
    save_file(tensors, str(out / "model.safetensors"), metadata={"format": "pt"})
    _write_json(out / "config.json", hf_config())
    generation = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID, "do_sample": False}
    _write_json(out / "generation_config.json", generation)
    write_tokenizer(out)
    return progress


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Writes a training checkpoint as a Hugging Face model")
    parser.add_argument("--run", required=True, help="folder of a training run")
    parser.add_argument("--out", default=str(pathlib.Path(__file__).parent / "checkpoint"))
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    options = parser.parse_args(arguments)
    progress = export(pathlib.Path(options.run), pathlib.Path(options.out), options.optimizer)
    print(f"step {progress.step}, {progress.tokens} tokens, {progress.seconds / 60:.0f} minutes of training")


if __name__ == "__main__":
    main()
