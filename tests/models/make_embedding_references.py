"""Records the embeddings that transformers computes: `python -m tests.models.make_embedding_references FILE.npz`.

Needs torch. Tests on machines without torch compare with the recorded file; with torch they run this again, too.
"""

import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers

from tests.models.checkpoints import SHAPES, Shape, write_shape

EMBEDDED_SHAPES = ("gqa_untied", "qwen3", "mistral")
LENGTHS = (1, 2, 15, 16, 17, 33, 60)
"""Tokens of the prompts: shorter than a step of 16, as long, and over several."""


def prompts(shape: Shape) -> list[np.ndarray]:
    """Random token ids, int32 of each of LENGTHS."""
    rng = np.random.RandomState(300 + shape.seed)
    return [rng.randint(0, shape.raw["vocab_size"], length).astype(np.int32) for length in LENGTHS]


def hidden_states(shape: Shape) -> list[np.ndarray]:
    """The final hidden states of each prompt, float32 [tokens, hidden size], after the final norm."""
    with tempfile.TemporaryDirectory() as directory:
        path = write_shape(pathlib.Path(directory), shape)
        model = transformers.AutoModel.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", device_map=None
        )
    model.eval()
    with torch.no_grad():
        return [
            model(torch.from_numpy(ids).long()[None]).last_hidden_state[0].float().numpy() for ids in prompts(shape)
        ]


def main(path: str) -> None:
    """Writes the file: for each shape the vectors of each kind, not normalized, float32 [prompts, hidden size]."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    arrays = {}
    for name in EMBEDDED_SHAPES:
        states = hidden_states(SHAPES[name])
        arrays[f"{name}.LAST"] = np.stack([one[-1] for one in states])
        arrays[f"{name}.CLS"] = np.stack([one[0] for one in states])
        arrays[f"{name}.MEAN"] = np.stack([one.astype(np.float64).mean(axis=0) for one in states]).astype(np.float32)
    np.savez_compressed(path, **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
