"""Routes tokens to experts on the device: which experts, with which weights, and in which order their rows lie.

Letters in shapes: T tokens, E experts, k experts per token, M = T * k rows, one for each choice of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxserve.models.layer_specs import RouterSpec


class Routes(NamedTuple):
    """Holds the rows of a step, sorted by expert; those of tokens that are padding come last and have no expert.

    Attributes:
        tokens: int32 [M], the token of each row.
        experts: int32 [M], the expert of each row; E for none.
        offsets: int32 [E + 1], rows offsets[e] to offsets[e + 1] are of expert e.
        rows: int32 [T, k], the row of each choice.
        weights: float32 [T, k], of each choice; 0 for padding.
    """

    tokens: jax.Array
    experts: jax.Array
    offsets: jax.Array
    rows: jax.Array
    weights: jax.Array


def route(scores: jax.Array, spec: RouterSpec, num_tokens: jax.Array | None = None) -> Routes:
    """Chooses experts for each token.

    Of equal scores the expert with the lower number is chosen. (transformers leaves ties to `torch.topk`, which
    promises no order.)

    Args:
        scores: float32 [T, E].
        spec: how to choose.
        num_tokens: int32, tokens from this one on are padding; None where there is none.
    """
    tokens, count = scores.shape
    highest, chosen = jax.lax.top_k(scores, spec.per_token)
    if spec.softmax == "chosen":
        weights = jax.nn.softmax(highest, axis=-1)
    else:
        weights = jnp.take_along_axis(jax.nn.softmax(scores, axis=-1), chosen, axis=-1)
    if spec.renormalized:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    if num_tokens is not None:
        real = (jnp.arange(tokens) < num_tokens)[:, None]
        chosen, weights = jnp.where(real, chosen, count), jnp.where(real, weights, 0.0)
    number = tokens * spec.per_token
    assert (count + 1) * number < 2**31, "the keys of the sort are 32 bits wide"
    of_choice = chosen.reshape(number)
    choice = jnp.arange(number, dtype=jnp.int32)
    # Keys differ, so that one array is sorted and no order among equal ones matters.
    keys = jax.lax.sort(of_choice * number + choice, is_stable=False)
    order = keys % number
    rows = jnp.zeros(number, jnp.int32).at[order].set(choice, unique_indices=True)
    offsets = jnp.sum(of_choice[:, None] < jnp.arange(count + 1)[None, :], axis=0, dtype=jnp.int32)
    return Routes(order // spec.per_token, keys // number, offsets, rows.reshape(tokens, -1), weights)


def combine(y: jax.Array, routes: Routes) -> jax.Array:
    """Sums the rows [M, H] of each token by their weights, from the highest to the lowest: float32 [T, H]."""
    each = y[routes.rows].astype(jnp.float32) * routes.weights[..., None]
    total = each[:, 0]
    for choice in range(1, each.shape[1]):
        total = total + each[:, choice]
    return total
