"""Records what transformers computes for the parity shapes: `python -m tests.models.make_references FILE.npz`.

Needs torch. Tests on machines without torch compare with the recorded file; with torch they run this again and compare
with fresh numbers too.
"""

import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers

from tests.models.checkpoints import NEW_TOKENS, PROMPT_TOKENS, SHAPES, Shape, prompt, write_shape

LOGIT_STRIDE = 5
"""Logits are kept for every fifth position, to keep the file small."""


def reference(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens int32 [prompt + new] and float32 logits [every fifth position, vocab]."""
    with tempfile.TemporaryDirectory() as directory:
        path = write_shape(pathlib.Path(directory), shape)
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", device_map=None, output_loading_info=True
        )
    assert not any(loading[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), loading
    assert next(model.parameters()).dtype == torch.float32
    model.eval()
    tokens = torch.from_numpy(prompt(shape)).long()[None]
    with torch.no_grad():
        tokens = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
        )
        logits = model(tokens).logits[0].float().numpy()
    sequence = tokens[0].numpy().astype(np.int32)
    assert sequence.shape == (PROMPT_TOKENS + NEW_TOKENS,)
    best = np.sort(logits[PROMPT_TOKENS - 1 : -1], axis=-1)
    margin = float(np.min(best[:, -1] - best[:, -2]))
    print(
        f"{len(set(sequence[PROMPT_TOKENS:].tolist())):3d} different new tokens, closest choice {margin:.4f}", end="  "
    )
    # A closer choice could fall either way in float32 and would say nothing of the model.
    assert margin > 1e-3, margin
    return sequence, logits[::LOGIT_STRIDE]


def main(path: str) -> None:
    """Writes the file."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    arrays = {}
    for name, shape in SHAPES.items():
        arrays[f"{name}.tokens"], arrays[f"{name}.logits"] = reference(shape)
        print(name, flush=True)
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
