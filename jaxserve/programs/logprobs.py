"""Computes log-probabilities, ranks and the likeliest ids of rows of logits, as packed columns.

A row is int32 [2 + 2 K]: the value of the row's token (float32 bits), its rank, the K likeliest ids and their values
(float32 bits); `jaxserve.logprob_columns` reads them on the host. One array, so that one copy brings all of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxserve.programs.logit_rows import block_width, in_groups, largest


def packed_width(most: int) -> int:
    """Returns the number of int32 columns of a row with `most` likeliest ids."""
    return 2 + 2 * most


def packed_logprobs(logits: jax.Array, token_ids: jax.Array, most: int, *, normalized: bool = True) -> jax.Array:
    """Returns int32 [R, 2 + 2 most], packed as the module says.

    The rank of a token is the number of tokens whose value is no less than its own, as in vLLM: 1 is the likeliest.

    Args:
        logits: float32 [R, V].
        token_ids: int32 [R]; a negative one counts as 0.
        most: the likeliest ids of each row, at most V.
        normalized: values are log-probabilities; else the logits themselves.
    """
    own = jnp.take_along_axis(logits, jnp.maximum(token_ids, 0)[:, None], axis=-1, mode="clip")
    rank = jnp.sum(logits >= own, axis=-1, dtype=jnp.int32)
    top_values, top_ids = likeliest(logits, most)
    shift = _log_of_sum(logits) if normalized else jnp.zeros_like(own)
    columns = [_bits(own - shift), rank[:, None], top_ids, _bits(top_values - shift)]
    return jnp.concatenate(columns, axis=-1)


def drawn_logprobs(
    logits: jax.Array,
    token_ids: jax.Array,
    wanted: jax.Array,
    processed: Callable[[], jax.Array],
    most: int,
    mode: str,
    *,
    on_cpu: bool = True,
) -> jax.Array:
    """Returns `packed_logprobs` of drawn tokens, int32 [R, 2 + 2 most]; zeros where no row wants any.

    Args:
        logits: float32 [R, V], of the model.
        token_ids: int32 [R], as `sample` returns them.
        wanted: int32 [R], not 0 where a row wants log-probabilities.
        processed: computes what the tokens are drawn from, float32 [R, V].
        most: as for `packed_logprobs`.
        mode: one of LOGPROBS_MODES.
        on_cpu: the device is a CPU, which computes a few rows at a time.
    """

    def found() -> jax.Array:
        values = processed() if mode.startswith("processed") else logits
        packed = functools.partial(packed_logprobs, most=most, normalized=mode.endswith("logprobs"))
        return in_groups(packed, values, token_ids, on_cpu=on_cpu)

    nothing = jnp.zeros((logits.shape[0], packed_width(most)), jnp.int32)
    return jax.lax.cond(jnp.any(wanted > 0), found, lambda: nothing)


def likeliest(values: jax.Array, most: int) -> tuple[jax.Array, jax.Array]:
    """Returns the `most` largest of float32 [R, V] and their int32 ids: largest first, of equals the lowest id first.

    The largest of all lie in the blocks whose own maxima are the largest, so that only few of the values are ordered: a
    pass over all of them finds the maxima, as in `argmax`.
    """
    rows, size = values.shape
    width = block_width(size)
    if size // width <= most:
        return jax.lax.top_k(values, most)
    blocks = values.reshape(rows, size // width, width)
    _, chosen = jax.lax.top_k(largest(blocks), most)
    chosen = jnp.sort(chosen, axis=-1)  # ids rise, so that the first among equals has the lowest
    candidates = jnp.take_along_axis(blocks, chosen[:, :, None], axis=1, mode="clip").reshape(rows, most * width)
    top_values, place = jax.lax.top_k(candidates, most)
    return top_values, jnp.take_along_axis(chosen, place // width, axis=-1, mode="clip") * width + place % width


def _log_of_sum(logits: jax.Array) -> jax.Array:
    """Returns float32 [R, 1], the logarithm of the sum of the exponentials of float32 [R, V]."""
    best = largest(logits)[:, None]
    return best + jnp.log(jnp.sum(jnp.exp(logits - best), axis=-1, keepdims=True))


def _bits(values: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(values, jnp.int32)
