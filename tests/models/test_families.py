"""Families through the engine against transformers: checkpoints that it saved, prompts longer than their windows."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve import LLM, SamplingParams
from jaxserve.config.settings import CacheConfig, EngineConfig, SchedulerConfig
from jaxserve.models.config import ModelConfig
from jaxserve.models.loading import checkpoint
from jaxserve.models.params import make_mesh
from tests.models import generate

NAMES = ("mistral", "qwen2", "qwen3")
PROMPTS = (45, 20)
NEW_TOKENS = 64
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torch is not installed here; test_parity compares with recorded numbers of every family")
    directory = tmp_path_factory.mktemp("pretrained")
    # A process of its own: torch's threads and the warnings of its imports stay out of this one.
    command = [sys.executable, "-m", "tests.models.make_pretrained", str(directory)]
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {path.name for path in directory.iterdir()} == set(NAMES)
    return directory


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_tokens_are_those_of_transformers(name, saved, caplog):
    directory = saved / name
    with np.load(directory / "reference.npz") as file:
        reference = dict(file)
    config = ModelConfig.from_directory(directory)
    assert not caplog.messages  # every key is read or known to decide nothing
    weights = checkpoint.load(directory, config, "float32", make_mesh())
    logits = generate.dense_logits(config, weights, jnp.asarray(reference["tokens0"]))
    np.testing.assert_allclose(logits, reference["logits0"], rtol=0, atol=TOLERANCE)

    # Steps of at most 16 tokens: the first prompt takes three, one of them with the other's chunk or decode beside it.
    engine = EngineConfig(
        model=str(directory),
        dtype="float32",
        skip_tokenizer_init=True,
        scheduler=SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=16),
        cache=CacheConfig(num_pages=33, page_size=16),
        token_buckets=(16,),
        row_buckets=(8,),
    )
    prompts = [reference[f"tokens{number}"][:length].tolist() for number, length in enumerate(PROMPTS)]
    llm = LLM(config=engine)
    greedy = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], greedy, use_tqdm=False)
    for number, output in enumerate(outputs):
        expected = reference[f"tokens{number}"][PROMPTS[number] :].tolist()
        assert list(output.outputs[0].token_ids) == expected, number


def test_a_window_matters(saved):
    """What is compared above can tell: without the window the tokens are others."""
    directory = saved / "mistral"
    raw = json.loads((directory / "config.json").read_text())
    config = ModelConfig.from_hf(raw | {"sliding_window": None})
    weights = checkpoint.load(directory, config, "float32", make_mesh())
    with np.load(directory / "reference.npz") as file:
        logits = generate.dense_logits(config, weights, jnp.asarray(file["tokens0"]))
        assert np.abs(np.asarray(logits) - file["logits0"]).max() > 100 * TOLERANCE
