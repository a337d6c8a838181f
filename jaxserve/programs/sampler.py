"""Samples token ids from logits, for rows that each have parameters of their own.

Every option is data: one program serves greedy and random rows together, and `lax.cond` skips what no row uses. Random
rows draw by the Gumbel-max trick with a key made of (seed, position) alone, so a token does not depend on the batch,
the step or the slot. Filters find their threshold by bisection over the bits of the logits instead of sorting: 32
passes of compare and sum, exact, ties kept together.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxserve.programs.noise import gumbel
from jaxserve.programs.slots import Slots
from jaxserve.scheduler.plan import NOT_FINITE, NOTHING_ALLOWED

_BLOCK = 128
"""Block size of `_argmax`: the least width that divides the vocabulary and is no less than this."""


def sample(logits: jax.Array, slots: Slots, masks: jax.Array, fields: dict[str, jax.Array]) -> jax.Array:
    """Draws one id for each row.

    logits: float32 [R, V]. masks: uint32 [S, words], bit v % 32 of word v // 32 allows the slot token v.
    fields: int32 [R] each, of `layout.sample_layout`: slot, clamped where out of range (padding); position, of the
        token drawn; suppress_stop, 1 forbids the slot's stop token ids; masked, 1 forbids what its mask does not allow.
    Returns int32 [R]; NOT_FINITE for a row whose logits are not all finite, NOTHING_ALLOWED for one all of whose tokens
    are forbidden.
    """
    rows = _Rows(slots, fields)
    temperature, masked = rows.temperature, fields["masked"]
    finite = _all_finite(logits)

    restricted = rows.any_masked | jnp.any(fields["suppress_stop"] > 0)

    def permitted() -> jax.Array:
        return _permitted(logits, rows, masks)

    def greedy_of_permitted() -> jax.Array:
        found = permitted()
        some = (masked == 0) | (jnp.max(found, axis=-1) > -jnp.inf)
        return jnp.where(some, _argmax(found), NOTHING_ALLOWED)

    # Each branch reduces for itself: one that returned the logits as they are would copy them.
    greedy = jax.lax.cond(restricted, greedy_of_permitted, lambda: _argmax(logits))

    def draw() -> jax.Array:
        allowed = jax.lax.cond(restricted, permitted, lambda: logits)
        scaled = _filtered(allowed, rows)
        noise = gumbel(rows.of("seed"), fields["position"], logits.shape[-1])
        return _argmax(scaled + noise)

    drawn = jax.lax.cond(jnp.any(temperature > 0), draw, lambda: greedy)
    drawn = jnp.where((temperature > 0) & (greedy != NOTHING_ALLOWED), drawn, greedy)
    return jnp.where(finite, drawn, NOT_FINITE)


class _Rows:
    """Reads the parameters of the rows of a step.

    temperature: float32 [R], 0 in padding. any_masked: bool, whether any row has a mask.
    """

    def __init__(self, slots: Slots, fields: dict[str, jax.Array]):
        self._slots = slots
        self.fields = fields
        slot, count = fields["slot"], slots.last_token.shape[0]
        self.slot = jnp.minimum(slot, count - 1)
        self.temperature = jnp.where(slot < count, self.of("temperature"), 0.0)
        self.any_masked = jnp.any(fields["masked"] > 0)

    def of(self, name: str) -> jax.Array:
        """Returns a sampling parameter, [R] or [R, width]."""
        return self._slots.sampling[name][self.slot]


def processed_logits(logits: jax.Array, slots: Slots, masks: jax.Array, fields: dict[str, jax.Array]) -> jax.Array:
    """Returns float32 [R, V]: the logits that `sample`, with the same arguments, draws from.

    They are relative to the row's largest before temperature, a constant that changes no probability; -inf where a
    token cannot be drawn. A greedy row's are not divided, nor filtered.
    """
    rows = _Rows(slots, fields)
    return _filtered(_permitted(logits, rows, masks), rows)


def _permitted(logits: jax.Array, rows: _Rows, masks: jax.Array) -> jax.Array:
    """Masks forbidden tokens to -inf."""
    found = _without_stop_ids(logits, rows.of("stop_token_ids"), rows.fields["suppress_stop"])
    allowed = lambda: _allowed(masks[rows.slot], rows.fields["masked"], found.shape[-1])  # noqa: E731
    return jax.lax.cond(rows.any_masked, lambda: jnp.where(allowed(), found, -jnp.inf), lambda: found)


def _filtered(allowed: jax.Array, rows: _Rows) -> jax.Array:
    """Divides by the temperature, and masks to -inf what the filters of random rows leave out."""
    temperature = rows.temperature
    # Relative to the best logit, so that no temperature, however small, takes another token to infinity.
    relative = allowed - jnp.max(allowed, axis=-1, keepdims=True)
    scaled = relative / jnp.where(temperature > 0, temperature, 1.0)[:, None]
    min_p = jnp.where(temperature > 0, rows.of("min_p"), 0.0)  # a row that does not draw keeps all its tokens
    return filter_logits(scaled, rows.of("top_k"), rows.of("top_p"), min_p, temperature > 0)


def filter_logits(
    logits: jax.Array, top_k: jax.Array, top_p: jax.Array, min_p: jax.Array, active: jax.Array
) -> jax.Array:
    """Masks tokens to -inf by min_p, then top_k, then top_p; top_p counts probability among the tokens left by then.

    Args:
        logits: float32 [R, V], after temperature.
        top_k: int32 [R], 0 or less is off.
        top_p: float32 [R], 1 is off.
        min_p: float32 [R], 0 is off.
        active: bool [R], rows whose result matters; a filter runs only for those.
    """
    size = logits.shape[-1]
    use_top_k = active & (top_k > 0) & (top_k < size)
    use_top_p = active & (top_p < 1.0)
    best = jnp.max(logits, axis=-1, keepdims=True)
    floor = best + jnp.log(jnp.maximum(min_p, jnp.finfo(jnp.float32).tiny))[:, None]
    logits = jnp.where((min_p > 0)[:, None] & (logits < floor), -jnp.inf, logits)

    def keep_top_k(logits: jax.Array) -> jax.Array:
        order = _ordered_bits(logits)
        wanted = jnp.where(use_top_k, top_k, size)
        threshold = _largest(order.shape[:1], lambda t: jnp.sum(order >= t[:, None], axis=-1) >= wanted)
        return jnp.where(order >= threshold[:, None], logits, -jnp.inf)

    def keep_top_p(logits: jax.Array) -> jax.Array:
        order = _ordered_bits(logits)
        weight = jnp.exp(logits - best)
        wanted = jnp.where(use_top_p, top_p, 1.0) * jnp.sum(weight, axis=-1)
        mass = lambda t: jnp.sum(jnp.where(order >= t[:, None], weight, 0.0), axis=-1)  # noqa: E731
        threshold = _largest(order.shape[:1], lambda t: mass(t) >= wanted)
        threshold = jnp.minimum(threshold, jnp.max(order, axis=-1))  # the best stays where top_p rounds to 0
        kept = jnp.where(order >= threshold[:, None], logits, -jnp.inf)
        return jnp.where(use_top_p[:, None], kept, logits)

    logits = jax.lax.cond(jnp.any(use_top_k), keep_top_k, lambda logits: logits, logits)
    return jax.lax.cond(jnp.any(use_top_p), keep_top_p, lambda logits: logits, logits)


def _without_stop_ids(logits: jax.Array, stop_token_ids: jax.Array, suppress_stop: jax.Array) -> jax.Array:
    size = logits.shape[-1]
    columns = jnp.where((suppress_stop[:, None] > 0) & (stop_token_ids >= 0), stop_token_ids, size)
    rows = jnp.arange(logits.shape[0])[:, None]
    return logits.at[rows, columns].set(-jnp.inf, mode="drop")


def _allowed(masks: jax.Array, masked: jax.Array, size: int) -> jax.Array:
    """Returns bool [R, size]: tokens allowed by uint32 [R, words], and all in rows that are not `masked`, int32 [R]."""
    bits = (masks[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return (bits.reshape(masks.shape[0], -1)[:, :size] > 0) | (masked[:, None] == 0)


def _all_finite(values: jax.Array) -> jax.Array:
    """Returns bool [R]: whether all of a row's float32 [R, V] are finite.

    A sum is finite only where every term is; single values are examined only if some row's sum is not.
    """
    proven = jnp.isfinite(jnp.sum(values, axis=-1))
    return jax.lax.cond(jnp.all(proven), lambda: proven, lambda: jnp.all(jnp.isfinite(values), axis=-1))


def _argmax(values: jax.Array) -> jax.Array:
    """Returns int32 [R]: the lowest index of the maximum of float32 [R, V]; any of the V in a row that holds NaN.

    One pass finds the maximum of each block, the rest examines the first block that holds the row's. XLA's CPU backend
    vectorizes that pass, but not a reduction over pairs of value and index.
    """
    rows, size = values.shape
    width = next(width for width in range(min(_BLOCK, size), size + 1) if size % width == 0)
    blocks = values.reshape(rows, size // width, width)
    largest = jnp.max(blocks, axis=-1)
    best = jnp.max(largest, axis=-1, keepdims=True)
    block = _first(largest == best)
    within = jnp.take_along_axis(blocks, block[:, None, None], axis=1, mode="clip")[:, 0]
    return jnp.minimum(block * width + _first(within == best), size - 1)


def _first(holds: jax.Array) -> jax.Array:
    """Returns int32 [R]: the lowest true index of each row of bool [R, N]; N where there is none."""
    place = jax.lax.broadcasted_iota(jnp.int32, holds.shape, 1)
    return jnp.min(jnp.where(holds, place, holds.shape[1]), axis=-1)


def _ordered_bits(values: jax.Array) -> jax.Array:
    """Returns uint32 whose order is that of the float32 values."""
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _largest(shape: tuple[int, ...], holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Returns the largest uint32 threshold of each row for which `holds` is true; 0 where it never is.

    `holds` must be monotonically decreasing.
    """

    def narrow(step: int, threshold: jax.Array) -> jax.Array:
        candidate = threshold | (jnp.uint32(1 << 31) >> jnp.uint32(step))
        return jnp.where(holds(candidate), candidate, threshold)

    return jax.lax.fori_loop(0, 32, narrow, jnp.zeros(shape, jnp.uint32))
