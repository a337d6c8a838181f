"""Turns one key-value head of the first layer into heads that look one and two tokens back.

Recall needs a head that carries each key to the value after it, and left to itself training finds one late: nothing
rewards it until another head matches keys. Given such heads from the start, matching is all that is left to learn.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxserve.models.layers.rope import rope_frequencies
from jaxserve.models.tiny.tiny_tokenizer import BOS_ID, EOS_ID, FIRST_BYTE_ID, FIRST_WHOLE_ID, VOCAB_SIZE
from jaxserve.models.tiny.words import ACCENTED, EMOJI

AMPLITUDES = (12.0, 12.0, 6.0, 4.0, 3.0, 2.0, 1.0)
"""Attention logits given to the fastest rotary frequencies; together they tell neighbours apart by about 8."""

USED_IDS = sorted(
    {BOS_ID, EOS_ID, *(FIRST_BYTE_ID + byte for byte in b"\n" + bytes(range(32, 127)))}
    | {FIRST_BYTE_ID + byte for text in EMOJI + ACCENTED for byte in text.encode()}
    | set(range(FIRST_WHOLE_ID, VOCAB_SIZE))
)
"""The tokens that tasks are written in; the fit of the constant ignores all others."""


def constant_direction(inputs: np.ndarray, ridge: float = 1e-3) -> np.ndarray:
    """The vector [H] whose dot with each row of inputs [V, H] is as near to 1 as a small vector gets."""
    gram = inputs.T @ inputs + ridge * len(inputs) * np.eye(inputs.shape[1])
    return np.linalg.solve(gram, inputs.sum(axis=0))


def graft_look_back(graph: nnx.GraphDef, params: Any, kv_head: int) -> tuple[Any, np.ndarray]:
    """Rewrites Q and K of `kv_head` in layer 0: its group's heads look 1, 2, ... tokens back, whatever the tokens.

    A rotary score depends on distance through angles alone, so queries and keys are constant vectors, the queries
    turned back by the distance wanted. Returns the changed params and, for judging the fit, the dot of every used
    token's normed embedding with the direction that stands for the constant (float [len(USED_IDS)], all near 1).
    """
    model = nnx.merge(graph, params)
    config, layer = model.config, model.layers[0]
    inputs = np.asarray(layer.attention_norm(model.embedding[...]), np.float64)[USED_IDS]
    direction = constant_direction(inputs)
    half = config.head_dim // 2
    freq = np.asarray(rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling), np.float64)
    strength = np.zeros(half)
    strength[: len(AMPLITUDES)] = AMPLITUDES
    strength = np.sqrt(strength * np.sqrt(config.head_dim))  # attention divides by the root of the dimension
    qkv = np.array(layer.attention.qkv[...])
    for head in range(config.group_size):
        angle = -(head + 1) * freq
        query = np.concatenate([strength * np.cos(angle), strength * np.sin(angle)])
        qkv[kv_head, head] = np.outer(query, direction)
    qkv[kv_head, config.group_size] = np.outer(np.concatenate([strength, np.zeros(half)]), direction)
    layer.attention.qkv[...] = jnp.asarray(qkv, jnp.float32)
    return nnx.split(model, nnx.Param)[1], inputs @ direction


def freeze_mask(params: Any, kv_head: int | None) -> Any:
    """What each update is multiplied by: 1, but 0 for Q and K of `kv_head` in layer 0 (None: for nothing)."""

    def choose(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = [str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path]
        if kv_head is None or "qkv" not in names or names[:2] != ["layers", "0"]:
            return jnp.ones((1,) * leaf.ndim, jnp.float32)
        return jnp.ones((*leaf.shape[:2], 1, 1), jnp.float32).at[kv_head, :-1].set(0.0)

    return jax.tree_util.tree_map_with_path(choose, params)
