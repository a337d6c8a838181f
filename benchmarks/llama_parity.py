"""How far the logits of every family are from transformers, shape by shape: `python -m benchmarks.llama_parity`.

Random float32 weights, a prompt of 16 tokens and 64 greedy ones. With torch installed transformers runs here; without
it the numbers recorded in tests/models/references.npz stand for it. `dense` recomputes the whole sequence every step,
`paged` computes the prompt in two chunks and then token by token through the page pool.
Exit status 1 where a difference is above 1e-4 or a token differs.
"""

import importlib.util
import pathlib
import subprocess
import sys
import tempfile

import jax
import numpy as np

from jaxserve.models import params
from jaxserve.models.config import ModelConfig
from jaxserve.models.loading import checkpoint
from tests.models import generate
from tests.models.checkpoints import NEW_TOKENS, SHAPES, Shape, prompt, write_shape

ROOT = pathlib.Path(__file__).parents[1]
RECORDED = ROOT / "tests" / "models" / "references.npz"
LOGIT_STRIDE = 5
TOLERANCE = 1e-4


def reference_numbers(folder: pathlib.Path) -> tuple[dict[str, np.ndarray], str]:
    """The arrays by name, and where they come from."""
    path, source = RECORDED, f"numbers recorded in {RECORDED.relative_to(ROOT)} (torch is not installed)"
    if importlib.util.find_spec("torch") is not None:
        path, source = folder / "fresh.npz", "transformers, run now"
        subprocess.run([sys.executable, "-m", "tests.models.make_references", str(path)], cwd=ROOT, check=True)
    with np.load(path) as file:
        return dict(file), source


def compare(shape: Shape, folder: pathlib.Path, tokens: np.ndarray, logits: np.ndarray) -> list[tuple[float, int]]:
    """(largest logit difference, identical new tokens before the first that differs) of dense and paged."""
    directory = write_shape(folder, shape)
    config = ModelConfig.from_directory(directory)
    weights = checkpoint.load(directory, config, "float32", params.make_mesh())
    dense = np.asarray(generate.dense_logits(config, weights, jax.numpy.asarray(tokens)))
    start = prompt(shape)
    dense_tokens = np.asarray(generate.dense_greedy(config, weights, jax.numpy.asarray(start), NEW_TOKENS))
    paged_tokens, paged = generate.paged_greedy(config, weights, start, NEW_TOKENS)
    results = []
    for made, found in ((dense_tokens, dense), (paged_tokens, paged)):
        same = np.cumprod(made == tokens)[len(start) :].sum()
        results.append((float(np.abs(found[::LOGIT_STRIDE] - logits).max()), int(same)))
    return results


def main() -> int:
    """Prints the table; returns the exit status."""
    passed = True
    with tempfile.TemporaryDirectory() as folder:
        reference, source = reference_numbers(pathlib.Path(folder))
        print(f"reference: {source}\nlargest logit difference and identical greedy tokens of {NEW_TOKENS}, float32")
        print(f"{'shape':16} {'files':>5} {'dense':>10} {'tokens':>6} {'paged':>10} {'tokens':>6}")
        for name, shape in SHAPES.items():
            expected = reference[f"{name}.tokens"], reference[f"{name}.logits"]
            results = compare(shape, pathlib.Path(folder) / name, *expected)
            cells = " ".join(f"{difference:10.2e} {same:6d}" for difference, same in results)
            print(f"{name:16} {shape.shards:5d} {cells}", flush=True)
            passed &= all(difference <= TOLERANCE and same == NEW_TOKENS for difference, same in results)
    print("all within 1e-4 and identical" if passed else "NOT all within 1e-4 and identical")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
