"""Samples token ids from logits, for rows that each have parameters of their own.

The logits of a row are processed in vLLM's order:

    allowed_token_ids, masks (bad_words among them), min_tokens     forbidden tokens become -inf
    logit_bias                                                      added
    repetition_penalty, frequency_penalty, presence_penalty         from the row's tokens so far
    temperature, min_p, top_k, top_p, typical_p                     in rows that draw; a greedy row takes the largest

Every option is data: one program serves greedy and random rows together, and `lax.cond` skips what no row uses. Random
rows draw by the Gumbel-max trick with a key made of (seed, position) alone, so a token does not depend on the batch,
the step or the slot.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxserve.programs.filters import filter_logits
from jaxserve.programs.logit_rows import BLOCK, all_finite, argmax, block_width, in_groups, largest
from jaxserve.programs.noise import gumbel, gumbel_at
from jaxserve.programs.penalties import Penalties, penalized, unpacked
from jaxserve.programs.slots import Slots
from jaxserve.sampling_params import PENALTY_ROW, counted
from jaxserve.scheduler.plan import NOT_FINITE, NOTHING_ALLOWED

_FEW = 8
"""Noise is drawn only for the blocks of tokens that the filters left something of where these are at most one in so
many."""


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Reads the fields of the R rows to sample; of padding, whose slot is out of range, some slot's."""

    slots: Slots
    masks: jax.Array
    fields: dict[str, jax.Array]

    @property
    def exists(self) -> jax.Array:
        return self.fields["slot"] < self.slots.last_token.shape[0]

    @property
    def slot(self) -> jax.Array:
        return jnp.minimum(self.fields["slot"], self.slots.last_token.shape[0] - 1)

    def of(self, name: str) -> jax.Array:
        """Returns a parameter of each row, [R] or [R, width]."""
        return self.slots.sampling[name][self.slot]

    def used(self, name: str) -> jax.Array:
        """Returns int32 [R]: the number of elements of a wide parameter that each row has; 0 for padding."""
        return jnp.where(self.exists, self.of(counted(name)), 0)

    @property
    def temperature(self) -> jax.Array:
        return jnp.where(self.exists, self.of("temperature"), 0.0)

    @property
    def penalty_row(self) -> jax.Array:
        return jnp.where(self.exists, self.of(PENALTY_ROW), -1)

    @functools.cached_property
    def restricted(self) -> jax.Array:
        """Returns bool [R]: rows of which a list or a mask says what they may draw."""
        return (self.fields["masked"] > 0) | (self.used("allowed_token_ids") > 0)


def sample(
    logits: jax.Array,
    slots: Slots,
    masks: jax.Array,
    penalties: Penalties,
    fields: dict[str, jax.Array],
    *,
    on_cpu: bool = True,
) -> jax.Array:
    """Draws one id for each row.

    logits: float32 [R, V]. masks: uint32 [S, words], bit v % 32 of word v // 32 allows the slot token v. penalties: the
        penalty rows.
    fields: int32 [R] each, of `layout.sample_layout`: slot, clamped where out of range (padding); position, of the
        token drawn; suppress_stop, 1 forbids the slot's stop token ids; masked, 1 forbids what its mask does not allow.
    on_cpu: the device is a CPU, which decides how things are computed and not what.
    Returns int32 [R]; NOT_FINITE for a row whose logits are not all finite, NOTHING_ALLOWED for one all of whose tokens
    are forbidden.
    """
    rows = _Rows(slots, masks, fields)

    def processed(logits: jax.Array, fields: dict[str, jax.Array]) -> jax.Array:
        rows = _Rows(slots, masks, fields)
        changed, random = _changed(rows), rows.temperature > 0
        found = jax.lax.cond(changed, lambda: _changed_logits(logits, rows, penalties), lambda: logits)
        draw = lambda: _drawn(_filtered(found, rows, on_cpu), rows, changed, on_cpu)  # noqa: E731
        greedy = argmax(found)
        ids = jnp.where(random, jax.lax.cond(jnp.any(random), draw, lambda: greedy), greedy)
        return jnp.where(~rows.restricted | (largest(found) > -jnp.inf), ids, NOTHING_ALLOWED)

    # Each branch reduces for itself: one that returned the logits as they are would copy them.
    some = _changed(rows) | jnp.any(rows.temperature > 0)
    of_processed = lambda: in_groups(processed, logits, fields, on_cpu=on_cpu)  # noqa: E731
    ids = jax.lax.cond(some, of_processed, lambda: argmax(logits))
    return jnp.where(all_finite(logits), ids, NOT_FINITE)


def processed_logits(
    logits: jax.Array,
    slots: Slots,
    masks: jax.Array,
    penalties: Penalties,
    fields: dict[str, jax.Array],
    *,
    on_cpu: bool = True,
) -> jax.Array:
    """Returns float32 [R, V]: the logits that `sample`, with the same arguments, draws from.

    They are relative to the row's largest before temperature, a constant that changes no probability; -inf where a
    token cannot be drawn. A greedy row's are not divided, nor filtered.
    """

    def processed(logits: jax.Array, fields: dict[str, jax.Array]) -> jax.Array:
        rows = _Rows(slots, masks, fields)
        found = jax.lax.cond(_changed(rows), lambda: _changed_logits(logits, rows, penalties), lambda: logits)
        return _filtered(found, rows, on_cpu)

    return in_groups(processed, logits, fields, on_cpu=on_cpu)


def _changed(rows: _Rows) -> jax.Array:
    """Tells whether any row's logits are processed before temperature."""
    any_changed = rows.restricted | (rows.fields["suppress_stop"] > 0) | (rows.used("logit_bias") > 0)
    return jnp.any(any_changed | (rows.penalty_row >= 0))


def _changed_logits(logits: jax.Array, rows: _Rows, penalties: Penalties) -> jax.Array:
    """Applies everything that comes before temperature; rows that use none of it stay as they are."""
    size, masked = logits.shape[-1], rows.fields["masked"]

    def if_any(used: jax.Array, change: Callable[[jax.Array], jax.Array], logits: jax.Array) -> jax.Array:
        return jax.lax.cond(jnp.any(used), change, lambda logits: logits, logits)

    def within_allowed(logits: jax.Array) -> jax.Array:
        allowed = _at(jnp.zeros(logits.shape, bool), rows.of("allowed_token_ids"), num_allowed).set(True, mode="drop")
        return jnp.where(allowed | (num_allowed == 0)[:, None], logits, -jnp.inf)

    def within_masks(logits: jax.Array) -> jax.Array:
        allowed = unpacked(rows.masks[rows.slot], size) | (masked == 0)[:, None]
        return jnp.where(allowed, logits, -jnp.inf)

    def with_biases(logits: jax.Array) -> jax.Array:
        pairs = rows.of("logit_bias")
        biases = jax.lax.bitcast_convert_type(pairs[:, 1::2], jnp.float32)
        return _at(logits, pairs[:, 0::2], num_biased // 2).add(biases, mode="drop")

    def with_penalties(logits: jax.Array) -> jax.Array:
        weights = (rows.of(f"{name}_penalty") for name in ("presence", "frequency", "repetition"))
        return penalized(logits, penalties, rows.penalty_row, *weights)

    num_allowed, num_biased = rows.used("allowed_token_ids"), rows.used("logit_bias")
    logits = if_any(num_allowed, within_allowed, logits)
    logits = if_any(masked, within_masks, logits)
    logits = _without_stop_ids(logits, rows.of("stop_token_ids"), rows.fields["suppress_stop"])
    logits = if_any(num_biased, with_biases, logits)
    return if_any(rows.penalty_row >= 0, with_penalties, logits)


def _filtered(logits: jax.Array, rows: _Rows, on_cpu: bool) -> jax.Array:
    """Divides by temperature, and masks what the filters remove."""
    temperature = rows.temperature
    # Relative to the best logit, so that no temperature, however small, takes another token to infinity.
    relative = logits - largest(logits)[:, None]
    scaled = relative / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    # A row that does not draw keeps all its tokens.
    min_p = jnp.where(temperature > 0, rows.of("min_p"), 0.0)
    limits = rows.of("top_k"), rows.of("top_p"), min_p, temperature > 0, rows.of("typical_p")
    return filter_logits(scaled, *limits, on_cpu=on_cpu)


def _drawn(left: jax.Array, of: _Rows, changed: jax.Array, on_cpu: bool) -> jax.Array:
    """Draws int32 [R] from float32 [R, V]; of rows that do not draw, any token.

    On a CPU most of the time goes into the noise, so where few tokens are left it is drawn for their blocks alone.
    """
    (rows, size), seed, position, random = left.shape, of.of("seed"), of.fields["position"], of.temperature > 0
    width = block_width(size)
    blocks = size // width
    room = blocks // _FEW

    def of_all() -> jax.Array:
        return argmax(left + gumbel(seed, position, size))

    if not on_cpu or not room or width % BLOCK:
        return of_all()
    parts = left.reshape(rows, blocks, width)

    def live() -> jax.Array:
        return (largest(parts) > -jnp.inf) & random[:, None]

    def of_few() -> jax.Array:
        taken = live()
        rank = jnp.where(taken, jnp.cumsum(taken, axis=-1) - 1, room)
        number = jnp.broadcast_to(jnp.arange(blocks), rank.shape)
        chosen = _at(jnp.full((rows, room), blocks), rank).set(number, mode="drop")
        values = jnp.take_along_axis(parts, chosen[:, :, None], axis=1, mode="fill", fill_value=-jnp.inf)
        place = chosen[:, :, None] * width + jnp.arange(width)
        noise = gumbel_at(seed, position, place.reshape(rows, -1).astype(jnp.uint32))
        best = argmax(values.reshape(rows, -1) + noise)
        found = jnp.take_along_axis(place.reshape(rows, -1), best[:, None], axis=1, mode="clip")[:, 0]
        return jnp.minimum(found, size - 1)

    filters = (of.of("top_k") > 0) | (of.of("top_p") < 1) | (of.of("min_p") > 0) | (of.of("typical_p") < 1)
    some_removed = changed | jnp.any(random & filters)
    few = jax.lax.cond(some_removed, lambda: jnp.max(jnp.sum(live(), axis=-1)) <= room, lambda: jnp.array(False))
    return jax.lax.cond(few, of_few, of_all)


def _without_stop_ids(logits: jax.Array, stop_token_ids: jax.Array, suppress_stop: jax.Array) -> jax.Array:
    size = logits.shape[-1]
    columns = jnp.where((suppress_stop[:, None] > 0) & (stop_token_ids >= 0), stop_token_ids, size)
    rows = jnp.arange(logits.shape[0])[:, None]
    return logits.at[rows, columns].set(-jnp.inf, mode="drop")


def _at(array: jax.Array, columns: jax.Array, counts: jax.Array | None = None) -> Any:
    """Returns the elements of [R, N] in `columns`, int32 [R, M], to be set with mode "drop": the first `counts` of each
    row, or all; negative columns are none."""
    used = columns >= 0
    if counts is not None:
        used &= jnp.arange(columns.shape[1]) < counts[:, None]
    return array.at[jnp.arange(array.shape[0])[:, None], jnp.where(used, columns, array.shape[1])]
