"""Keeps what the penalties of requests depend on, the tokens so far, in rows of their own on the device.

    add_ids(penalties, vector) -> penalties      the known ids of one sequence, when it gets its slot
    counted(penalties, rows, ids) -> penalties   the drawn ids of a step, in the sample program

A row belongs to a request while it runs; the scheduler assigns it. A request that comes back after a preemption may get
another row, to which the host adds all its ids anew, so that a row's content depends on the request's tokens alone.
The arrays are donated and updated in place; no program copies them.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxserve.programs.layout import penalty_layout

MOST_COUNTED = 65_535
"""Largest count of a token; further occurrences of it in the output change nothing."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["counts", "prompts"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Penalties:
    """Holds P penalty rows over a vocabulary of V.

    Attributes:
        counts: uint16 [P, V], how often the output has each token, at most MOST_COUNTED.
        prompts: uint32 [P, words]; bit v % 32 of word v // 32 tells whether the prompt has token v.
    """

    counts: jax.Array
    prompts: jax.Array

    @classmethod
    def zeros(cls, num_rows: int, vocab_size: int) -> Penalties:
        """Creates empty rows."""
        counts = jnp.zeros((num_rows, vocab_size), jnp.uint16)
        return cls(counts, jnp.zeros((num_rows, -(-vocab_size // 32)), jnp.uint32))

    @property
    def num_rows(self) -> int:
        return self.counts.shape[0]


def penalized(
    logits: jax.Array,
    penalties: Penalties,
    rows: jax.Array,
    presence: jax.Array,
    frequency: jax.Array,
    repetition: jax.Array,
) -> jax.Array:
    """Applies penalties to float32 [R, V], in vLLM's order: repetition, frequency, presence.

    Args:
        logits: of which those of tokens that cannot be drawn are -inf; they stay so.
        penalties: the rows.
        rows: int32 [R], each logit row's penalty row; negative for none, whose logits stay as they are.
        presence: float32 [R], as are frequency and repetition.
    """
    row = jnp.maximum(rows, 0)
    counts = penalties.counts[row].astype(jnp.float32)
    drawn = counts > 0
    seen = drawn | unpacked(penalties.prompts[row], logits.shape[-1])
    repetition = repetition[:, None]
    scaled = jnp.where(seen, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    lowered = scaled - frequency[:, None] * counts - jnp.where(drawn, presence[:, None], 0.0)
    # A tiny repetition_penalty takes no logit to infinity.
    bounded = jnp.minimum(lowered, jnp.finfo(jnp.float32).max)
    return jnp.where((rows >= 0)[:, None], bounded, logits)


def counted(penalties: Penalties, rows: jax.Array, ids: jax.Array) -> Penalties:
    """Counts the drawn ids, int32 [R], in penalty rows, int32 [R]; negative ids and rows are dropped.

    No two of the ids may be of one row.
    """
    row = jnp.where((rows >= 0) & (ids >= 0), rows, penalties.num_rows)
    token = jnp.maximum(ids, 0)
    count = penalties.counts[jnp.minimum(row, penalties.num_rows - 1), token]
    count = count + (count < MOST_COUNTED).astype(jnp.uint16)
    return dataclasses.replace(penalties, counts=penalties.counts.at[row, token].set(count, mode="drop"))


def add_ids(penalties: Penalties, vector: jax.Array, *, ids: int) -> Penalties:
    """Adds `ids` token ids to one row as `vector` (`penalty_layout`) says."""
    fields = penalty_layout(ids).read(vector)
    (row,), (reset,), (num_prompt,), token_ids = (fields[name] for name in ("row", "reset", "num_prompt", "token_ids"))
    in_prompt = jnp.arange(ids) < num_prompt
    exists, row = row < penalties.num_rows, jnp.minimum(row, penalties.num_rows - 1)
    size, words = penalties.counts.shape[1], penalties.prompts.shape[1]

    def updated(held: jax.Array, new: jax.Array) -> jax.Array:
        """Returns the array with `new` combined with its row, unless that is padding."""
        return jax.lax.dynamic_update_slice_in_dim(held, new[None], row, axis=0)

    old_counts, old_bits = penalties.counts[row], penalties.prompts[row]
    drawn = jnp.zeros(size, jnp.int32).at[_places(token_ids, ~in_prompt, size)].add(1, mode="drop")
    counts = jnp.minimum(jnp.where(reset > 0, 0, old_counts.astype(jnp.int32)) + drawn, MOST_COUNTED)
    seen = jnp.zeros(words * 32, jnp.uint32).at[_places(token_ids, in_prompt, words * 32)].set(1, mode="drop")
    bits = jnp.sum(seen.reshape(words, 32) << jnp.arange(32, dtype=jnp.uint32), axis=1, dtype=jnp.uint32)
    bits = jnp.where(reset > 0, 0, old_bits) | bits
    return Penalties(
        updated(penalties.counts, jnp.where(exists, counts.astype(jnp.uint16), old_counts)),
        updated(penalties.prompts, jnp.where(exists, bits, old_bits)),
    )


def unpacked(bits: jax.Array, size: int) -> jax.Array:
    """Returns bool [R, size] of uint32 [R, words], from the lowest bit on."""
    found = (bits[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return found.reshape(bits.shape[0], -1)[:, :size] > 0


def _places(token_ids: jax.Array, wanted: jax.Array, out_of_range: int) -> jax.Array:
    return jnp.where(wanted & (token_ids >= 0), token_ids, out_of_range)
