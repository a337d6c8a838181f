"""Dense attention against a loop, and paged attention against dense."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.models import params
from jaxserve.models.config import ModelConfig
from jaxserve.models.layers.attention_backends import AttentionMetadata, dense_attend
from jaxserve.pallas_kernels.paged_attention.spec import AttentionSpec
from tests.models import generate
from tests.models.checkpoints import BASE

KV_HEADS, GROUP, DIM = 2, 3, 4


def drawn(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def attend_unrotated(settings, segments, q, k, v, cache):
    """Dense attention of float32 queries, keys and values as they are."""
    qkv = jnp.concatenate([q, k[..., None, :], v[..., None, :]], axis=-2)
    return dense_attend(segments)(qkv, None, cache, settings, None, np.dtype(np.float32))


def by_hand(q, k, v, settings, segments):
    """float64 [T, K, G, D], one query at a time."""
    out = np.zeros(q.shape)
    for token, head, member in np.ndindex(q.shape[:3]):
        seen = [
            other
            for other in range(token + 1)
            if segments[other] == segments[token]
            and (settings.sliding_window is None or token - other < settings.sliding_window)
        ]
        scores = [settings.scale * float(q[token, head, member] @ k[other, head]) for other in seen]
        if settings.soft_cap is not None:
            scores = [settings.soft_cap * math.tanh(score / settings.soft_cap) for score in scores]
        weights = np.exp(np.array(scores) - max(scores))
        out[token, head, member] = weights / weights.sum() @ v[seen, head]
    return out


@pytest.mark.parametrize(
    ("settings", "segments"),
    [
        (AttentionSpec(0.5), [0] * 9),
        (AttentionSpec(0.5), [0, 0, 0, 1, 1, 2, 2, 2, 2]),
        (AttentionSpec(0.7, sliding_window=3), [0] * 9),
        (AttentionSpec(2.0, soft_cap=1.5), [0, 0, 0, 0, 1, 1, 1, 1, 1]),
        (AttentionSpec(1.0, sliding_window=2, soft_cap=4.0), [0, 0, 0, 0, 0, 1, 1, 1, 1]),
    ],
)
def test_dense_attention_is_the_sum_written_out(settings, segments):
    q, k, v = drawn(9, KV_HEADS, GROUP, DIM), drawn(9, KV_HEADS, DIM, seed=1), drawn(9, KV_HEADS, DIM, seed=2)
    marks = None if set(segments) == {0} else jnp.array(segments)
    out, cache = attend_unrotated(settings, marks, q, k, v, "cache")
    assert cache == "cache"
    np.testing.assert_allclose(out, by_hand(q, k, v, settings, segments), rtol=0, atol=1e-5)


def test_dense_attention_takes_a_batch():
    q, k, v = drawn(2, 5, KV_HEADS, GROUP, DIM), drawn(2, 5, KV_HEADS, DIM, seed=1), drawn(2, 5, KV_HEADS, DIM, seed=2)
    segments = jnp.array([[0, 0, 1, 1, 1], [0, 1, 1, 2, 2]])
    settings = AttentionSpec(0.5)
    out, _ = attend_unrotated(settings, segments, q, k, v, None)
    assert out.shape == q.shape
    for row in range(2):
        expected = by_hand(q[row], k[row], v[row], settings, segments[row])
        np.testing.assert_allclose(out[row], expected, rtol=0, atol=1e-5)


def test_metadata_is_a_pytree_of_its_arrays():
    fields = [jnp.zeros(size, jnp.int32) for size in (4, (2, 3), 2, 3, 4)]
    metadata = AttentionMetadata(*fields)
    leaves, tree = jax.tree.flatten(metadata)
    assert [leaf.shape for leaf in leaves] == [(4,), (2, 3), (2,), (3,), (4,)]
    assert isinstance(jax.tree.unflatten(tree, leaves), AttentionMetadata)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pages_and_dense_attention_agree(dtype):
    config = ModelConfig.from_hf(BASE | {"num_hidden_layers": 1})
    weights = params.random_params(config, dtype, params.make_mesh(), seed=1)
    tokens = np.random.RandomState(0).randint(0, config.vocab_size, 24).astype(np.int32)
    dense = np.asarray(generate.dense_logits(config, weights, jnp.asarray(tokens)))
    assert dense.dtype == np.float32
    sequence = generate.PagedSequence(config, weights, len(tokens), "xla")
    paged = np.concatenate([sequence.extend(part, 16) for part in np.split(tokens, [3, 14, 15, 16])])
    # bfloat16 keeps 8 bits: attention's sums in another order may round to a neighbor, and the head sums those.
    np.testing.assert_allclose(paged, dense, rtol=0, atol=1e-4 if dtype == "float32" else 0.05)
