"""One shape of every family through pages: logits and greedy tokens that transformers gave for it, in float32.

All shapes are `make test-all`'s (test_family_matrix.py), kinds of layers test_layer_kinds.py's.
"""

import pathlib
import subprocess
import sys

import numpy as np
import pytest

from jaxserve.models import params, registry
from jaxserve.models.config import ModelConfig
from jaxserve.models.loading import checkpoint
from tests.models import generate
from tests.models.family_shapes import FAMILIES, NEW_TOKENS, prompts, write_family_shape

REFERENCES = pathlib.Path(__file__).parent / "family_references.npz"
LOGIT_STRIDE = 5
TOLERANCE = 1e-4
MOST_LINES = 120
RECORDED_ELSEWHERE = {"llama", "mistral", "qwen2", "qwen3"}  # test_parity.py has shapes of them


@pytest.fixture(scope="module")
def recorded():
    with np.load(REFERENCES) as file:
        return dict(file)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - RECORDED_ELSEWHERE))
def test_pages_give_the_logits_and_greedy_tokens_of_transformers(family, recorded, tmp_path, caplog):
    directory = write_family_shape(tmp_path, f"{family}.0", int(recorded[f"{family}.seed"]))
    config = ModelConfig.from_directory(directory)
    assert not caplog.messages  # every key is read or known to decide nothing
    weights = checkpoint.load(directory, config, "float32", params.make_mesh())
    (prompt,) = prompts(f"{family}.0")
    tokens, logits = generate.paged_greedy(config, weights, prompt, NEW_TOKENS)
    np.testing.assert_array_equal(tokens, recorded[f"{family}.tokens"])
    np.testing.assert_allclose(logits[::LOGIT_STRIDE], recorded[f"{family}.logits"], rtol=0, atol=TOLERANCE)


def test_every_family_has_three_shapes_and_few_lines():
    shapes = {architecture: shapes for architecture, _, shapes in FAMILIES.values()}
    for name, family in registry.ARCHITECTURES.items():
        assert len(shapes[name]) >= 3, name
        module = sys.modules[family.layers.__module__]
        assert module.__file__ is not None
        assert len(pathlib.Path(module.__file__).read_text().splitlines()) <= MOST_LINES, name


@pytest.mark.long
def test_recorded_numbers_are_what_transformers_computes_now(tmp_path, recorded):
    pytest.importorskip("torch")
    command = [sys.executable, "-m", "tests.models.make_family_references", str(tmp_path / "fresh.npz")]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    with np.load(tmp_path / "fresh.npz") as fresh:
        assert set(fresh) == set(recorded)
        for name, array in fresh.items():
            np.testing.assert_allclose(array, recorded[name], rtol=0, atol=2e-5, err_msg=name)
