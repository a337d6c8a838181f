"""Saves small models with transformers and what they compute: `python -m tests.models.make_pretrained DIRECTORY`.

Each family's own configuration class writes config.json, so that the keys are those that its checkpoints have. Needs
torch. Beside each checkpoint reference.npz holds prompts, greedy tokens and logits in float32.
"""

import itertools
import math
import pathlib
import sys
from typing import Any

import numpy as np
import torch
import transformers

SIZES: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"sliding_window": 12, "head_dim": 32, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}),
    "qwen3": (
        "Qwen3",
        {
            "head_dim": 32,
            "use_sliding_window": True,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}
"""The family's prefix in transformers, and what differs from SIZES; windows are shorter than the prompts."""

PROMPTS = (45, 20)
NEW_TOKENS = 64


def draw(model: torch.nn.Module, seed: int) -> None:
    """Fills the parameters so that every one of them matters and greedy choices are not close."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=random)
            if name.endswith("norm.weight"):
                drawn = 1 + 0.2 * drawn
            elif name.endswith(".bias") or "embed_tokens" in name:
                drawn = 0.3 * drawn
            else:
                drawn = 1.5 * drawn / math.sqrt(parameter.shape[-1])
            parameter.copy_(drawn)


def computed(model: torch.nn.Module, seed: int) -> dict[str, np.ndarray] | None:
    """Greedy tokens int32 and logits float32 of every prompt; None where a choice is so close that it says nothing."""
    arrays = {}
    for number, length in enumerate(PROMPTS):
        prompt = np.random.RandomState(seed * 10 + number).randint(0, SIZES["vocab_size"], length)
        tokens = torch.from_numpy(prompt)[None]
        with torch.no_grad():
            mask = torch.ones_like(tokens)
            tokens = model.generate(tokens, attention_mask=mask, do_sample=False, max_new_tokens=NEW_TOKENS)
            logits = model(tokens).logits[0].numpy()
        best = np.sort(logits[length - 1 : -1], axis=-1)
        if np.min(best[:, -1] - best[:, -2]) < 1e-3:
            return None
        arrays |= {f"tokens{number}": tokens[0].numpy().astype(np.int32), f"logits{number}": logits}
    return arrays


def main(directory: str) -> None:
    """Writes a folder for each of MODELS, with the first weights whose greedy choices are clear."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for name, (family, fields) in MODELS.items():
        config = getattr(transformers, f"{family}Config")(**SIZES | fields)
        config._attn_implementation = "eager"
        model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
        for seed in itertools.count():
            draw(model, seed)
            arrays = computed(model, seed)
            if arrays is not None:
                break
        folder = pathlib.Path(directory) / name
        model.save_pretrained(folder)
        np.savez(folder / "reference.npz", **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
