"""Logits and greedy tokens against transformers, in float32: shapes of Llama, and the other families."""

import pathlib

import jax
import numpy as np
import pytest

from jaxserve.models import params
from jaxserve.models.config import ModelConfig
from jaxserve.models.loading import checkpoint
from tests.models import generate
from tests.models.checkpoints import NEW_TOKENS, SHAPES, prompt, write_shape

REFERENCES = pathlib.Path(__file__).parent / "references.npz"
LOGIT_STRIDE = 5
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def recorded():
    with np.load(REFERENCES) as file:
        return dict(file)


@pytest.fixture(scope="module", params=SHAPES)
def model(request, tmp_path_factory):
    """(name, config, params) of one shape."""
    directory = write_shape(tmp_path_factory.mktemp("checkpoint"), SHAPES[request.param])
    config = ModelConfig.from_directory(directory)
    return request.param, config, checkpoint.load(directory, config, "float32", params.make_mesh())


def test_dense_attention_gives_the_logits_and_greedy_tokens_of_transformers(model, recorded):
    name, config, weights = model
    tokens = recorded[f"{name}.tokens"]
    logits = np.asarray(generate.dense_logits(config, weights, jax.numpy.asarray(tokens)))
    np.testing.assert_allclose(logits[::LOGIT_STRIDE], recorded[f"{name}.logits"], rtol=0, atol=TOLERANCE)
    made = generate.dense_greedy(config, weights, jax.numpy.asarray(prompt(SHAPES[name])), NEW_TOKENS)
    np.testing.assert_array_equal(np.asarray(made), tokens)


def test_paged_attention_gives_the_logits_and_greedy_tokens_of_transformers(model, recorded):
    name, config, weights = model
    made, logits = generate.paged_greedy(config, weights, prompt(SHAPES[name]), NEW_TOKENS)
    np.testing.assert_array_equal(made, recorded[f"{name}.tokens"])
    np.testing.assert_allclose(logits[::LOGIT_STRIDE], recorded[f"{name}.logits"], rtol=0, atol=TOLERANCE)


def test_every_shape_is_recorded(recorded):
    assert set(recorded) == {f"{name}.{kind}" for name in SHAPES for kind in ("tokens", "logits")}
    assert REFERENCES.stat().st_size < 1_000_000


@pytest.mark.parametrize("parameter", ["qkv", "out", "gate_up", "down", "scale"])
def test_parity_fails_when_a_weight_is_wrong(parameter, tmp_path, recorded):
    """The comparison can tell: swapping two rows of one layer's weight moves the logits far past the tolerance."""
    directory = write_shape(tmp_path, SHAPES["gqa_untied"])
    config = ModelConfig.from_directory(directory)
    weights = checkpoint.load(directory, config, "float32", params.make_mesh())
    layer = weights["layers"][1]
    holder = {"scale": layer["mlp_norm"], "qkv": layer["attention"], "out": layer["attention"]}.get(
        parameter, layer["mlp"]
    )
    axis = 1 if parameter in ("qkv", "gate_up") else 0
    order = np.arange(holder[parameter].shape[axis])
    order[[0, 1]] = [1, 0]
    holder[parameter] = jax.numpy.take(holder[parameter], jax.numpy.asarray(order), axis=axis)
    logits = generate.dense_logits(config, weights, jax.numpy.asarray(recorded["gqa_untied.tokens"]))
    difference = np.abs(np.asarray(logits)[::LOGIT_STRIDE] - recorded["gqa_untied.logits"]).max()
    assert difference > 100 * TOLERANCE
