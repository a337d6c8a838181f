"""Records what transformers computes for shapes of families: `python -m tests.models.make_family_references ...`.

    FILE.npz             of the first shape of each family, for machines without torch
    DIRECTORY NAME...    a folder for each shape, with the checkpoint, what transformers saves of it, and reference.npz

Needs torch. Of some seeds the first is taken with which no greedy choice is close.
"""

from __future__ import annotations

import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers

from tests.models.family_shapes import FAMILIES, NEW_TOKENS, prompts, raw_config, write_family_shape

LENGTHS = (45, 35, 33, 40)
LOGIT_STRIDE = 5
MARGIN = 1e-3
"""A closer choice could fall either way in float32 and would say nothing of the model."""


def load(path: pathlib.Path) -> torch.nn.Module:
    """The model of a checkpoint, by transformers; every tensor is one that it has."""
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        path,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        device_map=None,
        output_loading_info=True,
    )
    assert not any(loading[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    return model.eval()


def continued(model: torch.nn.Module, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Greedy tokens int32 and logits float32 of all but the last token; None where a choice is close."""
    tokens = torch.from_numpy(prompt).long()[None]
    with torch.no_grad():
        mask = torch.ones_like(tokens)
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0}
        tokens = model.generate(tokens, attention_mask=mask, **options)
        logits = model(tokens[:, :-1]).logits[0].float().numpy()
    sequence = tokens[0].numpy().astype(np.int32)
    best = np.sort(logits[len(prompt) - 1 :], axis=-1)
    if np.min(best[:, -1] - best[:, -2]) < MARGIN:
        return None
    # Dynamic rotation differs between steps of generate and one of all tokens, were there any difference here.
    assert np.array_equal(np.argmax(logits[len(prompt) - 1 :], axis=-1), sequence[len(prompt) :])
    return sequence, logits


def recorded(path: pathlib.Path, name: str, lengths: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Writes the checkpoint of a shape to `path`; returns the seed, and tokens and logits of each prompt."""
    for seed in range(50):
        model = load(write_family_shape(path, name, seed))
        found = [continued(model, prompt) for prompt in prompts(name, lengths)]
        if None not in found:
            break
    else:
        raise ValueError(f"{name}: choices are close with every seed")
    arrays = {"seed": np.array(seed)}
    for number, (tokens, logits) in enumerate(found):
        arrays |= {f"tokens{number}": tokens, f"logits{number}": logits}
    model.save_pretrained(path / "saved")
    return arrays


def main(target: str, *names: str) -> None:
    """Writes the file, or a folder for each shape."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if names:
        for name in names:
            folder = pathlib.Path(target) / name
            np.savez(folder / "reference.npz", **recorded(folder, name, LENGTHS))
            print(name, flush=True)
        return
    arrays = {}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as directory:
            found = recorded(pathlib.Path(directory), f"{family}.0", LENGTHS[:1])
        arrays |= {f"{family}.seed": found["seed"], f"{family}.tokens": found["tokens0"]}
        arrays[f"{family}.logits"] = found["logits0"][::LOGIT_STRIDE]
        print(family, int(found["seed"]), raw_config(f"{family}.0")["model_type"], flush=True)
    np.savez_compressed(target, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
