"""The compiled parts of training: loss, one optimiser step, and the evaluation pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxserve.models.config import ModelConfig
from jaxserve.models.layers.attention_backends import rotated
from jaxserve.models.layers.decoder import Decoder
from jaxserve.models.layers.matmul import Products
from jaxserve.models.layers.self_attention import Rotation
from jaxserve.models.tiny.tiny_tokenizer import BOS_ID, EOS_ID, VOCAB_SIZE
from jaxserve.pallas_kernels.paged_attention.spec import AttentionSpec

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=VOCAB_SIZE,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    bos_token_id=BOS_ID,
    eos_token_ids=(EOS_ID,),
)

Params = Any
"""An nnx state of float32 master weights."""


def initial_params(seed: int) -> tuple[nnx.GraphDef, Params]:
    model = Decoder(CONFIG, dtype=jnp.dtype(jnp.float32), products=Products(), rngs=nnx.Rngs(seed))
    graph, params = nnx.split(model, nnx.Param)
    return graph, params


def segment_bias(segments: jax.Array) -> jax.Array:
    """Additive mask [B, 1, 1, L, L]: 0 where a token may see another (same example, not later), else -1e9."""
    length = segments.shape[-1]
    same = segments[:, :, None] == segments[:, None, :]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return jnp.where(same & causal, 0.0, -1e9)[:, None, None]


def dense_attend(bias: jax.Array) -> Callable[..., tuple[jax.Array, None]]:
    """Attention over whole rows, as `jaxserve.models.layers.self_attention.Attend` describes it."""

    def attend(
        qkv: jax.Array, rotation: Rotation | None, cache: None, spec: AttentionSpec, sinks: None, dtype: np.dtype
    ) -> tuple[jax.Array, None]:
        q, k, v = rotated(qkv, rotation, dtype)
        scores = jnp.einsum("blkgd,bmkd->bkglm", q, k, preferred_element_type=jnp.float32)
        probs = jax.nn.softmax(scores / math.sqrt(q.shape[-1]) + bias, axis=-1).astype(v.dtype)
        out = jnp.einsum("bkglm,bmkd->blkgd", probs, v, preferred_element_type=jnp.float32)
        return out.astype(q.dtype), cache

    return attend


def row_logits(graph: nnx.GraphDef, params: Params, tokens, positions, segments) -> jax.Array:
    """float32 logits [B, L, V] of packed rows (int32 [B, L] each)."""
    model = nnx.merge(graph, params)
    caches = [None] * CONFIG.num_hidden_layers
    hidden, _ = model(tokens, positions, caches, dense_attend(segment_bias(segments)))
    return model.logits(hidden)


def loss_fn(params: Params, graph: nnx.GraphDef, batch: tuple[jax.Array, ...]) -> jax.Array:
    """Weighted mean cross-entropy in nats."""
    tokens, targets, positions, segments, weights = batch
    logits = row_logits(graph, params, tokens, positions, segments)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.sum(losses * weights) / jnp.sum(weights)


def dimension_numbers(params: Params) -> Any:
    """Which axes of each weight Muon treats as a matrix; None (embedding and norms) is AdamW's.

    The heads of Q, K and V and the two halves of gate_up are matrices of their own.
    """
    axes = {
        "qkv": optax.contrib.MuonDimensionNumbers(reduction_axis=3, output_axis=2),
        "out": optax.contrib.MuonDimensionNumbers(reduction_axis=(1, 2, 3), output_axis=0),
        "gate_up": optax.contrib.MuonDimensionNumbers(reduction_axis=2, output_axis=1),
        "down": optax.contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=0),
    }

    def choose(path: tuple[Any, ...], _: Any) -> Any:
        names = [str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path]
        return next((axes[name] for name in names if name in axes), None)

    return jax.tree_util.tree_map_with_path(choose, params)


def make_optimizer(name: str) -> optax.GradientTransformation:
    """Updates for a learning rate of 1: the step scales them, so that a schedule outlives a restart."""
    if name == "adamw":
        inner = optax.adamw(1.0, b1=0.9, b2=0.98, weight_decay=0.01)
    elif name == "muon":
        inner = optax.contrib.muon(
            1.0,
            adam_b1=0.9,
            adam_b2=0.98,
            weight_decay=0.01,
            adam_weight_decay=0.0,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=dimension_numbers,
        )
    else:
        raise ValueError(f"optimizer is {name!r}; it must be 'muon' or 'adamw'")
    return optax.chain(optax.clip_by_global_norm(1.0), inner)


@functools.partial(jax.jit, static_argnames=("graph", "optimizer"), donate_argnames=("params", "state"))
def train_step(params, state, batch, rate, mask, *, graph, optimizer):
    """One update at learning rate `rate` (float32 scalar), times `mask` (a tree like params that broadcasts to it).

    Returns (params, state, loss).
    """
    loss, grads = jax.value_and_grad(loss_fn)(params, graph, batch)
    updates, state = optimizer.update(grads, state, params)
    params = jax.tree.map(lambda p, u, m: p + rate * m * u, params, updates, mask)
    return params, state, loss


@functools.partial(jax.jit, static_argnames=("graph",))
def predict_step(params, tokens, positions, segments, *, graph):
    """Greedy next tokens, int32 [B, L], computed in full float32 as the engine serves."""
    with jax.default_matmul_precision("float32"):
        return jnp.argmax(row_logits(graph, params, tokens, positions, segments), axis=-1)
